"""Data sets as uint8 tensors in memory, read once; and how a class is made rare in training."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sqloss.models.seeding import generator
from sqloss.training.errors import UserError, require
from sqloss.training.text import printable

DEFAULT_SIZE = 32  # of faces, and of folders whose images differ in size
TEST_SHARE = 0.2  # where a data set brings no split of its own
GREY_MODES = {"1", "L", "LA"}  # as Pillow calls them
# Folders that systems make beside the images, and fill with copies of them or with nothing.
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
CLASSES_TOLD = 20  # in an error that lists them
SPLIT_SEED = 0  # not the run's: runs with different seeds are tested on the same images


@dataclass(frozen=True)
class Dataset:
    """A data set in memory."""

    name: str
    class_names: tuple[str, ...]
    train_images: Tensor  # uint8 [N, C, H, W]
    train_labels: Tensor  # int64 [N]
    test_images: Tensor
    test_labels: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width."""
        return tuple(self.train_images.shape[1:])

    def class_counts(self) -> list[int]:
        """How many training images each class has."""
        return torch.bincount(self.train_labels, minlength=len(self.class_names)).tolist()

    def to(self, device: torch.device) -> "Dataset":
        return dataclasses.replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )

    def imbalanced(self, imbalance: str, seed: int) -> "Dataset":
        """Keep a random share of some classes' training images; the test images stay as they are.

        ``imbalance`` is "none" or like "0:0.1,cat:0.5": see ``thinned``. Rounding removes no class:
        only the share 0 does.
        """
        kept = torch.ones(len(self.train_labels), dtype=torch.bool)
        for label, share in thinned(imbalance, self.class_names).items():
            members = (self.train_labels == label).nonzero()[:, 0]
            shuffled = torch.randperm(len(members), generator=generator(seed, "imbalance", label))
            keep = max(round(share * len(members)), 1 if share > 0 else 0)
            kept[members[shuffled[keep:]]] = False
        if not kept.any():
            raise UserError(f"--imbalance: {imbalance!r} leaves no training image")
        return dataclasses.replace(
            self, train_images=self.train_images[kept], train_labels=self.train_labels[kept]
        )

    def in_words(self, whole: "Dataset") -> str:
        """What there is to train and to test on; ``whole`` is the data before the imbalance."""
        counts = zip(self.class_names, self.class_counts(), whole.class_counts(), strict=True)
        classes = ", ".join(
            f"{printable(name)}: {count}" + (f" of {before}" if count < before else "")
            for name, count, before in counts
        )
        return (
            f"data: {self.name}, {len(self.train_images)} training images of "
            f"{' x '.join(map(str, self.shape))}, per class {classes}; "
            f"{len(self.test_images)} test images"
        )

    def __len__(self) -> int:
        return len(self.train_images)

    @property
    def labels(self) -> Tensor:
        """Those of the training images, on the CPU."""
        return self.train_labels.cpu()

    def steps(self, batch_size: int) -> int:
        return math.ceil(len(self) / batch_size)

    def batches(
        self, rows: Iterable[Tensor], training: object = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The training images and labels of these rows, [B] each, on the device of the data."""
        for batch in rows:
            there = batch.to(self.train_images.device)
            yield self.train_images[there], self.train_labels[there]

    def fingerprint(self) -> str:
        """Equal for equal images and labels, of training and test, only."""
        digest = hashlib.sha256(str((self.train_images.shape, self.test_images.shape)).encode())
        for part in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(part.cpu().contiguous().numpy().data)
        return digest.hexdigest()


# A class, whose name may have commas and colons of its own, and the share to keep of it.
CLASS_SHARE = re.compile(r"(?P<name>.+?):(?P<share>[-+.\deE\s]+)(?:,(?=.)|\Z)", re.DOTALL)


def parse_imbalance(text: str) -> dict[str, float]:
    """The share to keep of each class: "0:0.1,cat:0.5" is {"0": 0.1, "cat": 0.5}, "none" is {}."""
    if text == "none":
        return {}
    shares: dict[str, float] = {}
    end = 0
    while match := CLASS_SHARE.match(text, end):
        end, name = match.end(), match["name"]
        try:
            share = float(match["share"])
        except ValueError:
            share = -1.0
        if name in shares or not 0 <= share <= 1:
            raise wrong_imbalance(text)
        shares[name] = share
    if end < len(text) or not shares:
        raise wrong_imbalance(text)
    return shares


def wrong_imbalance(text: str) -> UserError:
    return UserError(
        "--imbalance: expected 'none' or CLASS:SHARE,... with each class once and shares "
        f"from 0 to 1, such as 0:0.1 or 0:0.1,cat:0.5, got {text!r}"
    )


def thinned(imbalance: str, class_names: Sequence[str]) -> dict[int, float]:
    """The share to keep of each class, by its number, that an imbalance names.

    A class is named by its name; what is nobody's name is a number, in the order of the names.
    """
    shares: dict[int, float] = {}
    for name, share in parse_imbalance(imbalance).items():
        label = label_of(name, class_names)
        if label in shares:
            raise wrong_imbalance(imbalance)
        shares[label] = share
    return shares


def label_of(name: str, class_names: Sequence[str]) -> int:
    for given in (name, name.strip()):
        if given in class_names:
            return class_names.index(given)
    last = len(class_names) - 1
    try:
        label = int(name)
    except ValueError:
        label = -1
    if not 0 <= label <= last:
        more = ", ..." if len(class_names) > CLASSES_TOLD else ""
        raise UserError(
            f"--imbalance: expected one of the classes {', '.join(class_names[:CLASSES_TOLD])}"
            f"{more}, or a number from 0 to {last}, got {name!r}"
        )
    return label


@dataclass(frozen=True)
class Source:
    """Where a data set comes from and in which form; a reader turns it into a ``Dataset``."""

    data_dir: Path = Path("data")
    download: bool = False
    image_size: int = 0  # side in pixels, 0 = as they are
    limit: int = 0  # training images, 0 = all
    celeba_attribute: str = "Smiling"

    @property
    def first(self) -> slice:
        """The part of the training images to use."""
        return slice(self.limit or None)


def load_dataset(name: str, source: Source) -> Dataset:
    return READERS[name](source)


def digits(source: Source) -> Dataset:
    """The 1,797 8 x 8 handwritten digits that scikit-learn brings along: nothing to download."""
    bundled = require("sklearn.datasets").load_digits()
    images = (torch.from_numpy(bundled.images) * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bundled.target).long()
    train, test = stratified_split(labels)
    return Dataset(
        name="digits",
        class_names=tuple(map(str, bundled.target_names)),
        train_images=square(images[train][source.first], source.image_size),
        train_labels=labels[train][source.first],
        test_images=square(images[test], source.image_size),
        test_labels=labels[test],
    )


def mnist(source: Source) -> Dataset:
    return torchvision_arrays("MNIST", "mnist", source, "MNIST/raw/train-images-idx3-ubyte etc.")


def fashion(source: Source) -> Dataset:
    return torchvision_arrays(
        "FashionMNIST", "fashion", source, "FashionMNIST/raw/train-images-idx3-ubyte etc."
    )


def cifar10(source: Source) -> Dataset:
    return torchvision_arrays("CIFAR10", "cifar10", source, "cifar-10-batches-py/data_batch_1 etc.")


def torchvision_arrays(reader: str, name: str, source: Source, layout: str) -> Dataset:
    """A data set that torchvision holds as one array: MNIST and its like."""
    read = getattr(require("torchvision.datasets"), reader)
    with explained(name, source, layout):
        train = read(source.data_dir, train=True, download=source.download)
        test = read(source.data_dir, train=False, download=source.download)
    return Dataset(
        name=name,
        class_names=tuple(train.classes),
        train_images=square(channels_first(train.data)[source.first], source.image_size),
        train_labels=torch.as_tensor(train.targets)[source.first],
        test_images=square(channels_first(test.data), source.image_size),
        test_labels=torch.as_tensor(test.targets),
    )


def celeba(source: Source) -> Dataset:
    """Aligned faces; the two classes are without and with one of the 40 attributes."""
    read = require("torchvision.datasets").CelebA
    layout = (
        "celeba/ with the folder img_align_celeba/ and the files list_attr_celeba.txt, "
        "list_eval_partition.txt, identity_CelebA.txt, list_bbox_celeba.txt and "
        "list_landmarks_align_celeba.txt"
    )
    # Its files are on Google Drive.
    download_hint = (
        "; --download of celeba needs `pip install gdown`, and is refused while the files are over "
        "Google Drive's daily quota: then try again tomorrow, or fetch them with a browser"
    )
    with explained("celeba", source, layout, download_hint):
        train = read(source.data_dir, "train", download=source.download)
        test = read(source.data_dir, "test", download=source.download)
    attribute = source.celeba_attribute
    if attribute not in train.attr_names:
        known = ", ".join(filter(None, train.attr_names))
        raise UserError(f"--celeba-attribute: expected one of {known}, got {attribute!r}")
    column = train.attr_names.index(attribute)
    folder = source.data_dir / "celeba" / "img_align_celeba"
    size = source.image_size or DEFAULT_SIZE
    return Dataset(
        name="celeba",
        class_names=(f"not {attribute}", attribute),
        train_images=decode([folder / f for f in train.filename[source.first]], "RGB", size),
        train_labels=train.attr[source.first, column],
        test_images=decode([folder / f for f in test.filename], "RGB", size),
        test_labels=test.attr[:, column],
    )


def folder(source: Source) -> Dataset:
    """Images in one folder per class, with or without a split into train/ and test/."""
    (train_files, train_labels), (test_files, test_labels), class_names = folder_split(source)
    modes, sizes = zip(*map(mode_and_size, train_files + test_files), strict=True)
    mode = "L" if set(modes) <= GREY_MODES else "RGB"
    size = source.image_size or (0 if len(set(sizes)) == 1 else DEFAULT_SIZE)
    return Dataset(
        name="folder",
        class_names=class_names,
        train_images=decode(train_files[source.first], mode, size),
        train_labels=train_labels[source.first],
        test_images=decode(test_files, mode, size),
        test_labels=test_labels,
    )


Files = tuple[list[Path], Tensor]


def folder_split(source: Source) -> tuple[Files, Files, tuple[str, ...]]:
    """The files and labels of the training and of the test images, and the classes' names."""
    root = source.data_dir
    if (root / "train").is_dir() != (root / "test").is_dir():
        raise UserError(f"--dataset folder: expected train/ and test/ in {root}, got only one")
    first, *rest = map(image_folder, image_roots(root))
    if rest:
        train_files, train_labels, classes = first
        [(test_files, test_labels, test_classes)] = rest
        if classes != test_classes:
            raise UserError(
                f"--dataset folder: expected the same classes in {root / 'train'} and "
                f"{root / 'test'}, got {', '.join(sorted(set(classes) ^ set(test_classes)))} "
                "in one of them only"
            )
        # By class as the folders are, the first --limit images would all be of one class.
        order = torch.randperm(len(train_files), generator=generator(SPLIT_SEED, "folder"))
        train = [train_files[i] for i in order], train_labels[order]
        return train, (test_files, test_labels), classes
    files, labels, classes = first
    parts = [([files[i] for i in part], labels[part]) for part in stratified_split(labels)]
    return parts[0], parts[1], classes


def image_roots(data_dir: Path) -> list[Path]:
    """The folders that have a folder per class: train/ and test/, or the data folder itself."""
    split = [data_dir / "train", data_dir / "test"]
    return split if split[0].is_dir() else [data_dir]


def image_folder(root: Path) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    """The image files below ``root``, their labels, and the names of the classes."""
    refuse_run_among_images(root)
    try:
        classes = sorted(folder.name for folder in class_folders(root))
        files = [image_files(root / name) for name in classes]
        if empty := [name for name, found in zip(classes, files, strict=True) if not found]:
            raise FileNotFoundError(
                f"no image ({', '.join(image_suffixes())}) in {', '.join(empty)}"
            )
        if not classes:
            raise FileNotFoundError(f"no folder in {root}")
    except OSError as error:
        raise UserError(
            f"--dataset folder: expected one folder of images per class, as in {root}/cat/1.png "
            f"and {root}/dog/1.png (choose the place with --data-dir), got: {error}"
        ) from error
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(f) for f in files]))
    return list(itertools.chain.from_iterable(files)), labels, tuple(classes)


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
            refuse_run_among_images(Path(place))
            yield place, names

    return [
        Path(place, name)
        for place, names in sorted(walk())
        for name in sorted(names)
        if name.lower().endswith(suffixes) and not is_hidden(name)
    ]


def image_suffixes() -> tuple[str, ...]:
    suffixes: tuple[str, ...] = require("torchvision.datasets.folder").IMG_EXTENSIONS
    return suffixes


def raise_it(error: OSError) -> None:
    raise error


def refuse_run_among_images(folder: Path) -> None:
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


def refuse_output_among_data(name: str, source: Source, directory: Path) -> None:
    """Raise for a directory where what is written would be read as data."""
    if name != "folder":
        return
    place = Path(os.path.realpath(directory))
    for root in image_roots(source.data_dir):
        folders = [root]
        with contextlib.suppress(OSError):  # who reads the data tells of it
            folders += class_folders(root)  # links among them lead elsewhere
        for data in map(os.path.realpath, folders):
            parts = place.relative_to(data).parts if place.is_relative_to(data) else (".",)
            if not any(map(is_hidden, parts)):
                raise UserError(
                    "--output-dir: expected a directory outside of the images, whose every folder "
                    f"is data, got {directory}, which is in {root}; choose another one"
                )


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


@contextlib.contextmanager
def explained(name: str, source: Source, layout: str, download_hint: str = "") -> Iterator[None]:
    """A reader's failure, whatever its exception, as where to put what or how to fetch it."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"--dataset {name}: expected {source.data_dir}/{layout}, as torchvision stores it "
            "(--data-dir chooses the folder; --download fetches what is missing and unpacks "
            f"archives that are there{download_hint}), got {type(error).__name__}: {error}"
        ) from error


def channels_first(images: object) -> Tensor:
    """torchvision's [N, H, W] or [N, H, W, 3] as [N, C, H, W]."""
    tensor = torch.as_tensor(images)
    return tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()


def square(images: Tensor, size: int) -> Tensor:
    """The central squares of [N, C, H, W], resized to ``size`` pixels; as they are for size 0.

    Of CelebA's 178 x 218 pixels the central square is the usual 178 crop.
    """
    if size == 0:
        return images
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    centre = images[:, :, top : top + side, left : left + side]
    return F.interpolate(centre, (size, size), mode="bilinear", antialias=True)


def decode(files: Sequence[Path], mode: str, size: int) -> Tensor:
    """Image files as one uint8 tensor; threads suffice, as decoding releases the lock."""
    to_tensor = require("torchvision.transforms.functional").pil_to_tensor
    tqdm = require("tqdm").tqdm

    def read(file: Path) -> Tensor:
        with image_file(file) as image:
            return square(to_tensor(image.convert(mode))[None], size)[0]

    with ThreadPoolExecutor() as threads:
        images = threads.map(read, files)
        return torch.stack(list(tqdm(images, "images", len(files), leave=False, disable=None)))


def mode_and_size(file: Path) -> tuple[str, tuple[int, int]]:
    """What the head of an image file tells without decoding it."""
    with image_file(file) as image:
        return image.mode, image.size


@contextlib.contextmanager
def image_file(file: Path) -> Iterator[Any]:
    open_image = require("PIL.Image").open
    try:
        with open_image(file) as image:
            refuse_deep(file, image.mode)
            yield image
    except UserError:
        raise
    except Exception as error:  # Pillow has one for every way in which a file can be broken
        raise UserError(
            f"cannot read the image {file}: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error


def refuse_deep(file: Path, mode: str) -> None:
    """Pillow would clip the values of such an image to 0..255, and say nothing."""
    if mode == "F" or mode.startswith("I"):  # I is 32 bits; I;16, I;16B, ... are 16
        raise UserError(
            f"{file}: expected an image of 8 bits per channel, got the 16 or 32 bits of Pillow's "
            f"mode {mode}; convert it to 8 bits first"
        )


READERS: dict[str, Callable[[Source], Dataset]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion": fashion,
    "cifar10": cifar10,
    "celeba": celeba,
    "folder": folder,
}
