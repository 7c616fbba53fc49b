import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from sqloss.common.errors import UserError
from sqloss.datasets import load_dataset

pytestmark = pytest.mark.usefixtures("torchvision")


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def random_images(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(count).integers(256, size=(count, *shape), dtype=np.uint8)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion", "FashionMNIST")])
def test_mnist_and_fashion_are_read(tmp_path, name, folder):
    train, test = random_images(12, 28, 28), random_images(5, 28, 28)
    raw = tmp_path / folder / "raw"
    write_idx(raw / "train-images-idx3-ubyte", train)
    write_idx(raw / "train-labels-idx1-ubyte", np.arange(12) % 10)
    write_idx(raw / "t10k-images-idx3-ubyte", test)
    write_idx(raw / "t10k-labels-idx1-ubyte", np.arange(5))

    data = load_dataset(name, data_dir=tmp_path)
    assert torch.equal(data.train_images, torch.from_numpy(train)[:, None])
    assert torch.equal(data.test_images, torch.from_numpy(test)[:, None])
    assert data.train_labels.tolist() == [*range(10), 0, 1]
    assert len(data.class_names) == 10
    assert len(load_dataset(name, data_dir=tmp_path, train_limit=7).train_images) == 7


def test_cifar10_is_read(tmp_path, monkeypatch, torchvision):
    reader = torchvision.datasets.CIFAR10
    monkeypatch.setattr(reader, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(reader, "test_list", [["test_batch", None]])
    monkeypatch.setattr(
        reader,
        "meta",
        {"filename": "batches.meta", "key": "label_names", "md5": None},
    )
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    train, test = random_images(6, 3 * 32 * 32), random_images(4, 3 * 32 * 32)
    contents = {
        "data_batch_1": {"data": train, "labels": [0, 1, 2, 3, 4, 5]},
        "test_batch": {"data": test, "labels": [9, 8, 7, 6]},
        "batches.meta": {"label_names": [f"class {i}" for i in range(10)]},
    }
    for name, content in contents.items():
        (batches / name).write_bytes(pickle.dumps(content))

    data = load_dataset("cifar10", data_dir=tmp_path)
    assert torch.equal(data.train_images, torch.from_numpy(train).reshape(6, 3, 32, 32))
    assert data.test_labels.tolist() == [9, 8, 7, 6]
    assert data.class_names[3] == "class 3"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("mnist", "MNIST/raw/train-images-idx3-ubyte"),
        ("fashion", "FashionMNIST/raw/train-images-idx3-ubyte"),
        ("cifar10", "cifar-10-batches-py/data_batch_1"),
        ("celeba", "celeba/ with the folder img_align_celeba/"),
    ],
)
def test_missing_data_are_told_where_to_go_and_how_to_fetch(tmp_path, name, place):
    with pytest.raises(UserError) as raised:
        load_dataset(name, data_dir=tmp_path)
    message = str(raised.value)
    assert f"--dataset {name}: expected {tmp_path}/{place}" in message
    assert "--data-dir" in message
    assert "--download" in message


def test_damaged_data_are_a_user_error_too(tmp_path):
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        write_idx(tmp_path / "MNIST" / "raw" / f"{name}-ubyte", np.zeros(3))
    with pytest.raises(UserError, match="--dataset mnist"):
        load_dataset("mnist", data_dir=tmp_path)


def test_the_real_mnist(real_mnist):
    data = load_dataset("mnist", data_dir=real_mnist, download=True)
    assert data.train_images.shape == (60_000, 1, 28, 28)
    assert data.test_images.shape == (10_000, 1, 28, 28)
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.train_images.double().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)
