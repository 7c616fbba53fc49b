"""Backward through the tail alone: what a robust training step costs, where that pays, and memory.

    python benchmarks/tail.py --output benchmarks/results/tail.md

Steps of a VAE are timed in one process, interleaved, on inputs that rotate; each ratio is the
median of the rounds' own ratios.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import interleaved, peak_bytes
from report import ratio
from run import machine, say
from torch import Tensor
from vae import mean_loss, training_step

import sqloss
from sqloss.common.files import write_atomically
from sqloss.common.flags import configure
from sqloss.models import VAE
from sqloss.training.vae.backends import Torch
from sqloss.training.vae.config import VAEConfig

Step = Callable[[Tensor], Tensor]
Losses = Callable[..., Tensor]

ALPHA = 0.8
MNIST = (1, 28, 28)
HIDDEN, LATENT = 512, 20
BATCHES = (128, 512, 2048)
BARS = {512: 0.7, 2048: 0.6}  # of the tail alone, over the mean in torch
MEAN_IN_TORCH = "mean in torch, normal"

CPU = torch.device("cpu")
POOL = 4  # batches that rotate

# Sizes of steps, from those of digits on: images, options of the model, batch, alphas.
SIZES: Sequence[tuple[tuple[int, int, int], dict[str, Any], Sequence[int], Sequence[float]]] = (
    ((1, 8, 8), {}, (32, 128, 512, 2048), (0.8,)),
    (MNIST, {}, (64, 128, 256, 512), (0.8,)),
    (MNIST, {}, (256,), (0.3, 0.5, 0.95)),
    (MNIST, {"architecture": "conv"}, (16, 32, 64), (0.8,)),
)

SAMPLES, CHUNK = 2**16, 128
MEMORY_BAR = 1.2


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=60.0, help="for the rounds of each batch")
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown")
    args = parser.parse_args(arguments)
    before = torch.get_num_threads()
    said = machine(CPU)
    lines = [
        "# Backward through the tail alone",
        "",
        f"{said['CPU']}, {said['memory']}, torch {torch.__version__}, float32.",
        "",
        *step_table(args.threads, args.seconds),
        "",
        *size_table(args.threads, args.seconds),
        "",
        *memory_table(),
        "",
    ]
    torch.set_num_threads(before)
    text = "\n".join(lines)
    if args.output:
        write_atomically(args.output, text.encode())
    print(text)


# --- steps ----------------------------------------------------------------------------------------


def of_sqloss(risk: Callable[[Losses, Tensor], Tensor], model: VAE, images: Tensor) -> Tensor:
    """The risk of this package's losses."""
    return risk(losses_of(model), images)


def losses_of(model: VAE) -> Losses:
    """The negative ELBO of each image, with the noise of its row."""
    seed = sqloss.draw_seed()

    def losses(images: Tensor, rows: Tensor | None = None) -> Tensor:
        each = model.losses(images, seed, rows=rows)
        return each["reconstruction"] + each["kl"]

    return losses


def mean(losses: Losses, images: Tensor) -> Tensor:
    return losses(images).mean()


def all_images(losses: Losses, images: Tensor, alpha: float = ALPHA) -> Tensor:
    return sqloss.cvar(losses(images), alpha)


def tail_alone(losses: Losses, images: Tensor, alpha: float = ALPHA) -> Tensor:
    return sqloss.tail_loss(losses, images, torch.arange(len(images)), alpha=alpha)


def step_of(model: VAE, loss_of: Callable[[VAE, Tensor], Tensor]) -> Step:
    adam = torch.optim.Adam(model.parameters(), fused=True)
    return partial(training_step, model, adam, loss_of)


def step_table(threads: Sequence[int], seconds: float) -> Iterator[str]:
    name = f"{MNIST[1] * MNIST[2]}-{HIDDEN}-{LATENT}"
    yield f"A training step (forward, backward, fused Adam) of a VAE {name} at alpha = {ALPHA} with"
    yield "normal or Student-t latents. The first row of each batch is torch alone; dense is the"
    yield "superquantile of all images, tail that of two passes:"
    yield ""
    yield "| threads | batch | step | ms | x mean in torch | quartiles | bar |"
    yield "|--:|--:|:--|--:|--:|--:|:--|"
    for count in threads:
        torch.set_num_threads(count)
        for batch in BATCHES:
            say(f"threads {count}: steps of {batch:,}")
            times = times_of_steps(batch, seconds)
            price = {"seconds": times[MEAN_IN_TORCH]}
            for name, of_step in times.items():
                low, middle, high = ratio({"seconds": of_step}, price)
                bar = BARS.get(batch) if name == "tail, normal" else None
                met = f"<= {bar}, {'met' if middle <= bar else '**not met**'}" if bar else ""
                yield (
                    f"| {count} | {batch:,} | {name} | {1e3 * median(of_step):.2f} | {middle:.3f} "
                    f"| {low:.3f} - {high:.3f} | {met} |"
                )


def times_of_steps(batch: int, seconds: float) -> dict[str, list[float]]:
    torch.manual_seed(0)

    def made(prior: str, loss_of: Callable[[VAE, Tensor], Tensor]) -> Step:
        return step_of(VAE(MNIST, (HIDDEN,), LATENT, prior=prior), loss_of)

    risks = {"mean": mean, "dense": all_images, "tail": tail_alone}
    steps = {MEAN_IN_TORCH: made("normal", mean_loss)} | {
        f"{name}, {prior}": made(prior, partial(of_sqloss, risk))
        for prior in ("normal", "t")
        for name, risk in risks.items()
    }
    return times_of(steps, batch, MNIST, seconds)


def times_of(
    steps: dict[str, Step], batch: int, shape: Sequence[int], seconds: float
) -> dict[str, list[float]]:
    inputs = [[torch.rand(batch, *shape)] for _ in range(POOL)]
    return interleaved(steps, dict.fromkeys(steps, inputs), CPU, seconds)


# --- where it pays --------------------------------------------------------------------------------


def size_table(threads: Sequence[int], seconds: float) -> Iterator[str]:
    yield "Where the tail alone takes less time than all images, with the trainer's default layers,"
    yield "and what `--backward auto` takes there, for any number of threads:"
    yield ""
    yield "| threads | images | layers | batch | alpha | dense, ms | tail, ms | ratio | auto |"
    yield "|--:|:--|:--|--:|--:|--:|--:|--:|:--|"
    for count in threads:
        torch.set_num_threads(count)
        for shape, options, batches, alphas in SIZES:
            for batch, alpha in itertools.product(batches, alphas):
                config = configure(VAEConfig, batch_size=batch, alpha=alpha, **options)
                say(f"threads {count}: {shape}, {config.architecture}, {batch:,}, {alpha}")
                yield f"| {count} {size_row(shape, config, seconds)}"


def size_row(shape: tuple[int, int, int], config: VAEConfig, seconds: float) -> str:
    def model() -> VAE:
        return VAE(shape, architecture=config.architecture)

    steps = {
        name: step_of(model(), partial(of_sqloss, partial(risk, alpha=config.risk.alpha)))
        for name, risk in (("dense", all_images), ("tail", tail_alone))
    }
    dense, tail = times_of(steps, config.batch_size, shape, seconds).values()
    cost = ratio({"seconds": tail}, {"seconds": dense})[1]
    auto = "tail" if Torch(model(), config.risk, config).takes_tail else "dense"
    return (
        f"| {' x '.join(map(str, shape))} | {config.architecture} | {config.batch_size:,} "
        f"| {config.risk.alpha} | {1e3 * median(dense):.2f} | {1e3 * median(tail):.2f} "
        f"| {cost:.3f} | {auto} |"
    )


# --- memory ---------------------------------------------------------------------------------------


def memory_table() -> Iterator[str]:
    say(f"memory: {SAMPLES:,} samples")
    torch.set_num_threads(1)
    peaks = peaks_of_steps()
    prices = list(peaks)[:2]
    yield f"The exact tail of {SAMPLES:,} random images of {' x '.join(map(str, MNIST))} by"
    yield f"`tail_backward`, then Adam, and steps on {CHUNK} of these. The peak of what torch's"
    yield "allocator holds, with parameters, gradients, Adam's moments and the images of the step,"
    yield "and without the data set:"
    yield ""
    yield f"| step | MB | {' | '.join(f'x {price}' for price in prices)} | bar |"
    yield "|:--|--:|--:|--:|:--|"
    for name, peak in peaks.items():
        cost = max(peak / peaks[price] for price in prices)
        met = f"<= {MEMORY_BAR}, {'met' if cost <= MEMORY_BAR else '**not met**'}"
        bar = met if name == of_chunks(CHUNK) else ""
        cells = [f"{peak / peaks[price]:.3f}" for price in prices]
        yield f"| {name} | {peak / 1e6:.2f} | {' | '.join(cells)} | {bar} |"
    yield ""
    yield f"The gradient is that of one graph of all {SAMPLES:,} losses, but for a difference whose"
    errors = {d: gradient_error(d) for d in (torch.float64, torch.float32)}
    said = " and ".join(f"{e:.0e} in {str(d).partition('.')[2]}" for d, e in errors.items())
    yield f"norm, relative to its own, is {said}, where rounding may"
    yield "choose another of two losses that are next to each other."


def of_chunks(size: int) -> str:
    return f"tail of {SAMPLES:,}, chunk_size={size}"


def peaks_of_steps() -> dict[str, int]:
    """Bytes."""
    torch.manual_seed(0)
    model = VAE(MNIST, (HIDDEN,), LATENT)
    adam = torch.optim.Adam(model.parameters(), fused=True)
    data, rows, losses = torch.rand(SAMPLES, *MNIST), torch.arange(SAMPLES), losses_of(model)
    some = torch.randperm(SAMPLES)[:CHUNK]

    def backward_in_torch() -> None:
        mean_loss(model, data[some]).backward()

    def backward_of_mean(share: float = 1.0) -> None:
        (share * losses(data[some], some).mean()).backward()

    def two_microbatches() -> None:
        backward_of_mean(0.5)
        backward_of_mean(0.5)

    def tail(chunk_size: int) -> None:
        sqloss.tail_backward(losses, data, rows, alpha=ALPHA, chunk_size=chunk_size)

    def step(backward: Callable[[], None]) -> None:
        backward()
        adam.step()

    step(backward_of_mean)  # makes Adam's moments
    held = 3 * sum(p.nbytes for p in model.parameters())  # with these
    peaks = {}
    for name, backward in (
        ("mean in torch", backward_in_torch),
        ("mean", backward_of_mean),
        (f"mean of {CHUNK} and {CHUNK}, accumulated", two_microbatches),
        (of_chunks(CHUNK), partial(tail, CHUNK)),
        (of_chunks(CHUNK // 2), partial(tail, CHUNK // 2)),
    ):
        adam.zero_grad()
        peaks[name] = held + peak_bytes(partial(step, backward), CPU)
    return peaks


def gradient_error(dtype: torch.dtype) -> float:
    """Of the tail in chunks, relative to that of all losses."""
    torch.manual_seed(0)
    model = VAE(MNIST, (HIDDEN,), LATENT).to(dtype)
    data, rows = torch.rand(SAMPLES, *MNIST, dtype=dtype), torch.arange(SAMPLES)
    losses = losses_of(model)

    def gradient(backward: Callable[[], object]) -> Tensor:
        model.zero_grad()
        backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = gradient(lambda: sqloss.cvar(losses(data), ALPHA).backward())
    got = gradient(lambda: sqloss.tail_backward(losses, data, rows, alpha=ALPHA, chunk_size=CHUNK))
    return ((got - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    sys.exit(main())
