"""What training sees of a data set: images, in memory or in a file, with their classes."""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sqloss.common.errors import UserError
from sqloss.common.text import printable
from sqloss.datasets.cache import MappedImages
from sqloss.datasets.imbalance import in_text, members, thinned
from sqloss.models.pixels import Images, in_blocks
from sqloss.models.seeding import generator

HASHED_AT_ONCE = 2**22  # values


@dataclass(frozen=True)
class Dataset:
    """Images to train and to test on.

    All are on one device, but for images in a file: their batches are there as they are read.
    """

    name: str
    class_names: tuple[str, ...]
    train_images: Images
    train_labels: Tensor  # int64 [N]
    test_images: Images
    test_labels: Tensor
    # By the name of an attribute which images have it, bool [N] on the CPU; of all the same names.
    train_attributes: dict[str, Tensor] = field(default_factory=dict)
    test_attributes: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.train_images)

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width."""
        return tuple(self.train_images.shape[1:])

    @property
    def labels(self) -> Tensor:
        """The classes of the training images, on the CPU."""
        return self.train_labels.cpu()

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

    def steps(self, batch_size: int) -> int:
        return math.ceil(len(self) / batch_size)

    def batches(
        self, rows: Iterable[Tensor], training: object = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The training images and labels of these rows, [B] each, on the device of the data.

        From a file they are read ahead, so the last rows are asked for before the first batches
        are used.
        """
        rows, of_labels = itertools.tee(rows)
        images = self.train_images
        read = images.ahead(rows) if isinstance(images, MappedImages) else map(self._of_rows, rows)
        for batch, batch_rows in zip(read, of_labels, strict=True):
            yield batch, self.train_labels[batch_rows.to(self.train_labels.device)]

    def _of_rows(self, rows: Tensor) -> Tensor:
        return self.train_images[rows.to(self.train_images.device)]

    def imbalanced(self, imbalance: str, seed: int) -> "Dataset":
        """Keep a random share of some training images; the test images stay as they are.

        ``imbalance`` is "none" or like "0:0.1,cat:0.5,Male=1,Bald=1:0.1": see ``thinned``. An image
        of several of these parts is kept where each of them keeps it. Rounding removes no part:
        only the share 0 does.
        """
        kept = torch.ones(len(self), dtype=torch.bool)
        for part, share in thinned(imbalance, self.class_names, self.train_attributes).items():
            chosen = members(part, self.labels, self.train_attributes).nonzero()[:, 0]
            purpose = part if isinstance(part, int) else in_text(part)
            shuffled = torch.randperm(len(chosen), generator=generator(seed, "imbalance", purpose))
            keep = max(round(share * len(chosen)), 1 if share > 0 else 0)
            kept[chosen[shuffled[keep:]]] = False
        if not kept.any():
            raise UserError(f"--imbalance: {imbalance!r} leaves no training image")
        images = self.train_images
        return dataclasses.replace(
            self,
            train_images=images.of(kept) if isinstance(images, MappedImages) else images[kept],
            train_labels=self.train_labels[kept],
            train_attributes={name: has[kept] for name, has in self.train_attributes.items()},
        )

    def in_words(self, whole: "Dataset") -> str:
        """What there is to train and to test on; ``whole`` is the data before the imbalance."""
        counts = zip(self.class_names, self.class_counts(), whole.class_counts(), strict=True)
        classes = ", ".join(
            f"{printable(name)}: {count}" + (f" of {before}" if count < before else "")
            for name, count, before in counts
        )
        return (
            f"data: {self.name}, {len(self)} training images of "
            f"{' x '.join(map(str, self.shape))}, per class {classes}; "
            f"{len(self.test_images)} test images"
        )

    def fingerprint(self) -> str:
        """Equal for equal images and labels, of training and test, only.

        Where the images lie, in memory or in a file, makes no difference.
        """
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        at_once = max(1, HASHED_AT_ONCE // math.prod(self.shape))
        digest = hashlib.sha256(str((self.train_images.shape, self.test_images.shape)).encode())
        for images, labels in (
            (self.train_images, self.train_labels),
            (self.test_images, self.test_labels),
        ):
            for block in itertools.chain(in_blocks(images, at_once), [labels]):
                digest.update(block.cpu().contiguous().numpy().data)
        return digest.hexdigest()
