"""The tail over ranks: how wrong the mean of the ranks' own tails is, what the exact one costs.

    python benchmarks/distributed.py --output benchmarks/results/distributed.md

Costs are those of processes on this machine, beside as many bare all-reduces of the same sizes.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

import sqloss
from sqloss.common.files import write_atomically

DISTRIBUTIONS: dict[str, Callable[[Sequence[int]], Tensor]] = {
    "exponential": lambda shape: torch.rand(shape, dtype=torch.float64).log().neg(),
    "log-normal": lambda shape: torch.randn(shape, dtype=torch.float64).exp(),
}
BATCHES = ((2, 64), (8, 8), (8, 64), (8, 1024), (64, 8), (64, 64))  # ranks, losses of each
TAILS = (0.2, 0.1, 0.02)
LOSSES = 2**19  # drawn for each number of the table
COUNT, ALPHA = 1024, 0.8
BAR = 1.3  # of two processes, over the bare all-reduces


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 8])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown")
    args = parser.parse_args(arguments)
    lines = ["# The tail over ranks", "", *bias_table(), ""]
    if args.processes:
        lines += [*cost_table(args.processes, args.rounds), ""]
    text = "\n".join(lines)
    if args.output:
        write_atomically(args.output, text.encode())
    print(text)


def bias_table() -> Iterator[str]:
    yield "The mean of the ranks' own superquantiles, and the part of the true tail that gets no"
    yield "gradient from it:"
    yield ""
    tails = [f"tail {tail:g}" for tail in TAILS]
    yield f"| losses | ranks | of each | {' | '.join(tails)} |"
    yield "|:--|--:|--:|" + "--:|" * len(tails)
    for name, draw in DISTRIBUTIONS.items():
        for ranks, n in BATCHES:
            cells = []
            for tail in TAILS:
                error, lost = bias(draw, ranks, n, tail)
                cells.append(f"{error:+.1%}, {lost:.0%}".replace("%", " %"))
            yield f"| {name} | {ranks} | {n:,} | {' | '.join(cells)} |"


def bias(
    draw: Callable[[Sequence[int]], Tensor], ranks: int, n: int, tail: float
) -> Sequence[float]:
    """The relative error of the mean of the ranks' superquantiles; the share of the tail lost."""
    torch.manual_seed(0)
    losses = draw([LOSSES // (ranks * n), ranks, n])
    exact = sqloss.cvar(losses, tail_fraction=tail, dim=(1, 2))
    of_ranks = sqloss.cvar(losses, tail_fraction=tail, dim=2).mean(1)
    weights = sqloss.tail_weights(losses, tail_fraction=tail, dim=(1, 2))
    own = sqloss.tail_weights(losses, tail_fraction=tail, dim=2)
    lost = torch.where(own == 0, weights, 0).sum((1, 2)).mean()
    return (of_ranks.mean() / exact.mean() - 1).item(), lost.item()


def cost_table(processes: Sequence[int], rounds: int) -> Iterator[str]:
    yield f"`distributed.cvar` of {COUNT:,} float32 losses on each of some gloo processes on"
    yield f"{os.cpu_count()} CPUs, forward + backward, and bare all-reduces of the same sizes:"
    yield f"medians of {rounds} rounds in turn, and that of their ratios:"
    yield ""
    yield "| processes | int64 added up | all-reduces | distributed.cvar | ratio | bar |"
    yield "|--:|:--|--:|--:|--:|--:|"
    for count in processes:
        sizes, bare, ours = cost(count, rounds)
        ratio = median(b / a for a, b in zip(bare, ours, strict=True))
        bar = f"{BAR} x {'met' if ratio <= BAR else 'missed'}" if count == 2 else ""
        yield (
            f"| {count} | {', '.join(f'{size:,}' for size in sizes)} | {median(bare) * 1e6:.0f} us "
            f"| {median(ours) * 1e6:.0f} us | {ratio:.2f} x | {bar} |"
        )


def cost(processes: int, rounds: int) -> Any:
    """(sizes, seconds of the all-reduces, seconds of cvar) on the first rank."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(time_on_rank, (processes, rounds, folder), nprocs=processes)
        return torch.load(Path(folder, "times"))


def time_on_rank(rank: int, processes: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{Path(folder, 'store')}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    torch.manual_seed(rank)
    losses = torch.randn(COUNT, requires_grad=True)
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def recorded(tensor: Tensor, **options: Any) -> None:
        sizes.append(tensor.numel())
        all_reduce(tensor, **options)

    dist.all_reduce = recorded
    sqloss.distributed.cvar(losses, ALPHA).backward()
    dist.all_reduce = all_reduce
    payloads = [torch.zeros(size, dtype=torch.int64) for size in sizes]

    def bare() -> None:
        for payload in payloads:
            dist.all_reduce(payload)

    def ours() -> None:
        sqloss.distributed.cvar(losses, ALPHA).backward()

    times: dict[Callable[[], None], list[float]] = {bare: [], ours: []}
    for round in range(rounds + 10):
        for step, seconds in times.items():
            start = time.perf_counter()
            step()
            if round >= 10:
                seconds.append(time.perf_counter() - start)
    if rank == 0:
        torch.save((sizes, *times.values()), Path(folder, "times"))
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
