"""Decoded images in a file, for data sets larger than memory.

A file holds the images of a list of image files, one after the other, and after them a mark for
each block of images that is there. An image is decoded when a data set is first read that has it:
before the training, so that a broken file is told then and not in the middle of it.

- The name of a file is a hash of what it is made of: the names, sizes and times of change of the
  image files in their order, the size of the images, and the versions of what decodes them. What
  was made of something else has another name, and is not read. Any of these files may be deleted
  when no training reads it.
- A block is on the disk before its mark is. So what was interrupted, by whatever, goes on where it
  was, and no half of an image is ever read.
- Of several processes that want the same file, such as the ranks of torchrun, one decodes and the
  others wait; the system frees the lock of one that was killed. What is complete is read without
  a lock, and may lie where nobody can write.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sqloss.common.errors import UserError, require, told
from sqloss.datasets.images import Decoding, decode, unreadable
from sqloss.models.pixels import Images

if TYPE_CHECKING:
    from sqloss.datasets.source import Place

FORMAT = 1  # of the file, and of what is done to an image
BLOCK = 256  # images: 3 MiB of faces with 64 pixels a side, beside which a sync costs little
CPU = torch.device("cpu")
AHEAD = 2  # batches that each worker has read before they are used


@dataclass(frozen=True)
class MappedImages:
    """Images in a file, uint8 [N, C, H, W], that are read as they are asked for.

    Slices and rows of them are tensors on ``device``, as those of a tensor are.
    """

    file: Path
    count: int  # of the images in the file
    image_shape: tuple[int, ...]
    rows: Tensor  # int64 [N] on the CPU: which of the images in the file these are
    workers: int
    device: torch.device = CPU

    @functools.cached_property
    def _mapped(self) -> Any:
        size = math.prod(self.image_shape)
        return require("numpy").memmap(self.file, "uint8", "r", shape=(self.count, size))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_mapped"}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.image_shape))

    def __getitem__(self, chosen: slice | Tensor) -> Tensor:
        rows = self.rows[chosen.cpu() if isinstance(chosen, Tensor) else chosen]
        images = torch.from_numpy(self._mapped[rows.numpy()])
        return images.view(-1, *self.image_shape).to(self.device)

    def of(self, chosen: Tensor) -> "MappedImages":
        """Some of these images, which stay in the file."""
        return dataclasses.replace(self, rows=self.rows[chosen.cpu()])

    def to(self, device: torch.device) -> "MappedImages":
        """These images; what is read of them comes to another device."""
        return dataclasses.replace(self, device=device)

    def ahead(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The images of each of these batches of rows, in order, read ahead by the workers."""
        waiting: deque[Future[Tensor]] = deque()
        with ThreadPoolExecutor(self.workers) as threads:
            try:
                for rows in batches:
                    waiting.append(threads.submit(self.__getitem__, rows))
                    if len(waiting) > AHEAD * self.workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()


def load_images(files: Sequence[Path], count: int, decoding: Decoding, place: "Place") -> Images:
    """The first ``count`` images of these files, in memory or, with ``--workers``, in a file."""
    if not place.workers:
        return in_memory(files[:count], decoding)
    path = place.cache / file_name(files, decoding, place.root)
    cache = CacheFile(path, len(files), math.prod(decoding.shape))
    with told(
        OSError,
        lambda error: (
            f"--cache-dir: cannot keep decoded images in {path}: "
            f"{error.strerror or error}; choose another folder"
        ),
    ):
        if cache.missing(count):
            with locked(path):
                fill(cache, cache.missing(count), files, decoding, place.workers)
    return MappedImages(path, len(files), decoding.shape, torch.arange(count), place.workers)


def in_memory(files: Sequence[Path], decoding: Decoding) -> Tensor:
    images = torch.empty(len(files), *decoding.shape, dtype=torch.uint8)
    with ThreadPoolExecutor() as threads, progress(len(files)) as done:
        for row, image in enumerate(decode(files, decoding, threads)):
            images[row] = image
            done.update()
    return images


def progress(images: int) -> Any:
    """A bar on a terminal, and nothing elsewhere."""
    return require("tqdm").tqdm(desc="images", total=images, leave=False, disable=None)


def file_name(files: Sequence[Path], decoding: Decoding, root: Path) -> str:
    """The name that says what a file of decoded images is made of."""
    versions = [require(module).__version__ for module in ("PIL", "torch", "torchvision")]
    made = [FORMAT, decoding.mode, decoding.shape, decoding.size, *versions]
    digest = hashlib.sha256(json.dumps(made).encode())
    for file in files:
        try:
            status = os.stat(file)
        except OSError as error:
            raise unreadable(file, error) from error
        digest.update(os.fsencode(file.relative_to(root)))
        digest.update(f"\0{status.st_size} {status.st_mtime_ns}\0".encode())
    sides = "x".join(map(str, decoding.shape))
    return f"{len(files)}x{sides}-{digest.hexdigest()[:24]}.images"


@dataclass(frozen=True)
class CacheFile:
    """Where what lies in a file of decoded images."""

    path: Path
    count: int  # of its images
    image_bytes: int

    @property
    def marks(self) -> int:
        """Where the marks of the blocks begin: behind all images."""
        return self.count * self.image_bytes

    @property
    def whole_bytes(self) -> int:
        return self.marks + math.ceil(self.count / BLOCK)

    def missing(self, count: int) -> list[int]:
        """The blocks of the first ``count`` images that are not there yet."""
        blocks = math.ceil(count / BLOCK)
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size != self.whole_bytes:
                    return list(range(blocks))
                file.seek(self.marks)
                marks = file.read(blocks)
        except FileNotFoundError:
            return list(range(blocks))
        return [block for block, mark in enumerate(marks) if not mark]


def fill(
    cache: CacheFile,
    blocks: Sequence[int],
    files: Sequence[Path],
    decoding: Decoding,
    workers: int,
) -> None:
    """Decode the missing blocks; whoever does holds the lock."""
    parts = [slice(block * BLOCK, (block + 1) * BLOCK) for block in blocks]
    images = sum(len(files[part]) for part in parts)
    check_space(cache.path.parent, images * cache.image_bytes)
    if not cache.path.exists() or cache.path.stat().st_size != cache.whole_bytes:
        cache.path.unlink(missing_ok=True)  # who has it open keeps it
        with cache.path.open("xb") as new:
            new.truncate(cache.whole_bytes)
    with (
        cache.path.open("r+b") as file,
        ThreadPoolExecutor(workers) as threads,
        progress(images) as done,
    ):
        for block, part in zip(blocks, parts, strict=True):
            file.seek(part.start * cache.image_bytes)
            for image in decode(files[part], decoding, threads):
                file.write(image.contiguous().numpy().data)
                done.update()
            file.flush()
            os.fsync(file.fileno())
            file.seek(cache.marks + block)
            file.write(b"\1")
            file.flush()


def check_space(folder: Path, needed: int) -> None:
    """Raise before hours of decoding; what fills the disk while they last is told as it happens."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"--cache-dir: expected {needed / 2**30:.2f} GiB of free space for decoded images in "
            f"{folder}, got {free / 2**30:.2f}; choose another folder"
        )


def locked(path: Path) -> Any:
    """A context that holds a file of decoded images for this process, once no other does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return require("filelock").FileLock(path.with_suffix(".lock"))
