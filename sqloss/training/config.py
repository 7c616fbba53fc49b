"""What a run is: every hyper-parameter with its default, its meaning and its valid range.

The fields are the flags of the command line and the keys of ``config.json``.
"""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch

from sqloss.training.data import READERS, Source, parse_imbalance
from sqloss.training.errors import UserError
from sqloss.training.risk import TAILS, Objective, objective_name, vae_objective

METRIC_ALPHA = 0.8  # of the tail reported where training has none
LARGEST = 2**31 - 1  # of the numbers that become sizes of tensors
THREADS_PER_CPU = 16  # more than anyone has a use for, and few enough to be made


def flag(default: Any, meaning: str, **options: Any) -> Any:
    """A field that is a flag: ``options`` go to argparse."""
    return field(default=default, metadata={"help": meaning, **options})


@dataclass(frozen=True)
class Config:
    """The hyper-parameters of a run, valid by construction."""

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
        "share of the training images to keep per class, like 0:0.1,3:0.5, or none; a share "
        "above 0 keeps one image at least; the test images stay as they are",
        metavar="CLASS:SHARE,...",
    )
    alpha: float = flag(
        0.8,
        "confidence level: train on the mean of the worst 1-ALPHA share of a batch, beside a "
        "standard model trained on the mean; 0: the standard model only",
    )
    tail: str = flag(
        "elbo",
        "take the tail of the whole negative ELBO, or of its reconstruction term only",
        choices=TAILS,
    )
    epochs: int = flag(200, "passes over the training images", metavar="N")
    batch_size: int = flag(128, "images per step", metavar="N")
    lr: float = flag(1e-3, "learning rate of Adam")
    hidden: int = flag(400, "units of the hidden layers", metavar="N")
    latent: int = flag(20, "latent dimensions", metavar="N")
    beta: float = flag(1.0, "weight of the KL term in the training objective")
    seed: int = flag(0, "seed of everything random", metavar="N")
    device: str = flag("auto", "auto, cpu or cuda; auto is cuda where there is one")
    threads: int = flag(
        0, "CPU threads; 0: torch's own choice, or 1 for images of up to 256 values", metavar="N"
    )
    num_samples: int = flag(10_000, "generated images to classify for the report", metavar="N")
    checkpoint_every: int = flag(1, "epochs between checkpoints", metavar="N")

    def __post_init__(self) -> None:
        self._expect("dataset", self.dataset in READERS, f"one of {', '.join(READERS)}")
        self._expect("tail", self.tail in TAILS, f"one of {', '.join(TAILS)}")
        self._expect("alpha", 0 <= self.alpha < 1, "a number in [0, 1)")
        self._expect("lr", 0 < self.lr < math.inf, "a number above 0")
        self._expect("beta", 0 <= self.beta < math.inf, "a number from 0 up")
        for name in ("epochs", "batch_size", "hidden", "latent", "num_samples", "checkpoint_every"):
            in_range = 1 <= getattr(self, name) <= LARGEST
            self._expect(name, in_range, f"a whole number from 1 to {LARGEST}")
        for name in ("image_size", "limit"):
            in_range = 0 <= getattr(self, name) <= LARGEST
            self._expect(name, in_range, f"a whole number from 0 to {LARGEST}")
        for name in ("seed", "threads"):
            self._expect(name, getattr(self, name) >= 0, "a whole number from 0 up")
        parse_imbalance(self.imbalance)

    def _expect(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise UserError(f"{as_flag(name)}: expected {expected}, got {getattr(self, name)}")

    @property
    def contenders(self) -> tuple[str, ...]:
        """The models to train side by side; each is trained on the objective of its name."""
        return ("standard", "cvar") if self.alpha > 0 else ("standard",)

    @property
    def objectives(self) -> dict[str, Objective]:
        """What is measured of every model; that of the tail also where none is trained on it."""
        return {
            "standard": vae_objective(0.0, self.tail, self.beta),
            "cvar": vae_objective(self.metric_alpha, self.tail, self.beta),
        }

    @property
    def objective_names(self) -> dict[str, str]:
        """The objectives in words."""
        return {
            "standard": objective_name(0.0, self.tail, self.beta),
            "cvar": objective_name(self.metric_alpha, self.tail, self.beta),
        }

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
        best = "cuda" if cuda else "cpu"
        return torch.device(best if self.device == "auto" else self.device)

    @property
    def cpu_threads(self) -> int:
        """The threads asked for, where this machine can be asked for them."""
        most = THREADS_PER_CPU * (os.cpu_count() or 1)
        self._expect("threads", self.threads <= most, f"at most {most} on this machine")
        return self.threads


def as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def expanded(path: str) -> Path:
    """A path as a user writes it, ``~`` included."""
    return Path(os.path.expanduser(path))


def to_stored(config: Config) -> dict[str, Any]:
    """What ``config.json`` stores, which means the same from every working directory."""
    return dataclasses.asdict(config) | {"data_dir": str(expanded(config.data_dir).absolute())}


def from_stored(values: dict[str, Any]) -> Config:
    """The configuration that a ``config.json`` stores."""
    types = get_type_hints(Config)
    if values.keys() != types.keys():
        differing = ", ".join(sorted(values.keys() ^ types.keys()))
        raise UserError(f"missing or unknown in this version of sqloss: {differing}")
    for name, value in values.items():
        # JSON writes a float that is whole as it came; a bool is an int to Python, but not here.
        allowed = (int, float) if types[name] is float else (types[name],)
        if type(value) not in allowed:
            raise UserError(f"{name}: expected {types[name].__name__}, got {value!r}")
    return Config(**values)
