"""What takes the steps of a training: torch, or NumPy with the backward pass written by hand."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sqloss.models import VAE
from sqloss.training import ranks
from sqloss.training.errors import require
from sqloss.training.vae.config import VAEConfig


class Backend(Protocol):
    """Trains one model, in place."""

    def step(self, x: Tensor, seed: Tensor, rows: Tensor) -> Tensor | float:
        """One step on pixels [B, *data_shape], these rows of a batch; the objective before it."""

    def state_dict(self) -> dict[str, Any]:
        """What it keeps from step to step beside the model."""

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
    """Adam on what autograd makes of the model's losses."""

    def __init__(self, model: VAE, contender: str, config: VAEConfig) -> None:
        self.losses = ranks.parallel(Losses(model, config.iwae_samples))
        self.objective = config.training_objective(contender)
        self.adam = torch.optim.Adam(model.parameters(), config.learning_rate, fused=True)

    def step(self, x: Tensor, seed: Tensor, rows: Tensor) -> Tensor:
        loss = self.objective(self.losses(x, seed, rows))
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        return self.adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state)


class NumPy:
    """SGD on arrays that are the memory of the model's parameters: torch takes no part in it.

    The noise is a function of the step's seed as it is in torch, but has other bits. There is one
    rank, which has all rows.
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

    def step(self, x: Tensor, seed: Tensor, _rows: Tensor) -> float:
        bits = int(seed) % 2**64  # NumPy's seeds have no sign
        return self.train_step(self.parameters, x.flatten(1).numpy(), bits, **self.settings)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError("the state of an optimiser that SGD does not have")


BACKENDS: dict[str, Callable[[VAE, str, VAEConfig], Backend]] = {"torch": Torch, "numpy": NumPy}
