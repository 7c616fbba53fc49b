"""The steps of a training: by torch, or by NumPy with a backward pass written by hand."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sqloss import distributed
from sqloss.common import ranks
from sqloss.common.errors import require
from sqloss.models import VAE
from sqloss.tail import tail_backward, tail_loss
from sqloss.training.risks import Risk
from sqloss.training.vae.config import VAEConfig
from sqloss.training.vae.objective import regrets

# FLOPs that cost as much as the fixed overhead of the second pass (a few ms), measured in
# benchmarks/results/tail.md. Independent of the thread count, so that all ranks decide alike.
FLOPS_TO_FIND_TAIL = 3 * 10**8


class Batch(NamedTuple):
    """This rank's part of a batch."""

    x: Tensor  # pixels, [B, *data_shape]
    rows: Tensor  # int64 [B], the numbers of these images in the whole batch
    size: int  # of that
    needed: Mapping[str, Tensor] = MappingProxyType({})  # what the risk needs beside, [B] each


class Backend(Protocol):
    """Trains one model, in place."""

    def step(self, batch: Batch, seed: Tensor) -> Tensor | float:
        """One step on a batch; the objective before it, of all of the batch."""

    def state_dict(self) -> dict[str, Any]:
        """The state that it keeps from step to step beside the model."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Losses(nn.Module):
    """The losses of a model, one per sample, that the objectives are of."""

    def __init__(self, model: VAE, iwae_samples: int) -> None:
        super().__init__()
        self.model = model
        self.iwae_samples = iwae_samples

    def forward(self, x: Tensor, seed: Tensor, rows: Tensor) -> dict[str, Tensor]:
        if self.iwae_samples:
            bound = self.model.negative_iw_bound(x, seed, self.iwae_samples, rows=rows)
            return {"negative_iw_bound": bound}
        return self.model.losses(x, seed, rows=rows)


class Torch:
    """Adam on what autograd makes of the model's losses, of all images or of those of the tail."""

    def __init__(
        self, model: VAE, risk: Risk, config: VAEConfig, reference: VAE | None = None
    ) -> None:
        self.model = model
        self.losses = ranks.parallel(Losses(model, config.iwae_samples))
        self.of_reference = reference and Losses(reference, config.iwae_samples)
        self.no_sync = partial(ranks.no_sync, self.losses)
        self.tail_loss, self.tail_backward = tail_loss, tail_backward
        if ranks.count() > 1:
            self.tail_loss = distributed.tail_loss
            self.tail_backward = partial(distributed.tail_backward, no_sync=self.no_sync)
        self.microbatch_size = config.microbatch_size
        self.objective = config.trained(risk)
        self.tail_alpha = risk.tail_alpha
        self.adam = torch.optim.Adam(model.parameters(), config.learning_rate, fused=True)
        self.takes_tail = self._takes_tail(config)

    def _takes_tail(self, config: VAEConfig) -> bool:
        """Whether images outside the tail go without a graph."""
        # A term that is added is of all images
        if not self.tail_alpha or self.objective.added or config.backward == "dense":
            return False
        if config.backward == "tail" or config.microbatch_size:
            return True
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        size = config.batch_size // ranks.count()
        return on_cpu and tail_pays(self._flops(size), self.tail_alpha)

    def _flops(self, batch_size: int) -> int:
        """Floating-point operations of forward on a batch, those of its matrix products alone."""
        from torch.utils.flop_counter import FlopCounterMode  # takes 0.1 s

        image = next(self.model.parameters()).new_zeros(1, *self.model.data_shape)
        zero = torch.zeros((), dtype=torch.int64)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.losses(image, zero, zero.to(image.device)[None])
        of_image: int = counter.get_total_flops()
        return batch_size * of_image

    def step(self, batch: Batch, seed: Tensor) -> Tensor:
        self.adam.zero_grad()
        loss = self._backward(batch, seed)
        self.adam.step()
        return loss.detach()

    def _backward(self, batch: Batch, seed: Tensor) -> Tensor:
        """Leave the gradients of the objective in the parameters; its value."""
        if self.takes_tail:
            return self._backward_of_tail(batch, seed)
        if self.microbatch_size:
            return self._backward_of_microbatches(batch, seed)
        loss = self.objective(self._losses(batch.x, seed, batch.rows), **batch.needed)
        loss.backward()
        return loss

    def _losses(self, x: Tensor, seed: Tensor, rows: Tensor) -> Mapping[str, Tensor]:
        """Those of the model; with a reference, less those of that one at the same draws."""
        losses: dict[str, Tensor] = self.losses(x, seed, rows)
        if self.of_reference is None:
            return losses
        with torch.no_grad():
            others = self.of_reference(x, seed, rows)
        return regrets(losses, others)

    def _backward_of_tail(self, batch: Batch, seed: Tensor) -> Tensor:
        def losses(x: Tensor, rows: Tensor) -> Tensor:
            return self.objective.risked(self._losses(x, seed, rows))

        # Unchecked: the noise is that of the row and there is no batch norm, so the passes differ
        # in rounding alone, which is large only where a model has lost its footing.
        x, rows, alpha = batch.x, batch.rows, self.tail_alpha
        if self.microbatch_size:
            size = self.microbatch_size
            return self.tail_backward(losses, x, rows, alpha=alpha, chunk_size=size, check=False)
        loss = self.tail_loss(losses, x, rows, alpha=alpha, check=False)
        loss.backward()
        return loss

    def _backward_of_microbatches(self, batch: Batch, seed: Tensor) -> Tensor:
        """The gradients of an objective that is a mean: each microbatch adds its share."""

        def share(losses: Tensor) -> Tensor:
            return losses.sum() * (ranks.count() / batch.size)  # as gradients are averaged

        objective = replace(self.objective, risk=share, mean=share)
        parts = [t.split(self.microbatch_size) for t in (batch.x, batch.rows)]
        value = batch.x.new_zeros(())
        for number, (x, rows) in enumerate(zip(*parts, strict=True), 1):
            is_last = number == len(parts[0])
            with contextlib.nullcontext() if is_last else self.no_sync():
                loss = objective(self.losses(x, seed, rows))
                loss.backward()
            value += loss.detach()
        return ranks.summed(value) / ranks.count()

    def state_dict(self) -> dict[str, Any]:
        return self.adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state)


class NumPy:
    """SGD on arrays that are the memory of the model's parameters: torch takes no part in it.

    The noise is a function of the step's seed as it is in torch, but has other bits. There is one
    rank, with all of the batch.
    """

    def __init__(
        self, model: VAE, risk: Risk, config: VAEConfig, reference: VAE | None = None
    ) -> None:
        require("numpy")
        from sqloss.models import numpy_vae

        self.train_step = numpy_vae.train_step
        self.parameters = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        self.settings: dict[str, Any] = {
            "lr": config.learning_rate,
            "df": config.df if config.prior == "t" else None,
            "alpha": risk.tail_alpha or 0.0,
            "tail_term": config.tail_term,
            "beta": config.beta,
        }

    def step(self, batch: Batch, seed: Tensor) -> float:
        x, bits = batch.x.flatten(1).numpy(), int(seed) % 2**64  # NumPy's seeds have no sign
        return self.train_step(self.parameters, x, bits, **self.settings)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError("the state of an optimiser that SGD does not have")


def tail_pays(flops: int, alpha: float) -> bool:
    """Whether backward through the tail alone takes less time, on a CPU.

    Backward costs twice what forward costs, its ``flops``. So a step on all images costs 3 of
    these, and one on the tail 1 + 3 (1 - alpha), and what is spent on finding the tail.
    """
    return (2 - 3 * (1 - alpha)) * flops > FLOPS_TO_FIND_TAIL


Begin = Callable[[VAE, Risk, VAEConfig, VAE | None], Backend]
BACKENDS: dict[str, Begin] = {"torch": Torch, "numpy": NumPy}
