import re

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from sqloss.models.augment import Augmentation, augment, draw_augmentation
from sqloss.models.seeding import generator

SHAPES = [(1, 5, 5), (1, 8, 8), (1, 23, 28), (3, 32, 24)]


def by_loop(images: Tensor, augmentation: Augmentation) -> Tensor:
    """Image by image, pixel by pixel."""
    augmented = torch.full_like(images, -1)
    _, _, height, width = images.shape
    for i, (down, right) in enumerate(augmentation.shifts.tolist()):
        brightness = 0 if augmentation.brightness is None else augmentation.brightness[i]
        for row in range(height):
            for column in range(width):
                if 0 <= row + down < height and 0 <= column + right < width:
                    seen = images[i, :, row, column] + brightness
                    augmented[i, :, row + down, column + right] = seen
    return augmented


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_a_loop(shape, dtype):
    images = (2 * torch.rand(6, *shape) - 1).to(dtype)
    augmentation = draw_augmentation(6, shape, generator(0, "augment"))
    expected = by_loop(images, augmentation)
    assert torch.equal(augment(images, augmentation), expected)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(channels_last, augmentation), expected)


def test_an_image_can_be_shifted_away():
    images = torch.rand(3, 2, 4, 5)
    away = Augmentation(torch.tensor([[4, 0], [0, -5], [-9, 9]]), None)
    assert (augment(images, away) == -1).all()


def test_nothing_happens_without_a_shift():
    images = torch.randn(4, 3, 7, 6)
    for brightness in (None, torch.zeros(4)):
        still = Augmentation(torch.zeros(4, 2, dtype=torch.int64), brightness)
        assert torch.equal(augment(images, still), images)


def test_gradients():
    images = torch.randn(3, 2, 9, 8, dtype=torch.float64, requires_grad=True)
    shifts = torch.tensor([[1, -1], [0, 0], [-2, 1]])
    augmentation = Augmentation(shifts, torch.tensor([0.1, -0.2, 0.3]))
    assert gradcheck(lambda x: augment(x, augmentation), images)
    augment(images, augmentation).sum().backward()
    visible = by_loop(torch.ones_like(images), Augmentation(-shifts, None))
    assert torch.equal(images.grad, (visible + 1) / 2), "what is shifted out has none"


@pytest.mark.parametrize(
    ("shape", "reaches"), [((1, 5, 7), (0, 0)), ((1, 8, 15), (1, 1)), ((3, 28, 32), (3, 4))]
)
def test_shifts_are_uniform_up_to_an_eighth_of_the_side(shape, reaches):
    shifts = draw_augmentation(9000, shape, generator(1)).shifts
    assert shifts.dtype == torch.int64 and shifts.shape == (9000, 2)
    for side, reach in zip(shifts.T, reaches, strict=True):
        values, counts = side.unique(return_counts=True)
        assert values.tolist() == list(range(-reach, reach + 1))
        shares = counts / 9000 * (2 * reach + 1)
        torch.testing.assert_close(shares, torch.ones(2 * reach + 1), atol=0.12, rtol=0)


def test_brightness_is_uniform_and_for_colour_only():
    brightness = draw_augmentation(9000, (3, 8, 8), generator(1)).brightness
    assert brightness.shape == (9000,)
    counts = brightness.histc(10, -0.5, 0.5)
    torch.testing.assert_close(counts / 900, torch.ones(10), atol=0.12, rtol=0)
    assert brightness.min() >= -0.5 and brightness.max() <= 0.5
    assert draw_augmentation(2, (1, 8, 8), generator(1)).brightness is None


def test_draws_are_those_of_the_generator():
    first, again, other = (draw_augmentation(20, (3, 32, 32), generator(s)) for s in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    before = torch.get_rng_state()
    draw_augmentation(20, (3, 32, 32), generator(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_augmentation_of_another_batch():
    augmentation = draw_augmentation(3, (1, 8, 8), generator(0))
    told = "augment: augmentation: expected one of 4 images, got one of 3"
    with pytest.raises(ValueError, match=re.escape(told)):
        augment(torch.zeros(4, 1, 8, 8), augmentation)
