import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sqloss.common.errors import UserError
from sqloss.datasets import load_dataset

pytestmark = pytest.mark.usefixtures("torchvision")


@pytest.fixture
def celeba(tmp_path, write_celeba) -> Path:
    """Eight faces: five to train on, one to validate and two to test.

    A face is grey with its own brightness, between red bands that the square crop cuts off.
    """

    def face(brightness: int) -> Image.Image:
        pixels = np.full((218, 178, 3), brightness, dtype=np.uint8)
        pixels[:20] = pixels[-20:] = (255, 0, 0)
        return Image.fromarray(pixels)

    attributes = {
        "Eyeglasses": [False] * 8,
        "Male": [i > 2 for i in range(8)],
        "Smiling": [i % 2 == 1 for i in range(8)],
    }
    write_celeba(tmp_path, [face(20 * i) for i in range(8)], attributes, [0] * 5 + [1, 2, 2])
    return tmp_path


def test_celeba_is_cropped_resized_and_labelled_by_its_attribute(celeba):
    data = load_dataset("celeba", data_dir=celeba)
    assert data.class_names == ("not Smiling", "Smiling")
    assert data.train_images.shape == (5, 3, 32, 32)
    assert data.train_images[:, :, 16, 16].tolist() == [[20 * i] * 3 for i in range(5)]
    assert torch.equal(
        data.train_images, data.train_images[:, :, 16:17, 16:17].expand(5, 3, 32, 32)
    ), "the bands are cropped"
    assert data.train_labels.tolist() == [0, 1, 0, 1, 0]
    assert data.test_images[:, 0, 0, 0].tolist() == [120, 140]
    assert data.test_labels.tolist() == [0, 1]


def test_celeba_with_other_flags(celeba):
    data = load_dataset(
        "celeba", data_dir=celeba, image_size=16, train_limit=2, celeba_attribute="Eyeglasses"
    )
    assert data.train_images.shape == (2, 3, 16, 16)
    assert data.train_labels.tolist() == [0, 0]
    assert data.class_names == ("not Eyeglasses", "Eyeglasses")


def test_the_attributes_of_celeba(celeba):
    data = load_dataset("celeba", data_dir=celeba, train_limit=4)
    assert {name: has.tolist() for name, has in data.train_attributes.items()} == {
        "Eyeglasses": [False] * 4,
        "Male": [False, False, False, True],
        "Smiling": [False, True, False, True],
    }
    assert data.test_attributes["Smiling"].tolist() == [False, True]


def test_several_attributes_make_a_class_of_every_combination(celeba):
    data = load_dataset("celeba", data_dir=celeba, celeba_attribute="Male, Smiling")
    assert data.class_names == (
        "not Male, not Smiling",
        "not Male, Smiling",
        "Male, not Smiling",
        "Male, Smiling",
    )
    assert data.train_labels.tolist() == [0, 1, 0, 3, 2]
    assert data.test_labels.tolist() == [2, 3]


def test_an_unknown_attribute_of_celeba(celeba):
    with pytest.raises(UserError, match="expected one of Eyeglasses, Male, Smiling, got 'Bald'"):
        load_dataset("celeba", data_dir=celeba, celeba_attribute="Bald")


def test_an_attribute_twice(celeba):
    with pytest.raises(UserError, match="at most 6 attributes, each once, got 'Male,Male'"):
        load_dataset("celeba", data_dir=celeba, celeba_attribute="Male,Male")


def test_fetching_faces_needs_gdown_and_has_a_quota(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(UserError, match=r"needs `pip install gdown`.*daily quota"):
        load_dataset("celeba", data_dir=tmp_path, download=True)


def test_a_missing_face_is_named(celeba):
    (celeba / "celeba" / "img_align_celeba" / "000003.jpg").unlink()
    with pytest.raises(UserError, match=r"cannot read the image .*000003\.jpg"):
        load_dataset("celeba", data_dir=celeba)
