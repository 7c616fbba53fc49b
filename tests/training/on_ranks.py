"""Trainings on ranks: processes that stay for the tests of a file, each run of which they join."""

import contextlib
import io
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
import ranks as processes

from sqloss.training import ranks
from sqloss.training.progress import Progress, Silence
from sqloss.training.run import Run
from sqloss.training.trainers import TRAINERS, RunUnderWay


class Torchrun:
    """Runs functions as torchrun does, on any number of ranks up to a size."""

    def __init__(self, size):
        self.processes = processes.Ranks(size, groups=())

    def run(self, count, function, *arguments):
        """What the function returns, or the exception that it raises, on each rank."""
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        common = {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(count),
        }
        of_ranks = [common | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(count)]
        return self.processes.run(as_rank, of_ranks, function, *arguments)

    def close(self):
        self.processes.close()


def as_rank(_group, environment, function, *arguments):
    os.environ.update(environment)
    with ranks.joined():
        return function(*arguments)


class Interrupting(Silence):
    """Sends this process a signal after so many steps."""

    def __init__(self, after):
        self.after = after

    def step(self):
        self.after -= 1
        if self.after == 0:
            signal.raise_signal(signal.SIGTERM)


def train(command, directory, given, whole, interrupted=(None, 0)):
    """Train a run, or go on with it; what it came to, and whether it came to its end."""
    trainer = TRAINERS[command]
    resumes = (directory / "config.json").exists()
    run = (
        Run.resumed(trainer.config, directory, given)
        if resumes
        else Run.new(directory, trainer.config(**given))
    )
    work = RunUnderWay(trainer, run, whole)
    rank, after = interrupted
    with contextlib.redirect_stderr(io.StringIO()) as told:
        progress = Progress(*work.steps(), run.config.epochs) if ranks.is_first() else Silence()
        if rank == ranks.number():
            progress = Interrupting(after)
        finished = work.fit(progress)
    return finished, work.training.state_dict(), told.getvalue()
