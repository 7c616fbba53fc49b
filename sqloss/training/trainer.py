"""A *trainer* is one object: what a kind of training has of its own, from its flags to its report.

``register`` gives it a command, ``--resume``, sweeps, ranks and reports. No other table knows it.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from torch import Generator, Tensor

from sqloss.common.errors import require
from sqloss.common.flags import as_flag, as_text
from sqloss.common.registry import Registry
from sqloss.models.mixture import Mixture
from sqloss.training.config import Config
from sqloss.training.loop import Training
from sqloss.training.run import Run

Report = dict[str, Any]
Settings = Mapping[str, Any]  # of a configuration, flat
State = TypeVar("State", bound=Training)


class Metric(NamedTuple):
    """A number of one model in a report, and how it is shown."""

    label: str
    digits: int
    better: str  # "lower", "higher", or "" where neither is
    value: Callable[[Report, Report], float | None]  # of the report, and its part on the model
    of_tail: bool = False  # the tail at the run's own alpha


class Latents(NamedTuple):
    """What images are generated from."""

    prior: Mixture | None = None  # None: the model's own
    temperature: float = 1.0  # scales the standard deviations


class Drawn(NamedTuple):
    """A batch of generated images."""

    images: Tensor  # pixels [B, C, H, W]
    made_of: dict[str, Tensor]  # by name, [B]: what is known of each


class Preset(NamedTuple):
    """Named configurations to sweep over, and the settings of all of them unless others are
    given."""

    base: Settings
    arms: Mapping[str, Settings]


def arm_name(settings: Settings) -> str:
    return ", ".join(f"{as_flag(name)[2:]}={as_text(v)}" for name, v in settings.items())


def product(values: Mapping[str, Sequence[Any]]) -> dict[str, Settings]:
    """A named configuration for every combination of values of these settings."""
    combinations = itertools.product(*values.values())
    arms = [dict(zip(values, combination, strict=True)) for combination in combinations]
    return {arm_name(arm): arm for arm in arms}


class Trainer(ABC, Generic[Config, State]):
    """A kind of training, as the commands use it."""

    name: ClassVar[str]
    """The name of its command."""
    about: ClassVar[str]
    """The purpose of its command, for the help."""
    config: type[Config]
    modules: ClassVar[tuple[str, ...]] = ("matplotlib.figure", "scipy.stats")
    """The modules that its report imports."""
    smaller: ClassVar[str] = "a smaller --batch-size"
    """The flags that may help where memory is short: "a smaller --batch-size or --width"."""

    reporting: ClassVar[str] = "now for the report"
    """What is told when the report begins."""
    metrics: ClassVar[Mapping[str, Metric]] = {}
    """The metrics that sweeps read from its reports."""
    main_metrics: ClassVar[Sequence[str]] = ()
    """The metrics of a sweep's table; the best row is chosen by the first."""
    presets: ClassVar[Mapping[str, Preset]] = {}
    has_samples: ClassVar[bool] = False
    """Whether ``samples`` has images for the picture of a sweep."""
    not_swept: ClassVar[tuple[str, ...]] = ("seed",)
    """Settings that runs to be compared must share, or that have a flag of their own."""

    priors: ClassVar[tuple[str, ...]] = ()
    """The distributions that ``draw`` can draw latents from; () where no model makes images."""

    @abstractmethod
    def load(self, config: Config) -> Any:
        """The data of a run, before any change by its configuration."""

    def data_settings(self) -> Collection[str]:
        """The settings that ``load`` reads."""
        return ()

    @abstractmethod
    def training_data(self, whole: Any, config: Config) -> Any:
        """The data to train and test on, on the run's device."""

    @abstractmethod
    def describe(self, whole: Any, data: Any) -> str:
        """The data in a line."""

    @abstractmethod
    def begin(self, config: Config, data: Any) -> State:
        """A training at its beginning, on the device of the data."""

    @abstractmethod
    def report(self, run: "Run[Config]") -> Report:
        """Measure and draw what a run has come to, in its directory; ``report.json`` is last."""

    @abstractmethod
    def tables(self, report: Report) -> str:
        """The numbers of a report, as Markdown that a terminal shows well too."""

    def closing_words(self, report: Report) -> list[str]:
        """Lines to print after the tables of the report."""
        return []

    def check(self, config: Config) -> None:
        """Raise before the training what the report would raise after it."""
        for module in self.modules:
            require(module)

    def check_data(self, whole: Any, config: Config) -> None:
        """Raise before the training what the report would raise of these data."""

    def shared_settings(self, directory: Path, settings: Settings) -> Settings:
        """Settings that all runs of a sweep in a directory share, beside the given ones."""
        return {}

    def prepare(self, config: Config, whole: Any, seed: int) -> None:
        """Make what the runs of a sweep share; ``seed`` is that of the first."""

    def samples(self, config: Config, whole: Any, directory: Path) -> Mapping[str, Tensor]:
        """Images by each model of a finished run, of the noise of its seed, for a sweep's picture.

        None where the run has no checkpoint, or the trainer no such picture.
        """
        return {}

    def draw(
        self, training: State, name: str, count: int, draws: Generator, latents: Latents
    ) -> Iterator[Drawn]:
        """``count`` images by a model, in batches, where there are ``priors``."""
        return iter(())

    def warning(self, row: Mapping[str, Any]) -> str:
        """What was wrong with a model, from its row of a sweep; "" where nothing was."""
        return ""

    def caption(self, row: Mapping[str, Any]) -> str:
        """The caption of a model's images, from its row of the sweep."""
        return ""


TRAINERS: Registry[Trainer[Any, Any]] = Registry("trainer")
