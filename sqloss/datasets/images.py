"""Files of images as uint8 tensors, or the error that names the file."""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sqloss.common.errors import UserError, require

DEFAULT_SIZE = 32  # of faces, and of folders whose images differ in size
GREY_MODES = {"1", "L", "LA"}  # as Pillow calls them
# The formats of image_suffixes(), and GIF, which is often named like one of them. Of others we do
# not know from the outside whether they have more than 8 bits.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "TIFF", "WEBP", "GIF")
BITS_PER_SAMPLE = 258  # a tag of TIFF


def image_suffixes() -> tuple[str, ...]:
    suffixes: tuple[str, ...] = require("torchvision.datasets.folder").IMG_EXTENSIONS
    return suffixes


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


@dataclass(frozen=True)
class Decoding:
    """What is made of an image file."""

    mode: str  # Pillow's: "L" or "RGB"
    shape: tuple[int, ...]  # channels, height and width
    size: int  # of the square to which it is resized; 0: it has its size already

    @classmethod
    def of_size(cls, mode: str, height: int, width: int, size: int) -> "Decoding":
        """For images of some height and width, or resized to squares."""
        sides = (size, size) if size else (height, width)
        return cls(mode, (3 if mode == "RGB" else 1, *sides), size)


def decode(
    files: Sequence[Path], decoding: Decoding, threads: ThreadPoolExecutor
) -> Iterator[Tensor]:
    """The images of files in order, uint8 [C, H, W] each.

    Threads suffice, as Pillow and torch let go of Python's lock.
    """
    to_tensor = require("torchvision.transforms.functional").pil_to_tensor

    def read(file: Path) -> Tensor:
        with image_file(file) as image:
            tensor = square(to_tensor(image.convert(decoding.mode))[None], decoding.size)[0]
        if tuple(tensor.shape) != decoding.shape:
            raise unreadable(file, ValueError("its size has changed while it was read"))
        return tensor

    return threads.map(read, files)


def mode_and_size(file: Path) -> tuple[str, tuple[int, int]]:
    """What the head of an image file tells without decoding it: its width comes first."""
    with image_file(file) as image:
        return image.mode, image.size


@contextlib.contextmanager
def image_file(file: Path) -> Iterator[Any]:
    pillow = require("PIL.Image")
    try:
        with pillow.open(file, formats=FORMATS) as image:
            check_depth(file, image)
            yield image
    except UserError:
        raise
    except Exception as error:  # Pillow has one for every way in which a file can be broken
        raise unreadable(file, error) from error


def unreadable(file: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"cannot read the image {file}: {reason}")


def check_depth(file: Path, image: Any) -> None:
    """Raise for an image of which Pillow would drop bits, or clip values, and say nothing."""
    bits = depth(image)
    if bits:
        raise UserError(
            f"{file}: expected an image of 8 bits per channel, got {bits} in Pillow's mode "
            f"{image.mode}; convert it to 8 bits first"
        )


def depth(image: Any) -> str:
    """The bits per channel of an open image in words, where they are more than 8."""
    if image.mode == "F" or image.mode.startswith("I"):  # I is 32 bits; I;16, I;16B, ... are 16
        return "16 or 32"
    if image.format == "TIFF":
        bits = max(image.tag_v2.get(BITS_PER_SAMPLE, (1,)))
        return str(bits) if bits > 8 else ""
    # Pillow opens colours of 16 bits in modes of 8 bits; how they lie in the file tells.
    for tile in image.tile:
        arguments = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        if image.format == "PNG" and str(arguments[0]).endswith(";16B"):
            return "16"
        if image.format == "PPM" and tile.codec_name in ("ppm", "ppm_plain"):
            _, largest = arguments
            if largest > 255:
                return "16"
    return ""
