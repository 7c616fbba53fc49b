"""What a user brings to ``train``: a model with its losses, an optimizer, callbacks."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqloss.common.errors import UserError
from sqloss.models.seeding import initialisation
from sqloss.training.config import RunConfig
from sqloss.training.custom.batches import Loader, Rows, size_of

LossesOf = Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]]


class Callback:
    """What a training tells while it runs; every method does nothing unless it is overridden."""

    def on_step(self, model: str, metrics: dict[str, float]) -> None:
        """After each step of each model: its objective. Told only to those who override it."""

    def on_epoch(self, model: str, metrics: dict[str, float]) -> None:
        """After each epoch, for each model."""

    def on_picture(self, name: str, path: Path) -> None:
        """After the training, for each picture that was drawn."""


@dataclass(frozen=True)
class Own:
    """What a user brings beside the data."""

    model: nn.Module
    losses_of: LossesOf | None  # None: the model's own method
    optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer], Any] | None
    callbacks: Sequence[Callback]
    test: Rows | Loader | None


class WithLosses(nn.Module):
    """A model whose forward pass is its losses, so that ranks may share its gradients."""

    def __init__(self, model: nn.Module, losses_of: LossesOf | None) -> None:
        super().__init__()
        self.model = model
        self.losses_of = losses_of or own_losses(model)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """By name, [B] each; ``loss`` is what the risk is of."""
        losses, size = self.losses_of(self.model, batch), size_of(batch)
        terms = {"loss": losses} if isinstance(losses, Tensor) else losses
        if not isinstance(terms, Mapping) or not terms:
            raise UserError(
                f"losses: expected a tensor or a dict of tensors, got {type(losses).__name__}"
            )
        for name, term in terms.items():
            if not isinstance(term, Tensor):
                raise UserError(f"losses: expected a tensor, got {name}, {type(term).__name__}")
            if term.shape != (size,) or not term.is_floating_point():
                raise UserError(
                    f"losses: expected one per sample, floating-point [{size}], got {name}, "
                    f"{term.dtype} {list(term.shape)}"
                )
        loss = terms["loss"] if "loss" in terms else torch.stack(list(terms.values())).sum(0)
        # DistributedDataParallel waits for all gradients that what it returns may have
        return {name: term.detach() for name, term in terms.items()} | {"loss": loss}


def own_losses(model: nn.Module) -> LossesOf:
    """The model's own method ``losses``, which ``torch.compile(model)`` is to compile too.

    What that returns compiles the forward pass alone, and has the other methods from the model.
    """
    method: Any = model.losses
    if compiler := getattr(model, "dynamo_ctx", None):  # with the options of torch.compile
        method = compiler(method)
    return lambda _, batch: method(batch)


def check_last_batch(own: Own, data: Rows, config: RunConfig) -> None:
    """Raise for a batch of one sample, where the model's batch norm cannot be trained on it.

    That of maps larger than 1 x 1 can, so a copy tries the losses of a sample.
    """
    size = config.batch_size
    has_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in own.model.modules())
    if has_norm and 1 in (size, len(data) % size):
        got = f"{size}, which leaves a batch of 1 of {len(data)} samples"
        model = copied(own.model).to(data.device).train()
        with (
            torch.no_grad(),
            initialisation(config.seed, "last batch", device=data.device),
            lone_sample_told("batch_size: expected", got),
        ):
            WithLosses(model, own.losses_of)(next(data.in_order(1)))


@contextlib.contextmanager
def lone_sample_told(expected: str, got: str) -> Iterator[None]:
    """Within it, torch's error of a batch norm that sees one value of a channel is told so."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"{expected} batches of at least 2 samples, as the model has batch norm, got {got}"
        ) from error


def make_optimizer(own: Own, model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise UserError("model: expected one with parameters to train, got none")
    optimizer = made("optimizer", own.optimizer, parameters)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(
            "optimizer: expected a function from parameters to an optimizer, got one to "
            f"{type(optimizer).__name__}"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UserError("optimizer: expected one whose step needs no closure, got LBFGS")
    given = {id(parameter) for parameter in parameters}
    if not all(id(p) in given for group in optimizer.param_groups for p in group["params"]):
        raise UserError(
            "optimizer: expected one of the parameters that the function is given, which are "
            "those of a copy of the model, got others"
        )
    return optimizer


def make_scheduler(own: Own, optimizer: torch.optim.Optimizer) -> Any:
    scheduler = made("scheduler", own.scheduler, optimizer)
    if not hasattr(scheduler, "state_dict"):
        raise UserError(
            "scheduler: expected a function from an optimizer to a scheduler, got one to "
            f"{type(scheduler).__name__}"
        )
    return scheduler


def made(argument: str, function: Any, of: Any) -> Any:
    """What a user's function makes: not the thing itself, as each model has its own."""
    if not callable(function):
        raise UserError(f"{argument}: expected a function, got {type(function).__name__}")
    return function(of)


def copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever a user's module holds
        reason = str(error).partition(".")[0]
        raise UserError(
            f"model: expected one that copy.deepcopy copies, got one that it does not ({reason})"
        ) from error


def in_words(thing: Any, *settings: Mapping[str, Any]) -> str:
    """A thing by its class and its settings that are numbers or words, but for those not set."""
    shown = [
        f"{name}={value}"
        for each in settings
        for name, value in each.items()
        if isinstance(value, int | float | str | tuple) and value is not False and name[0] != "_"
    ]
    return f"{type(thing).__name__}({', '.join(shown)})"
