"""Groups without labels: the time of neighbours, communities and their stability, by their number.

    python benchmarks/groups.py --output benchmarks/results/groups.md
    python benchmarks/groups.py --images 60000

Features are draws around 30 centres, 20 of each image, as the means of an encoder would be.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqloss.common.files import write_atomically
from sqloss.groups import communities, nearest_neighbours, stability
from sqloss.groups.communities import library

SIZE, CENTRES, APART = 20, 30, 2.0
NEIGHBOURS = 10
ROWS = 1024  # of the products that make the floor
LIBRARIES = ("scikit-network", "networkx")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[2_000, 18_000], metavar="N")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    rows = [row for images in args.images for row in measured(images)]
    text = "\n".join(table(rows, args.threads)) + "\n"
    if args.output:
        write_atomically(args.output, text.encode())
    print(text)


def features(images: int) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    centres = APART * torch.randn(CENTRES, SIZE, generator=draws)
    numbers = torch.randint(CENTRES, (images,), generator=draws)
    return centres[numbers] + torch.randn(images, SIZE, generator=draws)


def measured(images: int) -> Iterator[dict[str, Any]]:
    """A row for each library that is there; neighbours are the same for all."""
    x = features(images)
    near = {
        "floor": seconds(lambda: [torch.mm(x[i : i + ROWS], x.T) for i in range(0, images, ROWS)]),
        "neighbours": seconds(lambda: nearest_neighbours(x, NEIGHBOURS)),
    }
    for name in LIBRARIES:
        with hidden("sknetwork.clustering") if name == "networkx" else contextlib.nullcontext():
            if library() != name:
                continue
            groups = communities(x, neighbours=NEIGHBOURS)
            yield {
                "images": images,
                "library": name,
                **near,
                "communities": seconds(lambda: communities(x, neighbours=NEIGHBOURS)),
                "stability": seconds(
                    lambda groups=groups: stability(x, groups, neighbours=NEIGHBOURS)
                ),
                "groups": int(groups.max()) + 1,
            }


@contextlib.contextmanager
def hidden(module: str) -> Iterator[None]:
    """As if it were not installed. Other modules stay: compiled ones load once in a process."""
    before = sys.modules.get(module)
    sys.modules[module] = None
    try:
        yield
    finally:
        del sys.modules[module]
        if before is not None:
            sys.modules[module] = before


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def table(rows: Sequence[dict[str, Any]], threads: int) -> Iterator[str]:
    yield "# Groups without labels"
    yield ""
    yield f"Seconds, one run each, for {SIZE} features of each image and {NEIGHBOURS} neighbours;"
    yield f"threads: {threads}. The floor of the neighbours is one product of all features with"
    yield "all, which makes their distances. That of the communities is the neighbours, which they"
    yield "begin with. That of the stability, four times .8 of the images, is 2.6 times the"
    yield "neighbours and 3.2 times what the communities take beside these."
    yield ""
    yield "| images | library | floor | neighbours | communities | stability | groups |"
    yield "|--:|:--|--:|--:|--:|--:|--:|"
    for row in rows:
        times = " | ".join(
            f"{row[name]:.2f}" for name in ("floor", "neighbours", "communities", "stability")
        )
        yield f"| {row['images']:,} | {row['library']} | {times} | {row['groups']} |"


if __name__ == "__main__":
    sys.exit(main())
