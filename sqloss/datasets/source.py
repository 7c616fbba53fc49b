"""Where data sets come from: what is registered, and the flags that all of them share."""

import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from sqloss.common.errors import UserError, require, told
from sqloss.common.files import expanded
from sqloss.common.flags import flag
from sqloss.common.registry import Registry
from sqloss.datasets.dataset import Dataset

TEST_SHARE = 0.2  # where a data set brings no split of its own
SPLIT_SEED = 0  # not the run's: runs with different seeds are tested on the same images
CACHE = ".sqloss-cache"


@dataclass(frozen=True)
class Place:
    """Where the data lie and in which form they are wanted, of whichever data set."""

    data_dir: str = flag("data", "the folder with the data", metavar="DIR")
    download: bool = flag(False, "fetch the data set where it is missing")
    image_size: int = flag(
        0,
        "resize the central square to this many pixels a side; 0: as they are, "
        "but 32 for celeba and for folders of mixed sizes",
        metavar="PIXELS",
    )
    train_limit: int = flag(
        0, "use the first N training images; 0: all", metavar="N", formerly="limit"
    )
    workers: int = flag(
        0,
        "keep the images of celeba or of a folder in a file instead of in memory, decoded once and "
        "read ahead by N threads; 0: in memory",
        metavar="N",
        since=1,
    )
    cache_dir: str = flag(
        "",
        f"the folder of the files of --workers; none: {CACHE} in --data-dir",
        metavar="DIR",
        since=1,
    )

    @property
    def root(self) -> Path:
        return expanded(self.data_dir)

    @property
    def cache(self) -> Path:
        """The folder of decoded images."""
        return expanded(self.cache_dir) if self.cache_dir else self.root / CACHE

    @property
    def first(self) -> slice:
        """The part of the training images to use."""
        return slice(self.train_limit or None)


@dataclass(frozen=True)
class Source(ABC):
    """A data set that may be chosen; its fields are flags of its own."""

    name: ClassVar[str]
    """Of ``--dataset``."""

    @abstractmethod
    def read(self, place: Place) -> Dataset:
        """The data; UserError tells what is missing, or broken, and what to do about it."""

    def check_output(self, place: Place, directory: Path) -> None:  # noqa: B027 most have no rule
        """Raise for a directory where what is written would be read as data."""


DATASETS: Registry[type[Source]] = Registry("data set")


def stratified_split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Shuffled indices of the training and of the test images, with the same shares of classes."""
    try:
        train, test = require("sklearn.model_selection").train_test_split(
            range(len(labels)), test_size=TEST_SHARE, stratify=labels, random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise UserError(
            f"--dataset folder: expected enough images for a test set of {TEST_SHARE:.0%} with "
            f"every class, got {torch.bincount(labels).tolist()} per class: {error}"
        ) from error
    return torch.tensor(train), torch.tensor(test)


def explained(
    name: str, place: Place, layout: str, download_hint: str = ""
) -> contextlib.AbstractContextManager[None]:
    """A reader's failure, whatever its exception, as where to put what or how to fetch it."""
    expected = (
        f"--dataset {name}: expected {place.root}/{layout}, as torchvision stores it "
        "(--data-dir chooses the folder; --download fetches what is missing and unpacks "
        f"archives that are there{download_hint})"
    )
    return told(Exception, lambda error: f"{expected}, got {type(error).__name__}: {error}")
