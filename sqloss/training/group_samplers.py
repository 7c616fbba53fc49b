"""The samplers that need no labels: they draw more often what is rare by where it lies.

For the first share of the training an epoch is every sample once. Then the features of all samples
give groups or scores, and these the probabilities, which stay until they are to be computed anew.
What was computed is part of the checkpoint: the model has changed since.
"""

import argparse
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sqloss import groups
from sqloss.common import ranks
from sqloss.common.errors import UserError, require
from sqloss.common.flags import (
    LARGEST,
    as_flag,
    as_given,
    expect,
    expect_whole,
    flag,
    make_absolute,
)
from sqloss.groups.communities import Given
from sqloss.groups.sampler import Lifting, drawn
from sqloss.training.samplers import SAMPLERS, Sampler, has_come

if TYPE_CHECKING:
    from sqloss.training.loop import Training, TrainingData

UNSCALED = ("pixels", "components")  # features of one unit, which keep their proportions
ON_OFF = argparse.BooleanOptionalAction


@dataclass(frozen=True)
class ByFeatures(Sampler):
    """Draws with replacement, by probabilities that the features of the samples give."""

    keeps_state: ClassVar[bool] = True

    features: str = flag(
        "auto",
        "what the samplers without labels see of the samples: means (of a VAE's encoder), pixels, "
        "components (principal ones of the pixels), hidden (a discriminator's last layer), model "
        "(what the method features of a model of your own returns), or FILE.npy with a row for "
        "each training sample; auto: the first of these that the trainer has",
        since=1,
    )
    sampling_power: float = flag(
        1.0,
        "how much the samplers without labels lift: 0 nothing, 1 groups to equal shares",
        since=1,
    )
    sampling_lift: bool = flag(
        True, "never draw a common group or sample less for it", since=1, action=ON_OFF
    )
    min_draw: float = flag(
        0.0,
        "share, in [0, 1], of its draws without them that the samplers without labels leave every "
        "sample: 0.8 draws none less than 0.8 times as often",
        since=3,
    )
    sampling_from: float = flag(
        0.5,
        "share of the epochs after which a sampler without labels begins; one that has begun goes "
        "on where more epochs are asked for on resuming",
        since=1,
    )
    sampling_refresh: int = flag(
        0, "epochs after which its groups are made anew; 0: never", since=1, metavar="N"
    )

    def __post_init__(self) -> None:
        expect(self, "sampling_power", 0 <= self.sampling_power <= 100, "a number in [0, 100]")
        expect(self, "min_draw", 0 <= self.min_draw <= 1, "a number in [0, 1]")
        expect(self, "sampling_from", 0 <= self.sampling_from < 1, "a number in [0, 1)")
        refresh = self.sampling_refresh
        expect(self, "sampling_refresh", 0 <= refresh <= LARGEST, f"0 to {LARGEST} epochs")
        if self.features.endswith(".npy"):
            make_absolute(self, "features")

    @abstractmethod
    def found(self, features: Tensor, standardise: bool, seed: int) -> dict[str, Tensor]:
        """The probabilities ``p``, and what led to them, of these features, [N] each but for what
        is one per group."""

    def order(self, data: "TrainingData", draws: torch.Generator, training: "Training") -> Tensor:
        kept = training.of_sampler
        assert kept is not None
        if not kept and not has_come(self.sampling_from, training):
            return torch.randperm(len(data), generator=draws)
        due = self.sampling_refresh and kept and training.step == 0
        if not kept or (due and training.epoch - kept["epoch"] >= self.sampling_refresh):
            found = ranks.of_first(lambda: self.found_in(data, training))
            kept.clear()
            kept.update(found, epoch=training.epoch)
        return drawn(kept["p"], len(data), draws)

    def check(self, data: "TrainingData", training: "Training") -> None:
        names = training.feature_names
        if self.features.endswith(".npy"):
            check_rows(features_in(self.features), data)
        elif not names or self.features not in ("auto", *names):
            there = ", ".join((*names, "FILE.npy"))
            raise UserError(
                f"{as_flag('features')}: expected one of {there} here, got {self.features}"
            )

    def found_in(self, data: "TrainingData", training: "Training") -> dict[str, Tensor]:
        """What ``found`` finds in the features that there are now."""
        name = training.feature_names[0] if self.features == "auto" else self.features
        is_file = name.endswith(".npy")
        features = features_in(name) if is_file else training.features(name, data).detach().cpu()
        check_rows(features, data)
        return self.found(features, name not in UNSCALED, training.seed)


def check_rows(features: Tensor, data: "TrainingData") -> None:
    if features.dim() != 2 or len(features) != len(data) or not features.shape[1]:
        raise UserError(
            f"{as_flag('features')}: expected a row for each of {len(data)} training samples, got "
            f"{' x '.join(map(str, features.shape))}"
        )
    if not features.isfinite().all():
        raise UserError(f"{as_flag('features')}: expected finite numbers, got NaN or infinities")


def features_in(path: str) -> Tensor:
    return from_file(path, "features").float()


def from_file(path: str, setting: str) -> Tensor:
    """The numbers of a file that a setting names."""
    numpy = require("numpy")
    try:
        return torch.from_numpy(numpy.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise UserError(f"{as_flag(setting)}: cannot read {path}: {error}") from error


@dataclass(frozen=True)
class Grouped(ByFeatures):
    """Draws by the sizes of groups."""

    min_community: int = flag(
        1, "samples a group must have to be lifted: outliers are few", since=1, metavar="N"
    )

    target_min_share: float = flag(
        0.0,
        "instead of --sampling-power: the least power at which every group that may be lifted is "
        "this share of the draws, such as 0.05, or as near to it as can be; 0: none",
        since=3,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_whole(self, 1, "min_community")
        share = self.target_min_share
        expect(self, "target_min_share", 0 <= share < 1, "a number in [0, 1)")
        if share and self.sampling_power != ByFeatures.sampling_power:
            raise UserError(
                f"{as_flag('target_min_share')}: expected no "
                f"{as_given('sampling_power', self.sampling_power)} with it, which chooses the "
                f"power, got {share}"
            )

    def lifting(self, min_stability: float = 0.0) -> Lifting:
        return Lifting(
            None if self.target_min_share else self.sampling_power,
            self.sampling_lift,
            self.min_community,
            self.min_draw,
            self.target_min_share,
            min_stability,
        )


@SAMPLERS.register
@dataclass(frozen=True)
class Communities(Grouped):
    """By communities of the graph of nearest neighbours."""

    name: ClassVar[str] = "communities"
    about: ClassVar[str] = "as many random ones, with small communities of neighbours more often"

    neighbours: int = flag(
        10, "nearest neighbours that a sample is joined to", since=1, metavar="N"
    )
    resolution: float = flag(1.0, "larger: more and smaller communities", since=1)
    merge_overlap: float = flag(
        1.0,
        "share, in (0, 1], of --resolution: communities that one so coarse would join are joined, "
        "as the halves of a class, unless one has less than a third of the mean size; 1: none",
        since=3,
    )
    min_stability: float = flag(
        0.5,
        "share, in [0, 1], of a community that must come back when they are found anew, under "
        "other seeds, neighbours and samples, for it to be lifted; 0: all are, in a fifth of the "
        "time",
        since=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_whole(self, 1, "neighbours")
        expect(self, "resolution", 0 < self.resolution <= 1e6, "a number in (0, 1e6]")
        expect(self, "merge_overlap", 0 < self.merge_overlap <= 1, "a number in (0, 1]")
        expect(self, "min_stability", 0 <= self.min_stability <= 1, "a number in [0, 1]")

    def found(self, features: Tensor, standardise: bool, seed: int) -> dict[str, Tensor]:
        given = Given(self.neighbours, self.resolution, self.merge_overlap, seed, standardise)
        return self.lifting(self.min_stability).of_communities(self.name, features, given)


@SAMPLERS.register
@dataclass(frozen=True)
class Clusters(Grouped):
    """By clusters of k-means: a control."""

    name: ClassVar[str] = "clusters"
    about: ClassVar[str] = "with small clusters of k-means more often"

    clusters: int = flag(50, "centres of --sampling clusters", since=1, metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "clusters", 1 <= self.clusters <= LARGEST, f"from 1 to {LARGEST}")

    def found(self, features: Tensor, standardise: bool, seed: int) -> dict[str, Tensor]:
        return self.lifting().of_groups(
            groups.clusters(features, count=self.clusters, seed=seed, standardise=standardise)
        )


@dataclass(frozen=True)
class Scored(ByFeatures):
    """Draws by scores of rarity."""

    @abstractmethod
    def scores(self, features: Tensor, standardise: bool) -> Tensor:
        """Of each of these features, [N]: larger where it is rarer."""

    def found(self, features: Tensor, standardise: bool, seed: int) -> dict[str, Tensor]:
        scores = self.scores(features, standardise)
        p = groups.score_probabilities(
            scores, self.sampling_power, lift=self.sampling_lift, min_draw=self.min_draw
        )
        return {"p": p, "scores": scores}


@SAMPLERS.register
@dataclass(frozen=True)
class Leverage(Scored):
    """By ridge leverage scores: a control."""

    name: ClassVar[str] = "leverage"
    about: ClassVar[str] = "with what others explain least more often"

    def scores(self, features: Tensor, standardise: bool) -> Tensor:
        return groups.leverage(features, standardise=standardise)


@SAMPLERS.register
@dataclass(frozen=True)
class Density(Scored):
    """By the distance to the tenth neighbour: a control."""

    name: ClassVar[str] = "density"
    about: ClassVar[str] = "with what lies far from others more often"

    def scores(self, features: Tensor, standardise: bool) -> Tensor:
        return groups.density(features, standardise=standardise)
