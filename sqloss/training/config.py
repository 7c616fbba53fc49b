"""What every run is: hyper-parameters with their defaults, their meaning and their valid range.

The settings of a configuration are flags of the command line and keys of ``config.json``.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from sqloss.common import ranks
from sqloss.common.errors import UserError
from sqloss.common.files import expanded
from sqloss.common.flags import (
    LARGEST,
    as_flag,
    choice,
    configure,
    expect,
    expect_whole,
    flag,
    flat,
    renamed,
    settings_chosen,
    settings_of,
)
from sqloss.datasets import DATASETS, Place, Source
from sqloss.datasets.imbalance import parse_imbalance
from sqloss.training.group_samplers import Communities as Communities  # these register too
from sqloss.training.risks import RISKS, CVaR, Mean, Risk
from sqloss.training.samplers import SAMPLERS, Sampler

METRIC_ALPHA = 0.8  # of the tail reported where training has none
THREADS_PER_CPU = 16  # more than anyone has a use for, and few enough to be made
SINGLE_THREADED_PIXELS = 16 * 16  # the digits, at 8 x 8, are no slower with one thread
MOST_WORKERS = 256  # threads
FORMAT = 3  # of config.json; runs of before there was a format have none
STANDARD = "standard"  # the model that is trained on the mean


@dataclass(frozen=True)
class RunConfig:
    """The hyper-parameters that runs of every command have, valid by construction."""

    command: ClassVar[str]
    paths: ClassVar[tuple[str, ...]] = ()  # the settings that name files and folders
    of_machine: ClassVar[tuple[str, ...]] = ("device", "threads")
    """The settings of where and how it is computed, not of what."""
    more_may_change: ClassVar[tuple[str, ...]] = ()
    """On resuming, beside those of the machine and the epochs."""

    risk: Risk = choice(RISKS, "cvar", "what is minimised of the losses of a batch", since=1)
    no_baseline: bool = flag(
        False, "train no standard model beside the one of the risk", formerly="alone"
    )
    sampling: Sampler = choice(
        SAMPLERS,
        "shuffle",
        "an epoch is " + ", or ".join(f"{each.about} ({name})" for name, each in SAMPLERS.items()),
    )
    epochs: int = flag(200, "passes over the training data", metavar="N")
    batch_size: int = flag(128, "samples per step, of all processes together", metavar="N")
    seed: int = flag(0, "seed of everything random", metavar="N")
    device: str = flag("auto", "auto, cpu or cuda; auto is cuda where there is one")
    threads: int = flag(
        0, "CPU threads; 0: torch's own choice, or 1 for images of up to 256 values", metavar="N"
    )
    checkpoint_every: int = flag(1, "epochs between checkpoints", metavar="N")

    @classmethod
    def may_change(cls) -> tuple[str, ...]:
        """The settings that do not make a run that is resumed another run."""
        return ("epochs", *cls.of_machine, *cls.more_may_change)

    def __post_init__(self) -> None:
        self._expect_choices()
        if self.no_baseline and self.risk.is_mean:
            raise UserError(
                f"{as_flag('no_baseline')}: expected another risk than the mean with it, got "
                f"{self.risk.flags}"
            )
        if self.risk.name == STANDARD:
            raise UserError(
                f"{as_flag('risk')}: expected another name than that of the {STANDARD} model"
            )
        expect_whole(self, 1, "epochs", "batch_size", "checkpoint_every")
        for name in ("seed", "threads"):
            self._expect(name, getattr(self, name) >= 0, "a whole number from 0 up")

    def _expect_choices(self) -> None:
        for each in dataclasses.fields(self):
            choices = each.metadata.get("choices")
            if choices:
                value = getattr(self, each.name)
                self._expect(each.name, value in choices, f"one of {', '.join(choices)}")

    def _expect(self, name: str, valid: bool, expected: str) -> None:
        expect(self, name, valid, expected)

    @property
    def risks(self) -> dict[str, Risk]:
        """The models to train side by side, with the risk that each is trained on."""
        if self.risk.is_mean:
            return {STANDARD: Mean()}
        return {self.risk.name: self.risk} if self.no_baseline else self.measured_risks

    @property
    def contenders(self) -> tuple[str, ...]:
        """The models to train side by side."""
        return tuple(self.risks)

    @property
    def measured_risks(self) -> dict[str, Risk]:
        """The risks that every model is measured by: the mean, and the run's or the usual CVaR."""
        own = CVaR(METRIC_ALPHA) if self.risk.is_mean else self.risk
        return {STANDARD: Mean(), own.name: own}

    @property
    def metric_alpha(self) -> float:
        """The alpha of the tail that is measured, which even a mean-trained model has."""
        return self.risk.tail_alpha or METRIC_ALPHA

    @property
    def torch_device(self) -> torch.device:
        cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        here = ["cpu", "cuda", *cuda] if cuda else ["cpu"]
        self._expect(
            "device", self.device in ["auto", *here], f"auto or, on this machine, {', '.join(here)}"
        )
        return torch.device(self.best_device if self.device == "auto" else self.device)

    @property
    def cpu_threads(self) -> int:
        """The threads asked for, where this machine can be asked for them."""
        most = THREADS_PER_CPU * (os.cpu_count() or 1)
        self._expect("threads", self.threads <= most, f"at most {most} on this machine")
        return self.threads

    def check_machine(self) -> None:
        """Raise for a device, or for threads, that this machine has not."""
        _ = self.torch_device, self.cpu_threads

    def check_ranks(self) -> None:
        """Raise for what several ranks cannot train, or not so."""
        count = ranks.count()
        if count == 1:
            return
        if self.uses_numpy:
            raise UserError(
                f"--backend: expected torch with several processes, got numpy with {count}"
            )
        if self.batch_size < count:
            raise UserError(
                f"{as_flag('batch_size')}: expected a sample at least for each of {count} "
                f"processes, got {self.batch_size}"
            )
        if ":" in self.device:
            raise UserError(
                f"{as_flag('device')}: expected auto, cpu or cuda with several processes, each of "
                f"which has a GPU of its own, got {self.device}"
            )
        if self.torch_device.type == "cuda" and ranks.local() >= torch.cuda.device_count():
            raise UserError(
                f"{as_flag('device')}: expected a GPU for every process of a machine, or cpu, got "
                f"{torch.cuda.device_count()} and a process with the number {ranks.local()}"
            )

    @property
    def title(self) -> str:
        """The name of the run's directory, without the time."""
        return self.command

    def check_place(self, directory: Path) -> None:
        """Raise for a directory where what is written would be read as data."""

    def is_of_small(self, data: Any) -> bool:
        """Whether threads would only wait for one another on such samples."""
        return False

    @property
    def uses_numpy(self) -> bool:
        """Whether NumPy computes, beside torch."""
        return False

    @property
    def best_device(self) -> str:
        """The device that ``auto`` stands for."""
        return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class ImageConfig(RunConfig, Place):
    """The hyper-parameters of runs on images of classes."""

    paths: ClassVar[tuple[str, ...]] = ("data_dir", "cache_dir")
    of_machine: ClassVar[tuple[str, ...]] = (
        *RunConfig.of_machine,
        *("data_dir", "download", "workers", "cache_dir"),
    )

    dataset: Source = choice(DATASETS, "digits", "the data set")
    imbalance: str = flag(
        "0:0.1",
        "share of the training images to keep per class, like 0:0.1,cat:0.5, or none; CLASS is a "
        "name, or else a combination of attributes, like Eyeglasses=1,Male=0, or else a number "
        "from 0 up in the order of the names; a share above 0 keeps one image at least; the test "
        "images stay as they are",
        metavar="CLASS:SHARE,...",
    )
    num_samples: int = flag(10_000, "generated images to classify for the report", metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_whole(self, 1, "num_samples")
        expect_whole(self, 0, "image_size", "train_limit")
        in_range = 0 <= self.workers <= MOST_WORKERS
        self._expect("workers", in_range, f"a whole number from 0 to {MOST_WORKERS}")
        parse_imbalance(self.imbalance)

    @property
    def title(self) -> str:
        return f"{self.command}-{self.dataset.name}"

    @property
    def classifier_file(self) -> Path | None:
        """The file of the classifier that judges the samples, where one is kept."""
        return None

    def is_of_small(self, data: Any) -> bool:
        return bool(math.prod(data.shape) <= SINGLE_THREADED_PIXELS)

    def check_place(self, directory: Path) -> None:
        self.dataset.check_output(self, directory)


Config = TypeVar("Config", bound=RunConfig)


def parse_sizes(name: str, text: str) -> tuple[int, ...]:
    """The sizes that a flag names: "512,256" is (512, 256)."""
    try:
        sizes = tuple(map(int, text.split(",")))
    except ValueError:
        sizes = (0,)
    if not all(1 <= size <= LARGEST for size in sizes):
        raise UserError(
            f"{as_flag(name)}: expected whole numbers from 1 to {LARGEST}, such as 400 or "
            f"512,256, got {text}"
        )
    return sizes


def to_stored(config: RunConfig) -> dict[str, Any]:
    """The content of ``config.json``: paths are absolute, so any working directory can resume."""
    named = {name: getattr(config, name) for name in config.paths}
    absolute = {name: str(expanded(path).absolute()) for name, path in named.items() if path}
    return {"format": FORMAT, "command": config.command} | flat(config) | absolute


def from_stored(values: Mapping[str, Any], kind: type[Config]) -> Config:
    """The configuration that a ``config.json`` stores.

    A setting that was renamed has its name of today. One that did not exist yet has the value that
    does what the run did.
    """
    values = dict(values)
    for former, name in renamed(kind).items():
        if former in values and name not in values:
            values[name] = values.pop(former)
    version = values.pop("format", 0)
    if version not in range(FORMAT + 1):
        raise UserError(
            f"expected a run of a format up to {FORMAT}, got {version!r}, of a later sqloss"
        )
    if values.get("command", kind.command) != kind.command:
        raise UserError(
            f"expected a run of sqloss {kind.command}, got one of sqloss {values['command']}"
        )
    settings = settings_of(kind)
    older: dict[str, Any] = {}
    for setting in settings.values():
        older |= setting.in_format(version)
    chosen = settings_chosen(kind, older | values)
    if version == 0:  # when there were the settings of all that might be chosen
        values = {k: v for k, v in values.items() if k in chosen or k not in settings}
    older = {name: value for name, value in older.items() if name in chosen}
    if differing := (older | values).keys() ^ {"command", *chosen}:
        listed = ", ".join(sorted(differing))
        raise UserError(f"missing or unknown in this version of sqloss: {listed}")
    del values["command"]
    for name, value in values.items():
        if not settings[name].takes(value):
            raise UserError(f"{name}: expected {settings[name].type.__name__}, got {value!r}")
    return configure(kind, **older | values)
