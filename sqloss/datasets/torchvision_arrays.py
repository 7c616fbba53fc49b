"""The data sets that torchvision holds as one array each: MNIST and its like."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sqloss.common.errors import require
from sqloss.datasets.dataset import Dataset
from sqloss.datasets.images import square
from sqloss.datasets.source import DATASETS, Place, Source, explained


@dataclass(frozen=True)
class TorchvisionArrays(Source):
    """A data set that torchvision holds as one array."""

    reader: ClassVar[str]  # in torchvision.datasets
    layout: ClassVar[str]  # of its files, in words

    def read(self, place: Place) -> Dataset:
        read = getattr(require("torchvision.datasets"), self.reader)
        with explained(self.name, place, self.layout):
            train = read(place.root, train=True, download=place.download)
            test = read(place.root, train=False, download=place.download)
        return Dataset(
            name=self.name,
            class_names=tuple(train.classes),
            train_images=square(channels_first(train.data)[place.first], place.image_size),
            train_labels=torch.as_tensor(train.targets)[place.first],
            test_images=square(channels_first(test.data), place.image_size),
            test_labels=torch.as_tensor(test.targets),
        )


@DATASETS.register
@dataclass(frozen=True)
class MNIST(TorchvisionArrays):
    name: ClassVar[str] = "mnist"
    reader: ClassVar[str] = "MNIST"
    layout: ClassVar[str] = "MNIST/raw/train-images-idx3-ubyte etc."


@DATASETS.register
@dataclass(frozen=True)
class Fashion(TorchvisionArrays):
    name: ClassVar[str] = "fashion"
    reader: ClassVar[str] = "FashionMNIST"
    layout: ClassVar[str] = "FashionMNIST/raw/train-images-idx3-ubyte etc."


@DATASETS.register
@dataclass(frozen=True)
class CIFAR10(TorchvisionArrays):
    name: ClassVar[str] = "cifar10"
    reader: ClassVar[str] = "CIFAR10"
    layout: ClassVar[str] = "cifar-10-batches-py/data_batch_1 etc."


def channels_first(images: object) -> Tensor:
    """torchvision's [N, H, W] or [N, H, W, 3] as [N, C, H, W]."""
    tensor = torch.as_tensor(images)
    return tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()
