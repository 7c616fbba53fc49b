"""CelebA: faces with 40 attributes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from sqloss.common.errors import require
from sqloss.common.flags import flag
from sqloss.datasets.attributes import classes_of
from sqloss.datasets.cache import load_images
from sqloss.datasets.dataset import Dataset
from sqloss.datasets.images import DEFAULT_SIZE, Decoding
from sqloss.datasets.source import DATASETS, Place, Source, explained
from sqloss.models.pixels import Images

LAYOUT = (
    "celeba/ with the folder img_align_celeba/ and the files list_attr_celeba.txt, "
    "list_eval_partition.txt, identity_CelebA.txt, list_bbox_celeba.txt and "
    "list_landmarks_align_celeba.txt"
)
# Its files are on Google Drive.
DOWNLOAD_HINT = (
    "; --download of celeba needs `pip install gdown`, and is refused while the files are over "
    "Google Drive's daily quota: then try again tomorrow, or fetch them with a browser"
)


@DATASETS.register
@dataclass(frozen=True)
class CelebA(Source):
    """Aligned faces; the classes are the combinations of one or some of the attributes."""

    name: ClassVar[str] = "celeba"
    celeba_attribute: str = flag(
        "Smiling",
        "the attribute that is the class of a celeba image; of several every combination is a "
        "class",
        metavar="NAME,...",
    )

    def read(self, place: Place) -> Dataset:
        read = require("torchvision.datasets").CelebA
        with explained(self.name, place, LAYOUT, DOWNLOAD_HINT):
            train = read(place.root, "train", download=place.download)
            test = read(place.root, "test", download=place.download)
        train_attributes, test_attributes = attributes_of(train), attributes_of(test)
        names, train_labels = self._classes(train_attributes)
        _, test_labels = self._classes(test_attributes)
        first = place.first
        return Dataset(
            name=self.name,
            class_names=names,
            train_images=faces(train.filename, place, place.train_limit),
            train_labels=train_labels[first],
            test_images=faces(test.filename, place),
            test_labels=test_labels,
            train_attributes={name: has[first] for name, has in train_attributes.items()},
            test_attributes=test_attributes,
        )

    def _classes(self, attributes: dict[str, Tensor]) -> tuple[tuple[str, ...], Tensor]:
        return classes_of("--celeba-attribute", self.celeba_attribute, attributes)


def attributes_of(faces: Any) -> dict[str, Tensor]:
    """The attributes of a part of torchvision's CelebA, whose last name may be an empty one."""
    columns = zip(faces.attr_names, faces.attr.bool().T, strict=False)
    return {name: has for name, has in columns if name}


def faces(names: list[str], place: Place, limit: int = 0) -> Images:
    """The faces of these files, or the first ones of them."""
    folder: Path = place.root / "celeba" / "img_align_celeba"
    size = place.image_size or DEFAULT_SIZE
    files = [folder / name for name in names]
    count = min(limit or len(files), len(files))
    return load_images(files, count, Decoding.of_size("RGB", size, size, size), place)
