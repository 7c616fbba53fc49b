import sys

import pytest
import torch

from sqloss.common.errors import UserError, require
from sqloss.datasets import load_dataset


def test_digits_are_uint8_over_the_whole_range(digits):
    assert digits.shape == (1, 8, 8)
    assert (len(digits.train_images), len(digits.test_images)) == (1437, 360)
    assert digits.train_images.dtype == torch.uint8
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 255)
    assert digits.class_names == tuple("0123456789")


def test_digits_are_scaled_from_0_to_16(digits):
    from sklearn.datasets import load_digits

    values = set(digits.train_images.unique().tolist())
    assert values == {round(v * 255 / 16) for v in range(17)}
    total = digits.train_images.double().sum() + digits.test_images.double().sum()
    assert total.item() == pytest.approx(load_digits().images.sum() * 255 / 16, rel=1e-3)


def test_digits_are_split_evenly_and_always_alike(digits, assert_equal_data):
    shares = torch.bincount(digits.test_labels) / len(digits.test_labels)
    whole = torch.tensor(digits.class_counts()) / len(digits.train_labels)
    torch.testing.assert_close(shares, whole, atol=0.01, rtol=0)
    assert_equal_data(digits, load_dataset("digits"))


def test_limit_takes_the_first_training_images(digits):
    limited = load_dataset("digits", train_limit=100)
    assert torch.equal(limited.train_images, digits.train_images[:100])
    assert torch.equal(limited.train_labels, digits.train_labels[:100])
    assert torch.equal(limited.test_images, digits.test_images)


def test_image_size_resizes(digits):
    larger = load_dataset("digits", image_size=12)
    assert larger.shape == (1, 12, 12)
    means = [data.train_images.float().mean().item() for data in (larger, digits)]
    assert means[0] == pytest.approx(means[1], rel=0.1)


def test_digits_do_without_torchvision(monkeypatch, digits, assert_equal_data):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    assert_equal_data(digits, load_dataset("digits"))
    with pytest.raises(UserError, match=r"torchvision is needed .* pip install 'sqloss\[train\]'"):
        load_dataset("mnist")


def test_a_torchvision_for_another_torch_is_told_from_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "mismatched.py").write_text(
        "raise RuntimeError('operator mismatched::nms does not exist')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=rf"mismatched .* does not load beside torch .*{'nms'}"):
        require("mismatched")
