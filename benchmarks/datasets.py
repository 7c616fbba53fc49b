"""Reading images: in memory, and with --workers from a file, on made faces in CelebA's size.

    python benchmarks/datasets.py --output benchmarks/results/datasets.md

The faces are files of a few different drawn ones, so the disk is not read; the processor is timed.
"""

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFilter

from sqloss.common.files import write_atomically
from sqloss.datasets import load_dataset

DIFFERENT = 100  # faces
TEST_SHARE = 0.1
BATCH = 128


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        draw_faces(Path(folder), args.images)
        rows = list(measured(folder, args.image_size, args.workers))
    text = "\n".join(table(rows, args.images, args.image_size)) + "\n"
    if args.output:
        write_atomically(args.output, text.encode())
    print(text)


def draw_faces(root: Path, count: int) -> None:
    """JPEGs of 178 x 218 pixels in train/ and test/, most of them links to a few."""
    originals = [root / f"{number}.jpg" for number in range(DIFFERENT)]
    for number, file in enumerate(originals):
        face = Image.effect_noise((178, 218), 40).convert("RGB")
        draw = ImageDraw.Draw(face)
        draw.ellipse((30, 40, 150, 190), fill=(200, 90 + number, 120))
        for x in (65, 105):
            draw.ellipse((x, 90, x + 10, 100), fill=(number, 30, 30))
        face.filter(ImageFilter.GaussianBlur(1)).save(file, quality=90)
    for part, images in (("train", count), ("test", max(1, round(TEST_SHARE * count)))):
        (root / part / "face").mkdir(parents=True)
        for number in range(images):
            os.link(originals[number % DIFFERENT], root / part / "face" / f"{number:07d}.jpg")


def measured(root: str, image_size: int, workers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Each in a process of its own, whose memory is told."""
    context = multiprocessing.get_context("spawn")
    for count in workers:
        with context.Pool(1) as pool:
            yield pool.apply(measure, (root, image_size, count))


def measure(root: str, image_size: int, workers: int) -> dict[str, Any]:
    def load() -> Any:
        place = {"data_dir": root, "cache_dir": f"{root}/cache-{workers}"}  # none is shared
        return load_dataset("folder", image_size=image_size, workers=workers, **place)

    torch.set_num_threads(1)
    load_dataset("folder", data_dir=root, image_size=image_size, train_limit=1)  # what is imported
    before = anonymous()
    start = time.perf_counter()
    data = load()
    first = time.perf_counter() - start
    start = time.perf_counter()
    if workers:
        data = load()
    again = time.perf_counter() - start if workers else first
    most = anonymous()
    orders = [torch.randperm(len(data)).split(BATCH) for _ in range(3)]
    times = []
    for order in orders:
        start = time.perf_counter()
        for images, _ in data.batches(order):
            images.sum()  # all is read
        times.append(time.perf_counter() - start)
        most = max(most, anonymous())
    return {
        "workers": workers,
        "first": first,
        "again": again,
        "epoch": len(data) / min(times),
        "memory": most - before,
    }


def anonymous() -> float:
    """The memory of this process that is of no file, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024


def table(rows: Sequence[dict[str, Any]], images: int, image_size: int) -> Iterator[str]:
    yield "# Reading images"
    yield ""
    yield f"{images:,} JPEGs of 178 x 218 pixels to train on and a tenth as many to test on, as"
    yield f"{image_size} x {image_size} pixels, with one thread to train on {os.cpu_count()} CPUs:"
    yield "the time until the data are there, the first time and every other; images a second in an"
    yield f"epoch that only reads batches of {BATCH} (the fastest of three); and the memory that is"
    yield "of no file."
    yield ""
    yield "| --workers | first time | again | images/s | memory |"
    yield "|:--|--:|--:|--:|--:|"
    for row in rows:
        where = f"{row['workers']}" if row["workers"] else "0 (in memory)"
        yield (
            f"| {where} | {row['first']:.1f} s | {row['again']:.1f} s | {row['epoch']:,.0f} "
            f"| {row['memory']:,.0f} MiB |"
        )


if __name__ == "__main__":
    sys.exit(main())
