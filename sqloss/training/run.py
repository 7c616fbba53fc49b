"""The directory of a run: its configuration, checkpoints and metrics."""

import csv
import dataclasses
import functools
import io
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqloss.training import checkpoint
from sqloss.training.config import Config, as_flag, from_stored
from sqloss.training.data import Dataset
from sqloss.training.errors import UserError
from sqloss.training.files import write_atomically, write_json
from sqloss.training.loop import Row, Training

MAY_CHANGE = ("epochs", "device", "threads", "data_dir", "download")  # on resuming


@dataclass(frozen=True)
class Run:
    """A run and the directory that holds it; nothing is written before ``start``."""

    directory: Path
    config: Config

    @classmethod
    def new(cls, directory: Path | None, config: Config) -> "Run":
        """A run in a directory that holds none yet."""
        if directory is None:
            directory = Path("runs", f"vae-{config.dataset}-{datetime.now():%Y%m%d-%H%M%S}")
        if (directory / "config.json").exists():
            raise UserError(
                f"--output-dir: expected a directory without a run, got {directory}, which holds "
                f"one; continue that one with --resume {directory}, or choose another directory"
            )
        return cls(directory, config)

    @classmethod
    def resumed(cls, directory: Path, changes: dict[str, Any]) -> "Run":
        """The run that a directory holds, with changes that do not make it another run."""
        stored = read_config(directory / "config.json")
        for name, value in changes.items():
            if name not in MAY_CHANGE and value != getattr(stored, name):
                allowed = ", ".join(map(as_flag, MAY_CHANGE))
                raise UserError(
                    f"{as_flag(name)}: expected {getattr(stored, name)}, with which {directory} "
                    f"was started, got {value}; with --resume only {allowed} may change"
                )
        return cls(directory, dataclasses.replace(stored, **changes))

    def start(self, training: Training, data: Dataset) -> "Recorder":
        """Take up the training where the directory has it, and put down the configuration."""
        recorder = Recorder(self.directory, data.fingerprint())
        recorder.restore(training)
        if training.epoch + (training.step > 0) > self.config.epochs:
            raise UserError(
                f"--epochs: expected at least {training.epoch + (training.step > 0)}, as "
                f"{self.directory} has trained for them already, got {self.config.epochs}"
            )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--output-dir: cannot make {self.directory}: {error.strerror}"
            ) from error
        write_json(self.directory / "config.json", dataclasses.asdict(self.config))
        return recorder


class Recorder:
    """Writes checkpoints, ``metrics.csv`` and, where TensorBoard is installed, its events."""

    def __init__(self, directory: Path, data: str) -> None:
        self.directory = directory
        self.checkpoints = directory / "checkpoints"
        self.data = data  # the fingerprint of the data set
        self.rows_in_tensorboard = 0

    def restore(self, training: Training) -> None:
        """Put the training where the newest checkpoint has it, if there is one."""
        state = checkpoint.load(self.checkpoints)
        if state is None:
            return
        if state["data"] != self.data:
            raise UserError(
                f"--data-dir: expected the data that {self.directory} was started with, "
                "got images that differ from them"
            )
        training.load_state_dict(state)
        self.rows_in_tensorboard = len(training.history)

    def save(self, training: Training) -> None:
        checkpoint.save(self.checkpoints, training.state_dict() | {"data": self.data})
        # All rows every time: what the checkpoint holds, no row lost or doubled by resuming.
        write_atomically(self.directory / "metrics.csv", as_csv(training.history))
        self.show_in_tensorboard(training.history[self.rows_in_tensorboard :])
        self.rows_in_tensorboard = len(training.history)

    def show_in_tensorboard(self, rows: list[Row]) -> None:
        if self.tensorboard is None:
            return
        for row in rows:
            for metric in row.keys() - {"epoch", "model"}:
                self.tensorboard.add_scalar(f"{metric}/{row['model']}", row[metric], row["epoch"])
        self.tensorboard.flush()

    @functools.cached_property
    def tensorboard(self) -> Any | None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except Exception:  # a convenience: absent or broken, training does without it
            return None
        return SummaryWriter(self.directory / "tensorboard")


def as_csv(history: list[Row]) -> bytes:
    text = io.StringIO(newline="")
    if history:
        writer = csv.DictWriter(text, history[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    return text.getvalue().encode()


def read_config(path: Path) -> Config:
    try:
        return from_stored(json.loads(path.read_text()))
    except OSError as error:
        raise UserError(
            f"--resume: expected the directory of a run, with a config.json, got {path.parent} "
            f"({error.strerror})"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--resume: cannot use {path}: {error}") from error
