"""What every run is: hyper-parameters with their defaults, their meaning and their valid range.

The fields of a configuration are flags of the command line and keys of ``config.json``.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

import torch

from sqloss.training.data import READERS, SAMPLINGS, Source, parse_imbalance
from sqloss.training.errors import UserError

METRIC_ALPHA = 0.8  # of the tail reported where training has none
LARGEST = 2**31 - 1  # of the numbers that become sizes of tensors
THREADS_PER_CPU = 16  # more than anyone has a use for, and few enough to be made


def flag(default: Any, meaning: str, **options: Any) -> Any:
    """A field that is a flag: ``options`` go to argparse."""
    return field(default=default, metadata={"help": meaning, **options})


@dataclass(frozen=True)
class RunConfig:
    """The hyper-parameters that runs of every command have, valid by construction."""

    command: ClassVar[str]
    paths: ClassVar[tuple[str, ...]] = ("data_dir",)  # the fields that name files and folders
    # On resuming: what does not make it another run.
    may_change: ClassVar[tuple[str, ...]] = ("epochs", "device", "threads", "data_dir", "download")

    dataset: str = flag("digits", "the data set", choices=tuple(READERS))
    data_dir: str = flag("data", "the folder with the data", metavar="DIR")
    download: bool = flag(False, "fetch the data set where it is missing")
    image_size: int = flag(
        0,
        "resize the central square to this many pixels a side; 0: as they are, "
        "but 32 for celeba and for folders of mixed sizes",
        metavar="PIXELS",
    )
    limit: int = flag(0, "use the first N training images; 0: all", metavar="N")
    celeba_attribute: str = flag(
        "Smiling", "the attribute that is the class of a celeba image", metavar="NAME"
    )
    imbalance: str = flag(
        "0:0.1",
        "share of the training images to keep per class, like 0:0.1,cat:0.5, or none; CLASS is a "
        "name, or, if no class has that name, a number from 0 up in the order of the names; a "
        "share above 0 keeps one image at least; the test images stay as they are",
        metavar="CLASS:SHARE,...",
    )
    sampling: str = flag(
        "shuffle",
        "an epoch is every training image once, in random order, or as many random ones with "
        "every class as often as any other (oversampling)",
        choices=SAMPLINGS,
    )
    alpha: float = flag(
        0.8,
        "confidence level: train on the mean of the worst 1-ALPHA share of a batch, beside a "
        "standard model trained on the mean; 0: the standard model only",
    )
    alone: bool = flag(False, "train no standard model beside the one of the tail")
    epochs: int = flag(200, "passes over the training images", metavar="N")
    batch_size: int = flag(128, "images per step, of all processes together", metavar="N")
    seed: int = flag(0, "seed of everything random", metavar="N")
    device: str = flag("auto", "auto, cpu or cuda; auto is cuda where there is one")
    threads: int = flag(
        0, "CPU threads; 0: torch's own choice, or 1 for images of up to 256 values", metavar="N"
    )
    num_samples: int = flag(10_000, "generated images to classify for the report", metavar="N")
    checkpoint_every: int = flag(1, "epochs between checkpoints", metavar="N")

    def __post_init__(self) -> None:
        self._expect_choices()
        self._expect("alpha", 0 <= self.alpha < 1, "a number in [0, 1)")
        if self.alone and self.alpha == 0:
            raise UserError("--alone: expected an --alpha above 0 with it, got --alpha 0")
        self._expect_whole(1, "epochs", "batch_size", "num_samples", "checkpoint_every")
        self._expect_whole(0, "image_size", "limit")
        for name in ("seed", "threads"):
            self._expect(name, getattr(self, name) >= 0, "a whole number from 0 up")
        parse_imbalance(self.imbalance)

    def _expect_choices(self) -> None:
        for each in dataclasses.fields(self):
            choices = each.metadata.get("choices")
            if choices:
                value = getattr(self, each.name)
                self._expect(each.name, value in choices, f"one of {', '.join(choices)}")

    def _expect_whole(self, least: int, *names: str) -> None:
        for name in names:
            in_range = least <= getattr(self, name) <= LARGEST
            self._expect(name, in_range, f"a whole number from {least} to {LARGEST}")

    def _expect(self, name: str, valid: bool, expected: str) -> None:
        expect(self, name, valid, expected)

    @property
    def contenders(self) -> tuple[str, ...]:
        """The models to train side by side; each is trained on the risk of its name."""
        if self.alone:
            return ("cvar",)
        return ("standard", "cvar") if self.alpha > 0 else ("standard",)

    @property
    def alphas(self) -> dict[str, float]:
        """The confidence levels of the contenders' risks."""
        return {"standard": 0.0, "cvar": self.metric_alpha}

    @property
    def metric_alpha(self) -> float:
        """The alpha of the tail that is measured, which even a mean-trained model has."""
        return self.alpha or METRIC_ALPHA

    @property
    def source(self) -> Source:
        return Source(
            data_dir=expanded(self.data_dir),
            download=self.download,
            image_size=self.image_size,
            limit=self.limit,
            celeba_attribute=self.celeba_attribute,
        )

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

    def refuse_other_machine(self) -> None:
        """Raise for a device, or for threads, that this machine has not."""
        _ = self.torch_device, self.cpu_threads

    @property
    def uses_numpy(self) -> bool:
        """Whether NumPy computes, beside torch."""
        return False

    @property
    def best_device(self) -> str:
        """What auto is."""
        return "cuda" if torch.cuda.is_available() else "cpu"


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


def expect(config: object, name: str, valid: bool, expected: str) -> None:
    """Refuse the value that a configuration has in one of its fields."""
    if not valid:
        raise UserError(f"{as_flag(name)}: expected {expected}, got {getattr(config, name)}")


def as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def expanded(path: str) -> Path:
    """A path as a user writes it, ``~`` included."""
    return Path(os.path.expanduser(path))


def to_stored(config: RunConfig) -> dict[str, Any]:
    """What ``config.json`` stores, which means the same from every working directory."""
    named = {name: getattr(config, name) for name in config.paths}
    absolute = {name: str(expanded(path).absolute()) for name, path in named.items() if path}
    return {"command": config.command} | dataclasses.asdict(config) | absolute


def from_stored(values: dict[str, Any], kind: type[Config]) -> Config:
    """The configuration that a ``config.json`` stores."""
    command = values.get("command", kind.command)
    if command != kind.command:
        raise UserError(f"expected a run of sqloss {kind.command}, got one of sqloss {command}")
    hints = get_type_hints(kind)
    types = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    differing = values.keys() ^ {"command", *types}
    if differing:
        listed = ", ".join(sorted(differing))
        raise UserError(f"missing or unknown in this version of sqloss: {listed}")
    values = {name: value for name, value in values.items() if name != "command"}
    for name, value in values.items():
        # JSON writes a float that is whole as it came; a bool is an int to Python, but not here.
        allowed = (int, float) if types[name] is float else (types[name],)
        if type(value) not in allowed:
            raise UserError(f"{name}: expected {types[name].__name__}, got {value!r}")
    return kind(**values)
