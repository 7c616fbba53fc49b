"""A training step of a VAE on the worst tail, beside one on the mean in torch operations: encoder,
latents, decoder, loss, gradients and Adam.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measure import STEP, Case, Contender, Operation, in_graph
from torch import Tensor

import sqloss
from sqloss.models import VAE

ALPHA = 0.8
SHAPE = (1, 28, 28)  # 784-400-20, the defaults of VAE

MEAN = "mean in torch"


def mean_loss(model: VAE, images: Tensor) -> Tensor:
    """As one writes it, with normal latents."""
    loc, logvar = model.encoder(images).chunk(2, dim=-1)
    z = loc + (0.5 * logvar).exp() * torch.randn_like(loc)
    kl = 0.5 * (loc.square() + logvar.exp() - 1 - logvar).sum()
    cost = F.binary_cross_entropy_with_logits(model.decode(z), images, reduction="sum")
    return (cost + kl) / len(images)


def tail_loss(model: VAE, images: Tensor) -> Tensor:
    loc, logvar = model.encoder(images).chunk(2, dim=-1)
    z, kl = sqloss.normal_rsample_kl(loc, logvar=logvar)
    return sqloss.cvar_binary_cross_entropy_with_logits(
        model.decode(z), images, alpha=ALPHA, reduction="sum", extra=kl
    )


def step(
    loss_of: Callable[[VAE, Tensor], Tensor], device: torch.device, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    @functools.cache
    def made() -> tuple[VAE, torch.optim.Optimizer]:
        model = VAE(SHAPE).to(device, dtype)
        gpu = device.type == "cuda"
        return model, torch.optim.Adam(model.parameters(), fused=True, capturable=gpu)

    return lambda images: training_step(*made(), loss_of, images)


def training_step(
    model: VAE,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[VAE, Tensor], Tensor],
    images: Tensor,
) -> Tensor:
    """The loss before the step."""
    optimizer.zero_grad()
    loss = loss_of(model, images)
    loss.backward()
    optimizer.step()
    return loss.detach()


def vae(batch: int, **like: Any) -> Case:
    return Case(
        shape=[batch, *SHAPE],
        inputs=lambda: [torch.rand(batch, *SHAPE, **like)],
        contenders=[
            Contender(MEAN, step(mean_loss, **like), repeatable=False),
            Contender(
                "sqloss",
                step(tail_loss, **like),
                repeatable=False,
                bars={in_graph(STEP): {MEAN: 1.0}},
            ),
        ],
        leaves=[],
        modes=[STEP, in_graph(STEP)] if like["device"].type == "cuda" else [STEP],
    )


OPERATIONS = {
    "vae": Operation("a training step of a VAE, 784-400-20, Adam", vae, sizes=[], gpu_sizes=[128])
}
