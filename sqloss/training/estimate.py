"""How long a training will take, from a few timed steps of another that begins alike.

That other training is thrown away, so a run is bit for bit what it is without the estimate.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from sqloss.common import ranks
from sqloss.models.seeding import generator
from sqloss.training.loop import Training, batches, close_epoch, take_step
from sqloss.training.progress import counted, duration
from sqloss.training.run import Run

SECONDS = 1.0  # of timed steps, about
MOST = 50  # steps that are timed
WORTH = 10  # times the timed steps: a shorter training is sooner done than judged


def estimate(run: "Run[Any]") -> str | None:
    """What is left of the training in words, with its time; None where that is little.

    A round of steps comes first, as the first steps of all are slower. Then whole rounds are timed,
    as not all steps of a round cost the same, and then what follows an epoch.
    """
    config, steps, done = run.config, *run.steps()
    left, each = steps - done, run.training.round
    if left < WORTH * 2 * each:
        return None
    trial = run.trainer.begin(config, run.data)
    order = torch.randperm(len(run.data), generator=generator(config.seed, "estimate"))
    rows = order.split(config.batch_size)

    def run_steps(count: int) -> float:
        chosen = [rows[(trial.step + number) % len(rows)] for number in range(count)]
        return timed(lambda: train(trial, run.data, chosen), config.torch_device)

    first = run_steps(each) / each
    fitting = min(SECONDS / first, MOST, left / WORTH)
    count = ranks.of_first(lambda: max(1, int(fitting / each)) * each)
    of_step = run_steps(count) / count
    of_end = timed(lambda: close_epoch(trial, run.data), config.torch_device)
    epochs = config.epochs - run.training.epoch
    seconds = left * of_step + epochs * of_end
    return (
        f"training: {counted(epochs, 'epoch')} of about {duration(seconds / epochs)} each, "
        f"{duration(seconds)} in all, and then the report"
    )


def train(training: Training, data: Any, rows: list[torch.Tensor]) -> None:
    for batch, numbers in batches(training, data, rows):
        take_step(training, batch, numbers)


def timed(work: Callable[[], None], device: torch.device) -> float:
    """The seconds that work takes, on the device too."""
    started = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started
