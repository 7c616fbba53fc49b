"""A *sampler* says which training samples an epoch has, and in which order.

A new sampler is a class here, with its flags as fields.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sqloss.common.errors import UserError
from sqloss.common.flags import as_flag
from sqloss.common.registry import Registry

if TYPE_CHECKING:
    from sqloss.training.loop import Training, TrainingData


class Sampler(ABC):
    """The order of an epoch."""

    name: ClassVar[str]
    """The value of ``--sampling``."""
    about: ClassVar[str]
    """The samples of an epoch, in words."""
    keeps_state: ClassVar[bool] = False
    """Whether it keeps anything in ``Training.of_sampler``, which is part of the checkpoint."""

    def check(self, data: "TrainingData", training: "Training") -> None:  # noqa: B027
        """Raise before the training what ``order`` would raise in the midst of it."""

    @abstractmethod
    def order(self, data: "TrainingData", draws: torch.Generator, training: "Training") -> Tensor:
        """The numbers of the samples of the epoch that ``training`` is about to begin, int64 [N].

        Everything random is from ``draws``, which a resumed epoch gets anew.
        """


def has_come(share: float, training: "Training") -> bool:
    """Whether the epoch about to begin lies beyond this share of the training."""
    return training.epoch >= int(share * training.epochs)


SAMPLERS: Registry[type[Sampler]] = Registry("sampler")


@SAMPLERS.register
@dataclass(frozen=True)
class Shuffle(Sampler):
    """Every sample once."""

    name: ClassVar[str] = "shuffle"
    about: ClassVar[str] = "every training image once, in random order"

    def order(self, data: "TrainingData", draws: torch.Generator, training: "Training") -> Tensor:
        return torch.randperm(len(data), generator=draws)


@SAMPLERS.register
@dataclass(frozen=True)
class Balanced(Sampler):
    """Samples drawn with replacement, as many as there are, from equally likely classes."""

    name: ClassVar[str] = "balanced"
    about: ClassVar[str] = "as many random ones, with every class as often as any other"

    def order(self, data: "TrainingData", draws: torch.Generator, training: "Training") -> Tensor:
        labels = data.labels
        if labels is None:
            raise UserError(
                f"{as_flag('sampling')}: expected data with labels for balanced, got none"
            )
        shares = 1 / torch.bincount(labels).double()
        return torch.multinomial(shares[labels], len(labels), replacement=True, generator=draws)
