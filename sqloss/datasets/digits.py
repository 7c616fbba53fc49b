"""The handwritten digits of scikit-learn."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sqloss.common.errors import require
from sqloss.datasets.dataset import Dataset
from sqloss.datasets.images import square
from sqloss.datasets.source import DATASETS, Place, Source, stratified_split


@DATASETS.register
@dataclass(frozen=True)
class Digits(Source):
    """The 1,797 8 x 8 handwritten digits that scikit-learn brings along: nothing to download."""

    name: ClassVar[str] = "digits"

    def read(self, place: Place) -> Dataset:
        bundled = require("sklearn.datasets").load_digits()
        images = (torch.from_numpy(bundled.images) * (255 / 16)).round().to(torch.uint8)[:, None]
        labels = torch.from_numpy(bundled.target).long()
        train, test = stratified_split(labels)
        return Dataset(
            name=self.name,
            class_names=tuple(map(str, bundled.target_names)),
            train_images=square(images[train][place.first], place.image_size),
            train_labels=labels[train][place.first],
            test_images=square(images[test], place.image_size),
            test_labels=labels[test],
        )
