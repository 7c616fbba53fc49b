"""Augmentation of real and of generated images alike, through which gradients flow.

A discriminator that sees few images learns them by heart. If only the real ones were augmented, the
generator would learn to draw augmented images; with both, it learns the images themselves (Zhao et
al., 2020, "Differentiable augmentation for data-efficient GAN training"). Images are shifted, and
in colour made brighter or darker. They are not mirrored: a digit's mirror image is no digit.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GREATEST_SHIFT = 1 / 8  # of a side
GREATEST_BRIGHTNESS = 0.5  # of pixels in [-1, 1]
BLACK = -1.0


class Augmentation(NamedTuple):
    """What happens to each image of a batch."""

    shifts: Tensor  # int64 [B, 2]: pixels down and to the right
    brightness: Tensor | None  # [B], added to the pixels; None for images of one channel


def draw_augmentation(
    count: int, data_shape: Sequence[int], generator: torch.Generator
) -> Augmentation:
    """Uniform shifts of up to an eighth of each side and, in colour, brightness in [-1/2, 1/2).

    Args:
        count: of images.
        data_shape: their channels, height and width.
        generator: of the CPU, on which the result is, so that it is the same for every device.

    Example::

        >>> import torch
        >>> from sqloss.models.augment import draw_augmentation
        >>> draws = draw_augmentation(5, (3, 32, 32), torch.Generator().manual_seed(0))
        >>> draws.shifts.shape, draws.brightness.shape
        (torch.Size([5, 2]), torch.Size([5]))
        >>> draws.shifts.abs().max() <= 4
        tensor(True)
    """
    channels, *sides = data_shape
    reaches = [int(side * GREATEST_SHIFT) for side in sides]
    shifts = [torch.randint(-reach, reach + 1, (count,), generator=generator) for reach in reaches]
    if channels == 1:
        return Augmentation(torch.stack(shifts, 1), None)
    brightness = (2 * torch.rand(count, generator=generator) - 1) * GREATEST_BRIGHTNESS
    return Augmentation(torch.stack(shifts, 1), brightness)


def augment(images: Tensor, augmentation: Augmentation) -> Tensor:
    """The images, made brighter and then shifted; what a shift uncovers is black, -1.

    Args:
        images: [B, C, H, W], usually in [-1, 1]; brightness may lead out of that range.
        augmentation: of B images, on any device.

    Returns:
        Tensor: of the shape of ``images``, with the gradient in them.

    Raises:
        ValueError: an augmentation of another number of images.

    Example::

        >>> import torch
        >>> from sqloss.models.augment import Augmentation, augment
        >>> image = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]])
        >>> augment(image, Augmentation(torch.tensor([[0, 1]]), None))
        tensor([[[[-1.0000,  0.1000],
                  [-1.0000,  0.3000]]]])
    """
    shifts, brightness = augmentation
    count, channels, height, width = images.shape
    if len(shifts) != count:
        raise ValueError(
            f"augment: augmentation: expected one of {count} images, got one of {len(shifts)}"
        )
    if brightness is not None:
        images = images + brightness.to(images).view(-1, 1, 1, 1)
    down, right = shifts.to(images.device).T
    rows = torch.arange(height, device=images.device) - down[:, None]  # [B, H], where from
    columns = torch.arange(width, device=images.device) - right[:, None]
    seen_rows, seen_columns = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    source = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None]
    seen = seen_rows[:, :, None] & seen_columns[:, None]
    flat = source.flatten(1)[:, None].expand(-1, channels, -1)
    shifted = images.flatten(2).gather(2, flat).view(images.shape)
    return torch.where(seen[:, None], shifted, BLACK)
