"""A classifier of one's own, trained on the mean and on the worst fifth of each batch."""

import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sqloss.training import train


class Classifier(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 3))

    def losses(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        points, classes = batch
        return cross_entropy(self(points), classes, reduction="none")


def clusters(sizes: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Points around three centres; the last class is rare where its size is small."""
    draws = torch.Generator().manual_seed(seed)
    classes = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    centres = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 1.5]])
    return centres[classes] + torch.randn(len(classes), 2, generator=draws), classes


if __name__ == "__main__":
    torch.manual_seed(0)
    run = train(
        Classifier(),
        clusters([1000, 1000, 50], seed=0),
        test=clusters([300, 300, 300], seed=1),
        output_dir=sys.argv[1] if len(sys.argv) > 1 else None,
    )
    print((run.directory / "report.md").read_text())
