import errno
import multiprocessing
import os
import pickle
import re
import signal
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sqloss.common.errors import UserError
from sqloss.datasets import cache, load_dataset
from sqloss.datasets.cache import MappedImages

pytestmark = pytest.mark.usefixtures("torchvision")
SIZE = 12


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Twenty images of noise to train on, in blocks of four, and two to test on."""
    monkeypatch.setattr(cache, "BLOCK", 4)
    draws = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 1)):
        for name in ("cat", "dog"):
            place = tmp_path / part / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = draws.integers(256, size=(20, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return tmp_path


@pytest.fixture
def decoded(monkeypatch) -> list[Path]:
    """The files that are decoded, as they are."""
    seen = []
    real = cache.decode

    def spy(files, *rest):
        seen.extend(files)
        return real(files, *rest)

    monkeypatch.setattr(cache, "decode", spy)
    return seen


def load(folder: Path, workers: int = 2, **flags):
    return load_dataset("folder", data_dir=folder, image_size=SIZE, workers=workers, **flags)


def test_images_in_a_file_have_the_bits_of_those_in_memory(folder, assert_equal_data):
    in_file, in_memory = load(folder), load(folder, workers=0)
    assert isinstance(in_file.train_images, MappedImages)
    assert isinstance(in_memory.train_images, torch.Tensor)
    assert in_file.shape == in_memory.shape == (3, SIZE, SIZE)
    assert_equal_data(in_file, in_memory)
    assert in_file.fingerprint() == in_memory.fingerprint()


@pytest.mark.parametrize("image_size", [0, 7])
def test_whatever_their_size(folder, assert_equal_data, image_size):
    flags = {"data_dir": folder, "image_size": image_size}
    assert_equal_data(
        load_dataset("folder", workers=1, **flags), load_dataset("folder", workers=0, **flags)
    )


def test_faces_in_a_file_have_the_bits_of_those_in_memory(
    tmp_path, write_celeba, assert_equal_data
):
    faces = [Image.effect_noise((178, 218), 50 + i).convert("RGB") for i in range(8)]
    write_celeba(tmp_path, faces, {"Smiling": [True, False] * 4}, [0] * 4 + [1, 1, 2, 2])
    read = [load_dataset("celeba", data_dir=tmp_path, workers=w, train_limit=3) for w in (0, 1)]
    assert_equal_data(*read)


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_those_of_memory(folder, workers):
    in_file, in_memory = (load(folder, w).imbalanced("cat:0.5", 0) for w in (workers, 0))
    assert in_file.fingerprint() == in_memory.fingerprint()
    rows = torch.randint(len(in_memory), (9, 4), generator=torch.Generator().manual_seed(0))
    batches = [list(data.batches(rows)) for data in (in_file, in_memory)]
    assert len(batches[0]) == 9
    for ours, theirs in zip(*batches, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_images_in_a_file_are_read_as_a_tensor_is(folder):
    in_file, tensor = load(folder).train_images, load(folder, workers=0).train_images
    assert (len(in_file), in_file.shape, in_file.device) == (20, tensor.shape, tensor.device)
    for chosen in (slice(3), slice(5, None), torch.tensor([4, 4, 0]), torch.arange(20) % 3 == 1):
        assert torch.equal(in_file[chosen], tensor[chosen])
        assert torch.equal(in_file.of(torch.arange(20))[chosen], tensor[chosen])
    assert in_file[torch.tensor([], dtype=torch.int64)].shape == (0, 3, SIZE, SIZE)
    assert in_file.to(torch.device("meta"))[:2].device.type == "meta"
    assert torch.equal(pickle.loads(pickle.dumps(in_file))[:], tensor)
    in_file[:1].zero_()
    assert torch.equal(in_file[:], tensor), "what is read may be changed"


def test_an_epoch_that_is_stopped_leaves_no_thread(folder):
    import threading

    before = threading.active_count()
    batches = load(folder).batches(torch.arange(20).split(2))
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_images_are_decoded_once(folder, decoded, monkeypatch):
    first = load(folder)
    assert len(decoded) == len(set(decoded)) == 22
    monkeypatch.setattr(cache, "locked", None)  # so that one needs no right to write there
    again = load(folder)
    assert len(decoded) == 22
    assert torch.equal(again.train_images[:], first.train_images[:])


def test_with_a_limit_only_its_blocks_are_decoded(folder, decoded, assert_equal_data):
    assert_equal_data(load(folder, train_limit=5), load(folder, workers=0, train_limit=5))
    assert len(set(decoded)) == 8 + 2
    assert_equal_data(load(folder), load(folder, workers=0))
    assert len(decoded) == (8 + 2) + (5 + 2) + 12 + 22


def rewrite(file: Path) -> None:
    Image.effect_noise((16, 20), 99).convert("RGB").save(file)


def touch(file: Path) -> None:
    os.utime(file, ns=(1, 1))


def rename(file: Path) -> None:
    file.rename(file.with_name("00.png"))


@pytest.mark.parametrize("change", [rewrite, touch, rename, Path.unlink])
def test_what_was_made_of_other_files_is_not_read(folder, decoded, assert_equal_data, change):
    load(folder)
    change(folder / "train" / "cat" / "3.png")
    decoded.clear()
    assert_equal_data(load(folder), load(folder, workers=0))
    files = 20 - (change is Path.unlink)
    assert len(decoded) == files + (files + 2)  # those to test on are not decoded into it again


def test_another_size_has_a_file_of_its_own(folder, assert_equal_data):
    for size in (5, 6, 5):
        read = [load_dataset("folder", data_dir=folder, image_size=size, workers=w) for w in (1, 0)]
        assert_equal_data(*read)


def test_what_was_interrupted_goes_on(folder, monkeypatch, assert_equal_data):
    real, calls = cache.decode, []

    def interrupted(files, *rest):
        calls.append(files)
        for number, image in enumerate(real(files, *rest)):
            if len(calls) == 3 and number == 2:
                raise KeyboardInterrupt
            yield image

    monkeypatch.setattr(cache, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(folder)
    assert_equal_data(load(folder), load(folder, workers=0))
    # two blocks, half of the third, the rest of five, those to test on; then all in memory
    assert list(map(len, calls)) == [4, 4, 4, 4, 4, 4, 2, 20, 2]


def in_processes(count: int, work) -> list:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work) for _ in range(count)]
    for process in processes:
        process.start()
    return processes


def test_a_process_that_is_killed_holds_nobody_up(folder, monkeypatch, assert_equal_data):
    real = cache.decode

    def killed():
        def decode(files, *rest):
            if len(list((folder / cache_dir).glob("*.images"))) and "5.png" in map(
                lambda file: file.name, files
            ):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(files, *rest)

        cache.decode = decode
        load(folder)

    cache_dir = ".sqloss-cache"
    [process] = in_processes(1, killed)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert_equal_data(load(folder), load(folder, workers=0))


def test_of_several_processes_one_decodes(folder, assert_equal_data):
    log = folder / "decoded"
    real = cache.decode

    def work():
        def decode(files, *rest):
            with log.open("a") as lines:
                lines.writelines(f"{file}\n" for file in files)
            return real(files, *rest)

        cache.decode = decode
        data = load(folder)
        os._exit(int(data.fingerprint() != expected))

    expected = load(folder, workers=0).fingerprint()
    processes = in_processes(3, work)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    files = log.read_text().splitlines()
    assert len(files) == len(set(files)) == 22


@pytest.mark.parametrize("damage", ["cut", "longer", "gone"])
def test_a_file_that_is_not_whole_is_made_anew(folder, assert_equal_data, damage):
    load(folder)
    for file in (folder / ".sqloss-cache").glob("*.images"):
        content = file.read_bytes()
        file.write_bytes({"cut": content[:-1], "longer": content + b"\1", "gone": b""}[damage])
        if damage == "gone":
            file.unlink()
    assert_equal_data(load(folder), load(folder, workers=0))


def test_a_disk_without_room_is_told_before_anything_is_decoded(folder, decoded, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage(20 * 3 * SIZE * SIZE - 1))
    with pytest.raises(UserError, match=r"--cache-dir: expected 0.00 GiB of free space .* another"):
        load(folder)
    assert not decoded


def test_a_disk_that_fills_up_is_told_and_what_is_there_is_kept(
    folder, monkeypatch, decoded, assert_equal_data
):
    real, synced = os.fsync, []

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "fsync", full)
        with pytest.raises(UserError, match=r"--cache-dir: .* No space left on device; choose"):
            load(folder)
    decoded.clear()
    assert_equal_data(load(folder), load(folder, workers=0))
    assert len(decoded) == 12 + 2 + 22


def test_a_place_that_cannot_be_written_is_told(folder):
    (folder / "file").touch()
    with pytest.raises(UserError, match=rf"--cache-dir: cannot keep .* in {folder}/file/.*another"):
        load(folder, cache_dir=folder / "file")


def test_another_place_is_taken(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("elsewhere") / "a" / "b"
    load(folder, cache_dir=place)
    assert len(list(place.glob("*.images"))) == 2
    assert not (folder / ".sqloss-cache").exists()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("file", ["train/dog/9.png", "test/cat/0.png"])
def test_a_broken_image_is_named_before_the_training(folder, workers, file):
    broken = folder / file
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])  # the head is whole
    with pytest.raises(UserError, match=f"cannot read the image {re.escape(str(broken))}"):
        load(folder, workers)
    broken.write_bytes(content)
    load(folder, workers)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_images_in_a_file_take_no_memory(tmp_path):
    """Of 400 images of 147 KiB, 57 MiB."""
    image = tmp_path / "image.png"
    Image.new("RGB", (224, 224), (1, 2, 3)).save(image)
    for part, count in (("train", 400), ("test", 1)):
        (tmp_path / part / "cat").mkdir(parents=True)
        for number in range(count):
            os.link(image, tmp_path / part / "cat" / f"{number}.png")

    def grown(workers: int, numbers) -> None:
        before = anonymous()
        data = load_dataset("folder", data_dir=tmp_path, workers=workers)
        loaded = anonymous()
        data = data.imbalanced("cat:0.9", 0)
        data.fingerprint()
        for _ in data.batches(torch.randperm(len(data)).split(16)):
            pass
        numbers[workers] = max(loaded, anonymous()) - before

    numbers = multiprocessing.Array("d", 3)
    for workers in (2, 0):
        [process] = in_processes(1, lambda workers=workers: grown(workers, numbers))
        process.join(120)
        assert process.exitcode == 0
    assert numbers[0] > 50 and numbers[2] < 30, list(numbers)


def anonymous() -> float:
    """The memory of this process that is of no file, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024
