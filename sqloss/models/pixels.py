"""The input conventions of the models here: images rest as uint8 and are fed as float."""

from torch import Tensor


def pixels(images: Tensor) -> Tensor:
    """uint8 images 0..255 as float pixels in [0, 1]."""
    return images / 255


def signed_pixels(images: Tensor) -> Tensor:
    """uint8 images 0..255 as float pixels in [-1, 1], the range of a tanh."""
    return images / 127.5 - 1


def from_signed(images: Tensor) -> Tensor:
    """Pixels in [-1, 1] as pixels in [0, 1]."""
    return (images + 1) / 2
