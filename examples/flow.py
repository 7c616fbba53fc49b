"""A small normalizing flow of one's own: affine coupling layers on two moons of points."""

import math
import sys

import torch
from torch import Tensor, nn

from sqloss.training import train


class Flow(nn.Module):
    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        nets = [nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2)) for _ in range(layers)]
        self.nets = nn.ModuleList(nets)

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """The negative log density: that of a normal distribution, less the stretching."""
        log_stretch = torch.zeros_like(x[:, 0])
        for net in self.nets:
            scale, shift = net(x[:, :1]).unbind(1)
            moved = x[:, 1] * scale.tanh().exp() + shift
            x = torch.stack([moved, x[:, 0]], 1)  # and the other coordinate is next
            log_stretch = log_stretch + scale.tanh()
        normal = 0.5 * x.square().sum(1) + math.log(2 * math.pi)
        return {"loss": normal - log_stretch, "stretch": -log_stretch}


def moons(count: int, seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    angle, upper = math.pi * torch.rand(count, generator=draws), torch.arange(count) % 2 == 0
    points = torch.stack([angle.cos(), angle.sin()], 1)
    points = torch.where(upper[:, None], points, torch.tensor([1.0, 0.5]) - points)
    return points + 0.1 * torch.randn(count, 2, generator=draws)


if __name__ == "__main__":
    torch.manual_seed(0)
    out = sys.argv[1] if len(sys.argv) > 1 else None
    run = train(Flow(), moons(2000, 0), test=moons(1000, 1), backward="tail", output_dir=out)
    print((run.directory / "report.md").read_text())
