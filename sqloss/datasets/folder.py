"""Folders of images."""

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from sqloss.common.errors import UserError, told
from sqloss.common.flags import flag
from sqloss.datasets.attributes import TABLE, classes_of, read_attributes
from sqloss.datasets.cache import load_images
from sqloss.datasets.dataset import Dataset
from sqloss.datasets.images import (
    DEFAULT_SIZE,
    GREY_MODES,
    Decoding,
    image_suffixes,
    mode_and_size,
)
from sqloss.datasets.source import (
    DATASETS,
    SPLIT_SEED,
    Place,
    Source,
    stratified_split,
)
from sqloss.models.seeding import generator

# Folders that systems make beside the images, and fill with copies of them or with nothing.
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}


@dataclass(frozen=True)
class Part:
    """Image files with what is known of them."""

    files: list[Path]
    labels: Tensor
    class_names: tuple[str, ...]
    attributes: dict[str, Tensor]

    def of(self, rows: Tensor) -> "Part":
        return Part(
            [self.files[row] for row in rows],
            self.labels[rows],
            self.class_names,
            {name: has[rows] for name, has in self.attributes.items()},
        )


@DATASETS.register
@dataclass(frozen=True)
class Folder(Source):
    """Images in one folder per class, with or without a split into train/ and test/.

    With a table attributes.csv in the folder, or in both of the split, the images have attributes.
    """

    name: ClassVar[str] = "folder"
    folder_attribute: str = flag(
        "",
        f"the attribute in {TABLE} that is the class of an image, instead of the folder it is in; "
        "of several every combination is a class",
        metavar="NAME,...",
        since=1,
    )

    def read(self, place: Place) -> Dataset:
        train, test = self._split(place.root)
        modes, sizes = zip(*map(mode_and_size, train.files + test.files), strict=True)
        mode = "L" if set(modes) <= GREY_MODES else "RGB"
        size = place.image_size or (0 if len(set(sizes)) == 1 else DEFAULT_SIZE)
        width, height = sizes[0]
        decoding = Decoding.of_size(mode, height, width, size)
        count = len(train.files[place.first])
        return Dataset(
            name=self.name,
            class_names=train.class_names,
            train_images=load_images(train.files, count, decoding, place),
            train_labels=train.labels[:count],
            test_images=load_images(test.files, len(test.files), decoding, place),
            test_labels=test.labels,
            train_attributes={name: has[:count] for name, has in train.attributes.items()},
            test_attributes=test.attributes,
        )

    def check_output(self, place: Place, directory: Path) -> None:
        real = Path(os.path.realpath(directory))
        for root in image_roots(place.root):
            folders = [root]
            with contextlib.suppress(OSError):  # who reads the data tells of it
                folders += class_folders(root)  # links among them lead elsewhere
            for data in map(os.path.realpath, folders):
                parts = real.relative_to(data).parts if real.is_relative_to(data) else (".",)
                if not any(map(is_hidden, parts)):
                    raise UserError(
                        "--output-dir: expected a directory outside of the images, whose every "
                        f"folder is data, got {directory}, which is in {root}; choose another one"
                    )

    def _split(self, root: Path) -> tuple[Part, Part]:
        """What there is to train and to test on."""
        if (root / "train").is_dir() != (root / "test").is_dir():
            raise UserError(f"--dataset folder: expected train/ and test/ in {root}, got only one")
        first, *rest = map(self._part, image_roots(root))
        if not rest:
            train_rows, test_rows = stratified_split(first.labels)
            return first.of(train_rows), first.of(test_rows)
        [test] = rest
        for what, ours, theirs in (
            ("classes", first.class_names, test.class_names),
            ("attributes", tuple(first.attributes), tuple(test.attributes)),
        ):
            if sorted(ours) != sorted(theirs):
                raise UserError(
                    f"--dataset folder: expected the same {what} in {root / 'train'} and "
                    f"{root / 'test'}, got {', '.join(sorted(set(ours) ^ set(theirs)))} "
                    "in one of them only"
                )
        # By class as the folders are, the first --train-limit images would all be of one class.
        order = torch.randperm(len(first.files), generator=generator(SPLIT_SEED, "folder"))
        return first.of(order), test

    def _part(self, root: Path) -> Part:
        if not self.folder_attribute:
            files, labels, classes = image_folder(root)
            return Part(files, labels, classes, read_attributes(root, files))
        with told_of_folder(root):
            files = image_files(root)
            if not files:
                raise FileNotFoundError(f"no image ({', '.join(image_suffixes())}) in {root}")
        attributes = read_attributes(root, files)
        if not attributes:
            raise UserError(f"--folder-attribute: expected the table {root / TABLE}, got none")
        classes, labels = classes_of("--folder-attribute", self.folder_attribute, attributes)
        return Part(files, labels, classes, attributes)


def image_roots(data_dir: Path) -> list[Path]:
    """The folders that have a folder per class: train/ and test/, or the data folder itself."""
    split = [data_dir / "train", data_dir / "test"]
    return split if split[0].is_dir() else [data_dir]


def image_folder(root: Path) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    """The image files below ``root``, their labels, and the names of the classes."""
    check_is_no_run(root)
    with told_of_folder(root):
        classes = sorted(folder.name for folder in class_folders(root))
        files = [image_files(root / name) for name in classes]
        if empty := [name for name, found in zip(classes, files, strict=True) if not found]:
            raise FileNotFoundError(
                f"no image ({', '.join(image_suffixes())}) in {', '.join(empty)}"
            )
        if not classes:
            raise FileNotFoundError(f"no folder in {root}")
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(f) for f in files]))
    return list(itertools.chain.from_iterable(files)), labels, tuple(classes)


def told_of_folder(root: Path) -> contextlib.AbstractContextManager[None]:
    """Within it, what the system has against a folder is told as what it should hold."""
    expected = (
        f"--dataset folder: expected one folder of images per class, as in {root}/cat/1.png "
        f"and {root}/dog/1.png (choose the place with --data-dir)"
    )
    return told(OSError, lambda error: f"{expected}, got: {error}")


def class_folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir() and not is_hidden(path.name)]


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name, and what is in it, is no data."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def image_files(folder: Path) -> list[Path]:
    """The images at any depth of a folder, as torchvision's ``ImageFolder`` orders them."""
    suffixes = image_suffixes()

    def walk() -> Iterator[tuple[str, list[str]]]:
        for place, folders, names in os.walk(folder, followlinks=True, onerror=raise_it):
            folders[:] = [name for name in folders if not is_hidden(name)]
            check_is_no_run(Path(place))
            yield place, names

    return [
        Path(place, name)
        for place, names in sorted(walk())
        for name in sorted(names)
        if name.lower().endswith(suffixes) and not is_hidden(name)
    ]


def raise_it(error: OSError) -> None:
    raise error


def check_is_no_run(folder: Path) -> None:
    """Raise where a folder has the config.json of a run: the run's pictures are no data."""
    try:
        stored = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return
    if isinstance(stored, dict) and {"command", "dataset", "imbalance"} <= stored.keys():
        raise UserError(
            f"--dataset folder: expected folders of images only, got the run {folder}, whose "
            "pictures would be data; move it to another place"
        )
