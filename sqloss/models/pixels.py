"""The input convention of every model here: images rest as uint8 and are fed as float."""

from torch import Tensor


def pixels(images: Tensor) -> Tensor:
    """uint8 images 0..255 as float pixels in [0, 1]."""
    return images / 255
