"""What takes the steps of a training: torch, or NumPy with the backward pass written by hand."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from sqloss.models import VAE
from sqloss.tail import tail_backward, tail_loss
from sqloss.training.errors import require
from sqloss.training.vae.config import VAEConfig

# That take as long as what does not grow with them, such as reading the weights once more: some
# milliseconds. Measured: benchmarks/results/tail.md. The same for any number of threads, so that
# ranks with different numbers of them do the same.
FLOPS_TO_FIND_TAIL = 3 * 10**8


class Backend(Protocol):
    """Trains one model, in place."""

    def step(self, x: Tensor, seed: Tensor) -> Tensor | float:
        """One step on pixels [B, *data_shape]; the objective before it."""

    def state_dict(self) -> dict[str, Any]:
        """What it keeps from step to step beside the model."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Torch:
    """Adam on what autograd makes of the model's losses, of all images or of those of the tail."""

    def __init__(self, model: VAE, contender: str, config: VAEConfig) -> None:
        self.model = model
        self.iwae_samples = config.iwae_samples
        self.microbatch_size = config.microbatch_size
        self.objective = config.objectives[contender]
        self.adam = torch.optim.Adam(model.parameters(), config.learning_rate, fused=True)
        self.takes_tail = self._takes_tail(config)

    def _takes_tail(self, config: VAEConfig) -> bool:
        """Whether images outside the tail go without a graph."""
        if not self.objective.is_of_tail_alone or config.backward == "dense":
            return False
        if config.backward == "tail" or config.microbatch_size:
            return True
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        return on_cpu and tail_pays(self._flops(config.batch_size), self.objective.alpha)

    def _flops(self, batch_size: int) -> int:
        """Floating-point operations of forward on a batch, those of its matrix products alone."""
        from torch.utils.flop_counter import FlopCounterMode  # takes 0.1 s

        image = next(self.model.parameters()).new_zeros(1, *self.model.data_shape)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.losses(image, torch.zeros((), dtype=torch.int64))
        of_image: int = counter.get_total_flops()
        return batch_size * of_image

    def step(self, x: Tensor, seed: Tensor) -> Tensor:
        self.adam.zero_grad()
        loss = self._backward(x, seed)
        self.adam.step()
        return loss.detach()

    def _backward(self, x: Tensor, seed: Tensor) -> Tensor:
        """Leave the gradients of the objective in the parameters; its value."""
        if self.takes_tail:
            return self._backward_of_tail(x, seed)
        if self.microbatch_size:
            return self._backward_of_microbatches(x, seed)
        loss = self.objective(self.losses(x, seed))
        loss.backward()
        return loss

    def _backward_of_tail(self, x: Tensor, seed: Tensor) -> Tensor:
        def losses(x: Tensor, rows: Tensor) -> Tensor:
            return self.objective.risked(self.losses(x, seed, rows))

        rows, alpha = torch.arange(len(x), device=x.device), self.objective.alpha
        # Unchecked: the noise is that of the row and there is no batch norm, so the passes differ
        # in rounding alone, which is large only where a model has lost its footing.
        if self.microbatch_size:
            size = self.microbatch_size
            return tail_backward(losses, x, rows, alpha=alpha, chunk_size=size, check=False)
        loss = tail_loss(losses, x, rows, alpha=alpha, check=False)
        loss.backward()
        return loss

    def _backward_of_microbatches(self, x: Tensor, seed: Tensor) -> Tensor:
        """Of an objective that is a mean over the images."""
        rows = torch.arange(len(x), device=x.device)
        value = torch.zeros((), device=x.device)
        for part, of_part in zip(*(t.split(self.microbatch_size) for t in (x, rows)), strict=True):
            loss = self.objective(self.losses(part, seed, of_part)) * (len(part) / len(x))
            loss.backward()
            value += loss.detach()
        return value

    def losses(self, x: Tensor, seed: Tensor, rows: Tensor | None = None) -> dict[str, Tensor]:
        """The losses, one per sample, that the objectives are of."""
        if self.iwae_samples:
            bound = self.model.negative_iw_bound(x, seed, self.iwae_samples, rows=rows)
            return {"negative_iw_bound": bound}
        return self.model.losses(x, seed, rows=rows)

    def state_dict(self) -> dict[str, Any]:
        return self.adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state)


class NumPy:
    """SGD on arrays that are the memory of the model's parameters: torch takes no part in it.

    The noise is a function of the step's seed as it is in torch, but has other bits.
    """

    def __init__(self, model: VAE, contender: str, config: VAEConfig) -> None:
        require("numpy")
        from sqloss.models import numpy_vae

        self.train_step = numpy_vae.train_step
        self.parameters = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        self.settings: dict[str, Any] = {
            "lr": config.learning_rate,
            "df": config.df if config.prior == "t" else None,
            "alpha": config.alphas[contender],
            "tail": config.tail,
            "beta": config.beta,
        }

    def step(self, x: Tensor, seed: Tensor) -> float:
        bits = int(seed) % 2**64  # NumPy's seeds have no sign
        return self.train_step(self.parameters, x.flatten(1).numpy(), bits, **self.settings)

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


BACKENDS: dict[str, Callable[[VAE, str, VAEConfig], Backend]] = {"torch": Torch, "numpy": NumPy}
