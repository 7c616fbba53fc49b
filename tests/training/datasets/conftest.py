from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from sqloss.training.datasets import load_dataset


@pytest.fixture(scope="session")
def torchvision():
    """Skips where there is none that fits torch."""
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported here: {error}")
    return torchvision


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


@pytest.fixture
def write_celeba(torchvision, monkeypatch) -> Callable:
    """Writes faces in torchvision's layout of CelebA.

    ``attributes`` has for each name which faces have it; ``parts`` the part of each face: 0 to
    train on, 1 to validate, 2 to test.
    """
    reader = torchvision.datasets.CelebA
    unchecked = [(None, None, name) for _, _, name in reader.file_list]
    monkeypatch.setattr(reader, "file_list", unchecked)

    def write(
        root: Path,
        faces: Sequence[Image.Image],
        attributes: dict[str, Sequence[bool]],
        parts: Sequence[int],
    ) -> None:
        place = root / "celeba"
        (place / "img_align_celeba").mkdir(parents=True)
        names = [f"{number:06d}.jpg" for number in range(1, len(faces) + 1)]
        for name, face in zip(names, faces, strict=True):
            face.save(place / "img_align_celeba" / name, format="PNG")

        def table(file: str, header: list[str], row: Callable) -> None:
            lines = [*header, *(f"{name} {row(i)}" for i, name in enumerate(names))]
            (place / file).write_text("\n".join(lines) + "\n")

        count = str(len(faces))
        table(
            "list_attr_celeba.txt",
            [count, " ".join(attributes)],
            lambda i: " ".join("1" if has[i] else "-1" for has in attributes.values()),
        )
        table("identity_CelebA.txt", [], lambda i: i + 1)
        table("list_bbox_celeba.txt", [count, "x_1 y_1 width height"], lambda i: "0 0 9 9")
        table("list_landmarks_align_celeba.txt", [count, "lefteye_x lefteye_y"], lambda i: "1 2")
        table("list_eval_partition.txt", [], lambda i: parts[i])

    return write
