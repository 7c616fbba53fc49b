import dataclasses
import io
import pickle
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sqloss.training.config import to_stored
from sqloss.training.data import (
    Dataset,
    Source,
    image_folder,
    load_dataset,
    parse_imbalance,
    refuse_output_among_data,
    thinned,
)
from sqloss.training.errors import UserError, require
from sqloss.training.files import as_json
from sqloss.training.vae.config import VAEConfig

try:
    from torchvision import datasets
except (ImportError, RuntimeError) as error:
    datasets, torchvision_error = None, str(error)
needs_torchvision = pytest.mark.skipif(
    datasets is None, reason="torchvision cannot be imported here"
)


def images_of(data) -> list:
    return [data.train_images, data.train_labels, data.test_images, data.test_labels]


def assert_equal_data(first, second):
    for a, b in zip(images_of(first), images_of(second), strict=True):
        assert torch.equal(a, b)


# digits


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return load_dataset("digits", Source())


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


def test_digits_are_split_evenly_and_always_alike(digits):
    shares = torch.bincount(digits.test_labels) / len(digits.test_labels)
    whole = torch.tensor(digits.class_counts()) / len(digits.train_labels)
    torch.testing.assert_close(shares, whole, atol=0.01, rtol=0)
    assert_equal_data(digits, load_dataset("digits", Source()))


def test_limit_takes_the_first_training_images(digits):
    limited = load_dataset("digits", Source(limit=100))
    assert torch.equal(limited.train_images, digits.train_images[:100])
    assert torch.equal(limited.train_labels, digits.train_labels[:100])
    assert torch.equal(limited.test_images, digits.test_images)


def test_image_size_resizes(digits):
    larger = load_dataset("digits", Source(image_size=12))
    assert larger.shape == (1, 12, 12)
    means = [data.train_images.float().mean().item() for data in (larger, digits)]
    assert means[0] == pytest.approx(means[1], rel=0.1)


def test_digits_do_without_torchvision(monkeypatch, digits):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    assert_equal_data(digits, load_dataset("digits", Source()))
    with pytest.raises(UserError, match=r"torchvision is needed .* pip install 'sqloss\[train\]'"):
        load_dataset("mnist", Source())


def test_a_torchvision_for_another_torch_is_told_from_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "mismatched.py").write_text(
        "raise RuntimeError('operator mismatched::nms does not exist')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=rf"mismatched .* does not load beside torch .*{'nms'}"):
        require("mismatched")


# imbalance


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("none", {}),
        ("0:0.1, 3:0.5", {"0": 0.1, " 3": 0.5}),
        ("2:0", {"2": 0.0}),
        ("cat:1e-1,sea lion:.5", {"cat": 0.1, "sea lion": 0.5}),
        ("a,b:0.5,c:d:1,e:f,g:0", {"a,b": 0.5, "c:d": 1.0, "e:f,g": 0.0}),
    ],
)
def test_imbalance_is_parsed(text, shares):
    assert parse_imbalance(text) == shares


@pytest.mark.parametrize("text", ["", "0", "0:", ":0.1", "0:0.1,", "0:1.5", "0:nan", "0:.1,0:.2"])
def test_a_bad_imbalance_says_what_is_expected(text):
    with pytest.raises(UserError, match="--imbalance: expected 'none' or CLASS:SHARE") as raised:
        parse_imbalance(text)
    assert repr(text) in str(raised.value)


def test_imbalance_keeps_exact_shares_of_the_training_images_only(digits):
    rare = digits.imbalanced("0:0.1,3:0.5", seed=0)
    before, after = digits.class_counts(), rare.class_counts()
    assert after[0] == round(0.1 * before[0])
    assert after[3] == round(0.5 * before[3])
    assert [after[i] for i in (1, 2, 4, 5, 6, 7, 8, 9)] == [
        before[i] for i in (1, 2, 4, 5, 6, 7, 8, 9)
    ]
    assert rare.test_images is digits.test_images
    assert rare.test_labels is digits.test_labels


def test_imbalance_keeps_images_with_their_labels(digits):
    rare = digits.imbalanced("0:0.1", seed=0)
    known = {
        (image.numpy().tobytes(), int(label))
        for image, label in zip(digits.train_images, digits.train_labels, strict=True)
    }
    assert all(
        (image.numpy().tobytes(), int(label)) in known
        for image, label in zip(rare.train_images, rare.train_labels, strict=True)
    )


def test_imbalance_depends_on_the_seed_only(digits):
    first, second, other = (digits.imbalanced("0:0.1", seed) for seed in (0, 0, 1))
    assert_equal_data(first, second)
    assert first.class_counts() == other.class_counts()
    assert not torch.equal(first.train_images, other.train_images)


def test_imbalance_none_keeps_all(digits):
    assert_equal_data(digits, digits.imbalanced("none", seed=0))


@pytest.mark.parametrize("name", ["10", "-1", "x", "0.5"])
def test_imbalance_of_an_unknown_class(digits, name):
    with pytest.raises(
        UserError, match=rf"^--imbalance: expected one of the classes 0, 1, .* 0 to 9, got '{name}'"
    ):
        digits.imbalanced(f"{name}:0.5", seed=0)


@pytest.mark.parametrize(
    ("imbalance", "shares"),
    [
        ("2:0.1", {4: 0.1}),  # the class of that name, and not the third one
        ("cat:0.1, dog, or not:0.5", {5: 0.1, 6: 0.5}),
        ("5:0.1", {5: 0.1}),  # nobody's name
    ],
)
def test_a_class_is_named_or_else_counted(imbalance, shares):
    assert thinned(imbalance, ("0", "1", "10", "11", "2", "cat", "dog, or not")) == shares


@pytest.mark.parametrize("imbalance", ["cat:0.1,0:0.5", "0:0.5, 0:0.1"])
def test_imbalance_of_one_class_twice(imbalance):
    with pytest.raises(UserError, match="each class once"):
        thinned(imbalance, ("cat", "dog"))


def test_what_there_is_to_train_on_is_told_by_name(digits):
    whole = dataclasses.replace(digits, class_names=("c\nat", *digits.class_names[1:]))
    data = whole.imbalanced("3:0.1", seed=0)
    counts, before = data.class_counts(), whole.class_counts()
    words = data.in_words(whole)
    assert words.startswith(f"data: digits, {sum(counts)} training images of 1 x 8 x 8, per class ")
    assert f"per class c\\nat: {counts[0]}, 1: " in words
    assert f"2: {counts[2]}, 3: {counts[3]} of {before[3]}, 4: " in words
    assert words.endswith("; 360 test images")


@pytest.mark.parametrize(("share", "left"), [(1e-9, 1), (0, 0)])
def test_only_a_share_of_0_removes_a_class(digits, share, left):
    assert digits.imbalanced(f"4:{share}", seed=0).class_counts()[4] == left


def test_a_class_without_images_stays_so(digits):
    none_left = digits.imbalanced("4:0", seed=0)
    assert none_left.imbalanced("4:0.5", seed=0).class_counts()[4] == 0


def test_imbalance_that_leaves_nothing(digits):
    with pytest.raises(UserError, match="leaves no training image"):
        digits.imbalanced(",".join(f"{i}:0" for i in range(10)), seed=0)


def test_the_fingerprint_tells_data_apart(digits):
    assert digits.fingerprint() == load_dataset("digits", Source()).fingerprint()
    assert digits.fingerprint() != digits.imbalanced("0:0.1", seed=0).fingerprint()
    for labels in ("train_labels", "test_labels"):
        relabelled = {labels: getattr(digits, labels).flip(0)}
        assert digits.fingerprint() != dataclasses.replace(digits, **relabelled).fingerprint()


# MNIST and its like


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def random_images(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(count).integers(256, size=(count, *shape), dtype=np.uint8)


@needs_torchvision
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion", "FashionMNIST")])
def test_mnist_and_fashion_are_read(tmp_path, name, folder):
    train, test = random_images(12, 28, 28), random_images(5, 28, 28)
    raw = tmp_path / folder / "raw"
    write_idx(raw / "train-images-idx3-ubyte", train)
    write_idx(raw / "train-labels-idx1-ubyte", np.arange(12) % 10)
    write_idx(raw / "t10k-images-idx3-ubyte", test)
    write_idx(raw / "t10k-labels-idx1-ubyte", np.arange(5))

    data = load_dataset(name, Source(data_dir=tmp_path))
    assert torch.equal(data.train_images, torch.from_numpy(train)[:, None])
    assert torch.equal(data.test_images, torch.from_numpy(test)[:, None])
    assert data.train_labels.tolist() == [*range(10), 0, 1]
    assert len(data.class_names) == 10
    assert len(load_dataset(name, Source(data_dir=tmp_path, limit=7)).train_images) == 7


@needs_torchvision
def test_cifar10_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(
        datasets.CIFAR10,
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

    data = load_dataset("cifar10", Source(data_dir=tmp_path))
    assert torch.equal(data.train_images, torch.from_numpy(train).reshape(6, 3, 32, 32))
    assert data.test_labels.tolist() == [9, 8, 7, 6]
    assert data.class_names[3] == "class 3"


@needs_torchvision
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
        load_dataset(name, Source(data_dir=tmp_path))
    message = str(raised.value)
    assert f"--dataset {name}: expected {tmp_path}/{place}" in message
    assert "--data-dir" in message
    assert "--download" in message


@needs_torchvision
def test_damaged_data_are_a_user_error_too(tmp_path):
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        write_idx(tmp_path / "MNIST" / "raw" / f"{name}-ubyte", np.zeros(3))
    with pytest.raises(UserError, match="--dataset mnist"):
        load_dataset("mnist", Source(data_dir=tmp_path))


def test_the_real_mnist(real_mnist):
    data = load_dataset("mnist", Source(data_dir=real_mnist, download=True))
    assert data.train_images.shape == (60_000, 1, 28, 28)
    assert data.test_images.shape == (10_000, 1, 28, 28)
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.train_images.double().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)


# CelebA

ATTRIBUTES = ["Eyeglasses", "Smiling"]


@pytest.fixture
def celeba(tmp_path, monkeypatch) -> Path:
    """Eight faces in torchvision's layout: five to train on, one to validate and two to test.

    A face is grey with its own brightness, between red bands that the square crop cuts off.
    """
    if datasets is None:
        pytest.skip("torchvision cannot be imported here")
    monkeypatch.setattr(
        datasets.CelebA,
        "file_list",
        [(None, None, name) for _, _, name in datasets.CelebA.file_list],
    )
    root = tmp_path / "celeba"
    (root / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(1, 9)]
    for i, name in enumerate(names):
        face = np.full((218, 178, 3), 20 * i, dtype=np.uint8)
        face[:20] = face[-20:] = (255, 0, 0)
        Image.fromarray(face).save(root / "img_align_celeba" / name, format="PNG")

    def table(file: str, header: list[str], row) -> None:
        lines = [*header, *(f"{name} {row(i)}" for i, name in enumerate(names))]
        (root / file).write_text("\n".join(lines) + "\n")

    table(
        "list_attr_celeba.txt",
        ["8", " ".join(ATTRIBUTES)],
        lambda i: f"-1 {1 if i % 2 else -1}",
    )
    table("identity_CelebA.txt", [], lambda i: i + 1)
    table("list_bbox_celeba.txt", ["8", "image_id x_1 y_1 width height"], lambda i: "0 0 9 9")
    table("list_landmarks_align_celeba.txt", ["8", "lefteye_x lefteye_y"], lambda i: "1 2")
    table("list_eval_partition.txt", [], lambda i: 0 if i < 5 else 1 if i == 5 else 2)
    return tmp_path


def test_celeba_is_cropped_resized_and_labelled_by_its_attribute(celeba):
    data = load_dataset("celeba", Source(data_dir=celeba))
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
    source = Source(data_dir=celeba, image_size=16, limit=2, celeba_attribute="Eyeglasses")
    data = load_dataset("celeba", source)
    assert data.train_images.shape == (2, 3, 16, 16)
    assert data.train_labels.tolist() == [0, 0]
    assert data.class_names == ("not Eyeglasses", "Eyeglasses")


def test_an_unknown_attribute_of_celeba(celeba):
    with pytest.raises(UserError, match="expected one of Eyeglasses, Smiling, got 'Bald'"):
        load_dataset("celeba", Source(data_dir=celeba, celeba_attribute="Bald"))


def test_fetching_faces_needs_gdown_and_has_a_quota(tmp_path, monkeypatch):
    if datasets is None:
        pytest.skip("torchvision cannot be imported here")
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(UserError, match=r"needs `pip install gdown`.*daily quota"):
        load_dataset("celeba", Source(data_dir=tmp_path, download=True))


def test_a_missing_face_is_named(celeba):
    (celeba / "celeba" / "img_align_celeba" / "000003.jpg").unlink()
    with pytest.raises(UserError, match=r"cannot read the image .*000003\.jpg"):
        load_dataset("celeba", Source(data_dir=celeba))


# folders


def write_images(root: Path, classes: dict[str, int], size=(6, 5), mode: str = "L") -> None:
    for value, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new(mode, size, 10 * value + i if mode == "L" else (value, i, 9)).save(
                root / name / f"{i}.png"
            )


@needs_torchvision
def test_a_folder_is_split_evenly_and_keeps_its_grey_and_its_size(tmp_path):
    write_images(tmp_path, {"cat": 10, "dog": 20})
    data = load_dataset("folder", Source(data_dir=tmp_path))
    assert data.class_names == ("cat", "dog")
    assert data.shape == (1, 5, 6)
    assert data.class_counts() == [8, 16]
    assert torch.bincount(data.test_labels).tolist() == [2, 4]
    values = torch.cat([data.train_images, data.test_images])[:, 0, 0, 0]
    assert sorted(values.tolist()) == sorted([*range(10), *range(10, 30)])
    assert all(
        (value >= 10) == label
        for value, label in zip(
            data.train_images[:, 0, 0, 0].tolist(), data.train_labels.tolist(), strict=True
        )
    )
    assert_equal_data(data, load_dataset("folder", Source(data_dir=tmp_path)))


@needs_torchvision
def test_a_folder_with_train_and_test_keeps_that_split(tmp_path):
    write_images(tmp_path / "train", {"cat": 6, "dog": 6}, mode="RGB")
    write_images(tmp_path / "test", {"cat": 1, "dog": 2}, mode="RGB")
    data = load_dataset("folder", Source(data_dir=tmp_path))
    assert data.shape == (3, 5, 6)
    assert data.class_counts() == [6, 6]
    assert data.test_labels.tolist() == [0, 1, 1]
    assert data.test_images[2, :, 0, 0].tolist() == [1, 1, 9]
    first = load_dataset("folder", Source(data_dir=tmp_path, limit=6))
    assert all(first.class_counts()), "the first images are not all of the first class"


@needs_torchvision
def test_a_folder_of_mixed_sizes_and_colours(tmp_path):
    write_images(tmp_path, {"cat": 5}, size=(40, 50))
    write_images(tmp_path, {"dog": 5}, size=(64, 64), mode="RGB")
    assert load_dataset("folder", Source(data_dir=tmp_path)).shape == (3, 32, 32)
    assert load_dataset("folder", Source(data_dir=tmp_path, image_size=20)).shape == (3, 20, 20)


@needs_torchvision
@pytest.mark.parametrize("make", [[], ["empty-class"]])
def test_a_folder_without_images(tmp_path, make):
    for name in make:
        (tmp_path / name).mkdir()
    with pytest.raises(
        UserError, match="--dataset folder: expected one folder of images per class"
    ):
        load_dataset("folder", Source(data_dir=tmp_path))


@needs_torchvision
def test_a_file_for_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"one folder of images per class.* Not a directory"):
        load_dataset("folder", Source(data_dir=tmp_path / "file"))


@needs_torchvision
@pytest.mark.parametrize(
    ("dtype", "suffix"), [(np.uint16, "png"), (np.int32, "tiff"), (np.float32, "tiff")]
)
def test_images_of_more_than_8_bits_are_refused_by_name(tmp_path, dtype, suffix):
    write_images(tmp_path, {"cat": 5, "dog": 5})
    deep = tmp_path / "cat" / f"deep.{suffix}"
    Image.fromarray(np.full((5, 6), 300, dtype=dtype)).save(deep)
    with pytest.raises(UserError, match=f"{deep}: expected an image of 8 bits per channel, got"):
        load_dataset("folder", Source(data_dir=tmp_path))


@needs_torchvision
def test_a_folder_with_half_a_split(tmp_path):
    write_images(tmp_path / "train", {"cat": 3})
    with pytest.raises(UserError, match=r"expected train/ and test/ .* got only one"):
        load_dataset("folder", Source(data_dir=tmp_path))


@needs_torchvision
def test_a_folder_with_other_classes_in_test(tmp_path):
    write_images(tmp_path / "train", {"cat": 3, "dog": 3})
    write_images(tmp_path / "test", {"cat": 3})
    with pytest.raises(UserError, match=r"the same classes .* got dog in one of them only"):
        load_dataset("folder", Source(data_dir=tmp_path))


@needs_torchvision
def test_a_folder_too_small_to_split(tmp_path):
    write_images(tmp_path, {"cat": 1, "dog": 9})
    with pytest.raises(UserError, match="expected enough images for a test set"):
        load_dataset("folder", Source(data_dir=tmp_path))


def huge_png() -> bytes:
    """The head of a PNG of 20,000 x 20,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


def encoded(suffix: str) -> bytes:
    content = io.BytesIO()
    Image.fromarray(random_images(30, 20, 1)[..., 0]).save(content, suffix)
    return content.getvalue()


BROKEN = {
    "none.png": b"",
    "text.png": b"no image",
    "huge.png": huge_png(),
    "cut.png": encoded("png")[:-60],
    "sized.png": encoded("png").replace(b"IHDR\0\0\0\x14", b"IHDR\0\0"),
    "words.pgm": b"P5 six 5 255\n" + bytes(30),
    "deep.pgm": b"P5 6 5 99999999\n" + bytes(30),
    "wide.ppm": b"P6 " + b"9" * 40 + b" 5 255\n",
    "cut.tiff": encoded("tiff")[:40],
    "tags.tiff": b"II*\0\x08\0\0\0\x01\0\x00\x01\x03\0\xff\xff\xff\xff",
    "cut.jpg": encoded("jpeg")[:100],
    "cut.webp": b"RIFF\x10\0\0\0WEBPVP8 ",
    "cut.bmp": encoded("bmp")[:20],
}


@needs_torchvision
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("name", [*BROKEN, "link.png"])
def test_an_unreadable_image_is_named(tmp_path, name):
    write_images(tmp_path, {"cat": 5})
    broken = tmp_path / "cat" / name
    broken.write_bytes(BROKEN[name]) if name in BROKEN else broken.symlink_to("nowhere")
    with pytest.raises(UserError, match=rf"^cannot read the image {broken}: ."):
        load_dataset("folder", Source(data_dir=tmp_path))


@needs_torchvision
def test_hidden_files_and_folders_are_no_data(tmp_path):
    write_images(tmp_path, {"cat": 5, "dog": 5, ".ipynb_checkpoints": 5})
    seen = load_dataset("folder", Source(data_dir=tmp_path))
    assert seen.class_names == ("cat", "dog")
    for place in (".git", "__MACOSX/cat", "cat/.thumbnails", "dog/@eaDir/x", "lost+found"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "1.png").write_bytes(b"no image")
    (tmp_path / "lost+found" / "1.png").unlink()
    (tmp_path / "cat" / "._1.png").write_bytes(b"no image")
    (tmp_path / "dog" / "Thumbs.db").write_bytes(b"no image")
    assert_equal_data(load_dataset("folder", Source(data_dir=tmp_path)), seen)
    hidden = tmp_path.rename(tmp_path.with_name(f".{tmp_path.name}"))
    assert_equal_data(load_dataset("folder", Source(data_dir=hidden)), seen)
    for shown in ("cat", "dog"):
        (hidden / shown).rename(hidden / f".{shown}")
    with pytest.raises(UserError, match=r"one folder of images per class.*no folder in"):
        load_dataset("folder", Source(data_dir=hidden))


@needs_torchvision
def test_images_are_ordered_as_by_torchvision(tmp_path):
    """So that runs of before can be resumed."""
    for name in ("cat", "cat/b", "cat/b-c", "cat/b/a", "cat/B", "Dog"):
        (tmp_path / name).mkdir()
        for i in ("10.png", "9.PNG", "x.jpeg", "y.gif", "z.txt"):
            (tmp_path / name / i).touch()
    found = datasets.ImageFolder(tmp_path)
    files, labels, classes = image_folder(tmp_path)
    assert [str(file) for file in files] == [file for file, _ in found.samples]
    assert labels.tolist() == found.targets
    assert list(classes) == found.classes


@needs_torchvision
@pytest.mark.parametrize("place", [".", "runs/vae-1", "cat/deep/er"])
def test_a_run_among_the_images_is_no_data(tmp_path, place):
    write_images(tmp_path, {"cat": 5, "dog": 5})
    (tmp_path / "cat" / "config.json").write_text('{"command": "of another program"}')
    assert len(load_dataset("folder", Source(data_dir=tmp_path)).class_names) == 2
    run = tmp_path / place
    write_images(run, {"pictures": 1})
    (run / "config.json").write_bytes(as_json(to_stored(VAEConfig())))
    with pytest.raises(UserError, match=rf"--dataset folder: .* got the run {run}, .* move it"):
        load_dataset("folder", Source(data_dir=tmp_path))


@pytest.mark.parametrize("split", [False, True])
def test_output_among_the_images_is_refused(tmp_path, monkeypatch, split):
    root, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    part = "train/" if split else ""
    for name in ("train", "test") if split else (".",):
        (root / name / "cat").mkdir(parents=True)
    elsewhere.mkdir()
    (root / part / "linked").symlink_to(elsewhere)
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(root)

    def is_refused(directory: Path) -> bool:
        for data_dir in (root, Path(".")):
            try:
                refuse_output_among_data("folder", Source(data_dir=data_dir), directory)
            except UserError as error:
                assert f"got {directory}, which is in" in str(error)
                continue
            return False
        return True

    inside = [f"{part}{place}" for place in ("", "cat/run", "runs/new", "cat/../cat", "linked/run")]
    for place in (*inside, f"../link/{part}x", str(elsewhere)):
        assert is_refused(Path(place)), place
    for place in ("../runs", f"{part}.runs/new", f"{part}cat/.run", "/", *["runs"] * split):
        assert not is_refused(Path(place)), place
    refuse_output_among_data("digits", Source(data_dir=root), Path("runs"))
    refuse_output_among_data("folder", Source(data_dir=tmp_path / "none"), Path("runs"))


# the order of an epoch


def rare(counts):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images = torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8)
    return Dataset("rare", tuple("abc"), images, labels, images, labels)
