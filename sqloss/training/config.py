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

from sqloss.models.vae import ARCHITECTURES, GREATEST_DF, LEAST_DF, PRIORS
from sqloss.training.data import READERS, Source, parse_imbalance
from sqloss.training.errors import UserError
from sqloss.training.risk import TAILS, Objective, objective_name, vae_objective

DEFAULT_LR = {"torch": 1e-3, "numpy": 1e-2}  # of Adam, and of SGD; the keys are the backends
SMALLEST_DF = 0.5  # for which the sampling is made
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
    backend: str = flag(
        "torch",
        "torch trains with Adam; numpy trains a dense VAE with SGD, and with its backward pass "
        "written by hand",
        choices=tuple(DEFAULT_LR),
    )
    lr: float = flag(
        0.0,
        "learning rate; 0: "
        + ", ".join(f"{lr:g} with --backend {name}" for name, lr in DEFAULT_LR.items()),
    )
    architecture: str = flag(
        "mlp",
        "dense layers only, or convolutions between them and the image",
        choices=ARCHITECTURES,
    )
    hidden: str = flag(
        "400",
        "units of the dense hidden layers, from the image's side, like 400 or 512,256; the "
        "decoder mirrors them",
        metavar="N,...",
    )
    channels: str = flag(
        "32,64",
        "channels of the convolutions of --architecture conv, from the image's side; each halves "
        "the image",
        metavar="N,...",
    )
    latent: int = flag(20, "latent dimensions", metavar="N")
    prior: str = flag(
        "normal",
        "distribution of the latent variables: of the prior and of the encoder's posterior",
        choices=PRIORS,
    )
    df: float = flag(
        5.0,
        "degrees of freedom of --prior t; where they are learnt, at the start; at 1 or less the "
        "-ELBO has no finite mean",
    )
    learn_df: bool = flag(
        False, f"learn one df of --prior t, between {LEAST_DF:g} and {GREATEST_DF:g}"
    )
    iwae_samples: int = flag(
        0,
        "train on the importance-weighted bound of K draws per image; 1: the ELBO with its KL "
        "sampled too; 0: the ELBO",
        metavar="K",
    )
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
        self._expect(
            "architecture",
            self.architecture in ARCHITECTURES,
            f"one of {', '.join(ARCHITECTURES)}",
        )
        self._expect("prior", self.prior in PRIORS, f"one of {', '.join(PRIORS)}")
        self._expect("alpha", 0 <= self.alpha < 1, "a number in [0, 1)")
        self._expect("lr", 0 <= self.lr < math.inf, "a number from 0 up")
        self._expect("beta", 0 <= self.beta < math.inf, "a number from 0 up")
        self._check_df()
        self._check_iwae()
        self._check_backend()
        for name in ("epochs", "batch_size", "latent", "num_samples", "checkpoint_every"):
            in_range = 1 <= getattr(self, name) <= LARGEST
            self._expect(name, in_range, f"a whole number from 1 to {LARGEST}")
        for name in ("image_size", "limit", "iwae_samples"):
            in_range = 0 <= getattr(self, name) <= LARGEST
            self._expect(name, in_range, f"a whole number from 0 to {LARGEST}")
        for name in ("seed", "threads"):
            self._expect(name, getattr(self, name) >= 0, "a whole number from 0 up")
        parse_imbalance(self.imbalance)
        parse_sizes("hidden", self.hidden)
        parse_sizes("channels", self.channels)
        self._refuse_without_effect()

    def _check_df(self) -> None:
        self._expect(
            "df",
            SMALLEST_DF <= self.df <= GREATEST_DF,
            f"a number from {SMALLEST_DF:g} to {GREATEST_DF:g} (the limit is --prior normal)",
        )
        if self.learn_df:
            if self.prior != "t":
                raise UserError(
                    f"--learn-df: expected --prior t, whose df it learns, got --prior {self.prior}"
                )
            between = f"a number between {LEAST_DF:g} and {GREATEST_DF:g} with --learn-df"
            self._expect("df", LEAST_DF < self.df < GREATEST_DF, between)

    def _check_backend(self) -> None:
        self._expect("backend", self.backend in DEFAULT_LR, f"one of {', '.join(DEFAULT_LR)}")
        if self.backend == "numpy":
            self._expect("architecture", self.architecture == "mlp", "mlp with --backend numpy")
            if self.learn_df:
                raise UserError("--learn-df: expected --backend torch with it, got --backend numpy")
            self._expect("iwae_samples", self.iwae_samples == 0, "0 with --backend numpy")
            on_cpu = self.device in ("auto", "cpu")
            self._expect("device", on_cpu, "auto or cpu with --backend numpy")

    def _check_iwae(self) -> None:
        if self.iwae_samples:
            terms = "with --iwae-samples, whose bound is not a sum of reconstruction and KL"
            self._expect("tail", self.tail == "elbo", f"elbo {terms}")
            self._expect("beta", self.beta == 1, f"1 {terms}")

    def _refuse_without_effect(self) -> None:
        """Whoever sets a flag of another prior or architecture believes to have chosen that."""
        for name, choice, needed in (("df", "prior", "t"), ("channels", "architecture", "conv")):
            chosen = getattr(self, choice)
            if chosen != needed and getattr(self, name) != getattr(Config, name):
                raise UserError(
                    f"{as_flag(name)}: expected {as_flag(choice)} {needed} with it, "
                    f"got {as_flag(choice)} {chosen}"
                )

    def _expect(self, name: str, valid: bool, expected: str) -> None:
        expect(self, name, valid, expected)

    @property
    def contenders(self) -> tuple[str, ...]:
        """The models to train side by side; each is trained on the objective of its name."""
        return ("standard", "cvar") if self.alpha > 0 else ("standard",)

    @property
    def learning_rate(self) -> float:
        """That asked for, or the backend's own."""
        return self.lr or DEFAULT_LR[self.backend]

    @property
    def alphas(self) -> dict[str, float]:
        """The confidence levels of the objectives."""
        return {"standard": 0.0, "cvar": self.metric_alpha}

    @property
    def objectives(self) -> dict[str, Objective]:
        """What is measured of every model; that of the tail also where none is trained on it."""
        return {name: vae_objective(alpha, *self._bound) for name, alpha in self.alphas.items()}

    @property
    def objective_names(self) -> dict[str, str]:
        """The objectives in words."""
        return {name: objective_name(alpha, *self._bound) for name, alpha in self.alphas.items()}

    @property
    def _bound(self) -> tuple[str, float, int]:
        return self.tail, self.beta, self.iwae_samples

    @property
    def metric_alpha(self) -> float:
        """The alpha of the tail that is measured, which even a mean-trained model has."""
        return self.alpha or METRIC_ALPHA

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """The units of the dense hidden layers."""
        return parse_sizes("hidden", self.hidden)

    @property
    def channel_sizes(self) -> tuple[int, ...]:
        """The channels of the convolutions."""
        return parse_sizes("channels", self.channels)

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
        best = "cuda" if cuda and self.backend == "torch" else "cpu"
        return torch.device(best if self.device == "auto" else self.device)

    @property
    def cpu_threads(self) -> int:
        """The threads asked for, where this machine can be asked for them."""
        most = THREADS_PER_CPU * (os.cpu_count() or 1)
        self._expect("threads", self.threads <= most, f"at most {most} on this machine")
        return self.threads


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
