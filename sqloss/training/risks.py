"""A *risk* turns a vector of losses into the scalar to train on: their mean, or their tail.

Any model whose losses are per sample can be trained on any risk: the model never averages, and the
risk never knows the model. A new risk is a class here, with its flags as fields.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

import sqloss
from sqloss import distributed
from sqloss.common import ranks
from sqloss.common.flags import as_given, expect, flag, in_flags
from sqloss.common.registry import Registry

if TYPE_CHECKING:
    from sqloss.training.loop import Training, TrainingData


class Risk(ABC):
    """A function from the losses of a batch to the scalar to minimise."""

    name: ClassVar[str]
    """The value of ``--risk``, and the name of the models trained on it."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What it needs of the samples beside their losses, of ``Training.gives``."""
    keeps_state: ClassVar[bool] = False
    """Whether what a model is trained on has a state, which is part of the checkpoint."""

    @property
    @abstractmethod
    def words(self) -> str:
        """Its value in words, as in "CVaR 0.8" of the losses."""

    @property
    def flags(self) -> str:
        """The flags that choose it, in short."""
        return in_flags(self) or as_given("risk", self.name)

    @property
    def is_mean(self) -> bool:
        """Whether it is the plain mean, which the standard model is trained on."""
        return False

    @property
    def tail_alpha(self) -> float | None:
        """The alpha of the tail that all of the gradient comes from, if it is such a tail's mean.

        Then backward may take the samples of this tail alone.
        """
        return None

    def check(self, data: "TrainingData", training: "Training") -> None:  # noqa: B027
        """Raise before the training what would be raised in the midst of it."""

    def of_model(self) -> "Risk":
        """What one model is trained on: with a state of its own, where the risk keeps any."""
        return self

    def start_epoch(  # noqa: B027
        self, order: Tensor, data: "TrainingData", training: "Training"
    ) -> None:
        """Be ready for the epoch that has the samples of these numbers, int64 [N]."""

    def described(self) -> dict[str, Any]:
        """What a model was trained on in the end, for the report: ``since_epoch`` and ``groups``,
        where it has any."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError("the state of a risk that keeps none")

    @abstractmethod
    def __call__(self, losses: Tensor, **needed: Tensor) -> Tensor:
        """The scalar, from losses [N] and what ``needs`` names, each [N]."""

    def over_ranks(self, losses: Tensor, **needed: Tensor) -> Tensor:
        """The risk of the losses of all ranks; each rank gives its own losses."""
        everywhere = {name: ranks.gathered(values) for name, values in needed.items()}
        return self(ranks.gathered(losses), **everywhere)

    def weights(self, losses: Tensor, **needed: Tensor) -> Tensor:
        """The weight of each loss, [N]: the gradient of the risk."""
        at = losses.detach().requires_grad_()
        return torch.autograd.grad(self(at, **needed), at)[0]


Kind = TypeVar("Kind", bound=Risk)


class OfModel(Risk, Generic[Kind]):
    """What one model is trained on by a risk that changes while it trains."""

    def __init__(self, risk: Kind) -> None:
        self.risk = risk

    @property
    def words(self) -> str:
        return self.risk.words

    @property
    def flags(self) -> str:
        return self.risk.flags


RISKS: Registry[type[Risk]] = Registry("risk")


@RISKS.register
@dataclass(frozen=True)
class CVaR(Risk):
    """The superquantile: the mean of the worst 1 - alpha share of the losses."""

    name: ClassVar[str] = "cvar"

    alpha: float = flag(
        0.8,
        "confidence level of --risk cvar: train on the mean of the worst 1-ALPHA share of a batch, "
        "beside a standard model trained on the mean; 0: the standard model only; of --risk group: "
        "on the worst 1-ALPHA share of the groups; 0: all groups alike",
    )

    def __post_init__(self) -> None:
        expect(self, "alpha", 0 <= self.alpha < 1, "a number in [0, 1)")

    @property
    def words(self) -> str:
        return "mean" if self.is_mean else f"CVaR {self.alpha:g}"

    @property
    def is_mean(self) -> bool:
        return self.alpha == 0

    @property
    def tail_alpha(self) -> float | None:
        return None if self.is_mean else self.alpha

    def __call__(self, losses: Tensor, **needed: Tensor) -> Tensor:
        # The literal mean, so that alpha = 0 is bit for bit the plain training
        return losses.mean() if self.is_mean else sqloss.cvar(losses, self.alpha)

    def over_ranks(self, losses: Tensor, **needed: Tensor) -> Tensor:
        if ranks.count() == 1:
            return self(losses)
        return distributed.cvar(losses, self.alpha)


@RISKS.register
@dataclass(frozen=True)
class Mean(Risk):
    """The mean, which trains the standard model only."""

    name: ClassVar[str] = "mean"
    words: ClassVar[str] = "mean"

    @property
    def is_mean(self) -> bool:
        return True

    def __call__(self, losses: Tensor, **needed: Tensor) -> Tensor:
        return losses.mean()

    def over_ranks(self, losses: Tensor, **needed: Tensor) -> Tensor:
        return CVaR(0.0).over_ranks(losses)


@RISKS.register
@dataclass(frozen=True)
class TopK(Risk):
    r"""The mean of the least losses, of a share of them that falls from epoch to epoch.

    In epoch :math:`e`, from 0 up, it is of the share :math:`\max(\gamma^e, \nu)`, where
    :math:`\gamma` is ``topk_decay`` and :math:`\nu` is ``topk_share``: at first of all losses. By
    itself it is that of the final share. A generator's least losses are those of the images that
    the discriminator takes for the most real. The others are thrown away, as their gradients lead
    away from the data more often.

    Source: S. Sinha et al., "Top-k training of GANs: improving GAN performance by throwing away bad
    samples", NeurIPS 2020.
    """

    name: ClassVar[str] = "topk"

    topk_share: float = flag(
        0.5, "share of the batch, that of the least losses, that --risk topk comes to", since=3
    )
    topk_decay: float = flag(
        0.99, "what the share of --risk topk is multiplied by after every epoch", since=3
    )

    def __post_init__(self) -> None:
        for name in ("topk_share", "topk_decay"):
            expect(self, name, 0 < getattr(self, name) <= 1, "a number in (0, 1]")

    @property
    def words(self) -> str:
        return f"mean of the least {self.topk_share:g}"

    def of_model(self) -> "AnnealedTopK":
        return AnnealedTopK(self)

    def __call__(self, losses: Tensor, **needed: Tensor) -> Tensor:
        return least_mean(losses, self.topk_share)


class AnnealedTopK(OfModel[TopK]):
    """That of the epoch under way."""

    name = TopK.name
    share = 1.0

    def start_epoch(self, order: Tensor, data: "TrainingData", training: "Training") -> None:
        self.share = max(self.risk.topk_decay**training.epoch, self.risk.topk_share)

    def __call__(self, losses: Tensor, **needed: Tensor) -> Tensor:
        return least_mean(losses, self.share)


def least_mean(losses: Tensor, share: float) -> Tensor:
    """The mean of this share of the losses, of the least; a part of one counts in part."""
    return -sqloss.cvar(-losses, tail_fraction=share)
