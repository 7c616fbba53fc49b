from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from sqloss.datasets import load_dataset


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return load_dataset("digits")


@pytest.fixture
def assert_equal_data() -> Callable:
    """Images and labels alike, wherever they lie."""

    def compare(first, second) -> None:
        for part in ("train_images", "train_labels", "test_images", "test_labels"):
            assert torch.equal(getattr(first, part)[:], getattr(second, part)[:]), part

    return compare


@pytest.fixture
def write_images() -> Callable:
    """Writes so many images of each class, each of one value or colour of its own."""

    def write(root: Path, classes: dict[str, int], size=(6, 5), mode: str = "L") -> None:
        for value, (name, count) in enumerate(classes.items()):
            (root / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                colour = 10 * value + i if mode == "L" else (value, i, 9)
                Image.new(mode, size, colour).save(root / name / f"{i}.png")

    return write
