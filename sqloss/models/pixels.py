"""The input conventions of the models here: images rest as uint8 and are fed as float."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class Images(Protocol):
    """uint8 images [N, C, H, W] to read by slices and by rows: a tensor, or more than memory has.

    What is read of them is a tensor on their device.
    """

    @property
    def shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: Any, /) -> Tensor: ...

    def to(self, device: Any, /) -> "Images": ...


def in_blocks(images: Images, size: int) -> Iterator[Tensor]:
    """The images, so many at a time."""
    return (images[first : first + size] for first in range(0, len(images), size))


def some(images: Images, count: int, draws: torch.Generator) -> Tensor:
    """``count`` of the images at random, in no order; or all as they are, if there are no more."""
    if count >= len(images):
        return images[:]
    chosen = torch.randperm(len(images), generator=draws)[:count]
    return images[chosen.to(images.device)]


def pixels(images: Tensor) -> Tensor:
    """uint8 images 0..255 as float pixels in [0, 1]."""
    return images / 255


def signed_pixels(images: Tensor) -> Tensor:
    """uint8 images 0..255 as float pixels in [-1, 1], the range of a tanh."""
    return images / 127.5 - 1


def to_signed(images: Tensor) -> Tensor:
    """Pixels in [0, 1] as pixels in [-1, 1]."""
    return 2 * images - 1


def from_signed(images: Tensor) -> Tensor:
    """Pixels in [-1, 1] as pixels in [0, 1]."""
    return (images + 1) / 2
