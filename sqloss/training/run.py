"""The directory of a run: its configuration, checkpoints and metrics."""

import dataclasses
import functools
import itertools
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Generic

from sqloss.training import checkpoint, ranks
from sqloss.training.config import Config, RunConfig, as_flag, from_stored, to_stored
from sqloss.training.data import Dataset, refuse_output_among_data
from sqloss.training.errors import UserError
from sqloss.training.files import (
    as_csv,
    as_json,
    create_atomically,
    temporary_of,
    write_atomically,
    write_json,
)
from sqloss.training.loop import NonFiniteError, Row, Training

CHECKPOINTS = "checkpoints"
DEFAULT_PLACE = Path("runs")


@dataclass(frozen=True)
class Run(Generic[Config]):
    """A run and the directory that holds it; nothing is written before ``start``."""

    directory: Path | None  # None: a new one, named when the run starts
    config: Config
    is_new: bool

    @classmethod
    def new(cls, directory: Path | None, config: Config) -> "Run[Config]":
        """A run in a directory that holds none yet."""
        place = directory or DEFAULT_PLACE
        ranks.of_first(lambda: refuse_output_among_data(config.dataset, config.source, place))
        if directory is not None:
            ranks.of_first(lambda: refuse_used(directory))
        return cls(directory, config, is_new=True)

    @classmethod
    def resumed(cls, kind: type[Config], directory: Path, changes: dict[str, Any]) -> "Run[Config]":
        """The run that a directory holds, with changes that do not make it another run."""
        path = directory / "config.json"
        stored = ranks.of_first(lambda: read_config(kind, path, "--resume"))
        for name, value in changes.items():
            if name not in kind.may_change and value != getattr(stored, name):
                allowed = ", ".join(map(as_flag, kind.may_change))
                raise UserError(
                    f"{as_flag(name)}: expected {getattr(stored, name)}, with which {directory} "
                    f"was started, got {value}; with --resume only {allowed} may change"
                )
        return cls(directory, dataclasses.replace(stored, **changes), is_new=False)

    def start(self, training: Training, data: Dataset) -> "Recorder":
        """Take the directory, or take up the training where the directory has it."""
        directory = self.directory or ranks.of_first(lambda: make_default_directory(self.config))
        recorder = Recorder(directory, data.fingerprint(), self.is_new)
        if self.is_new:
            ranks.of_first(lambda: claim(directory, self.config))
        else:
            recorder.restore(training)
            self._refuse_fewer_epochs(training)
            ranks.of_first(lambda: write_json(directory / "config.json", to_stored(self.config)))
        return recorder

    def _refuse_fewer_epochs(self, training: Training) -> None:
        begun = training.epoch + (training.step > 0)
        if begun > self.config.epochs:
            raise UserError(
                f"--epochs: expected at least {begun}, as {self.directory} has trained for them "
                f"already, got {self.config.epochs}"
            )


def make_default_directory(config: RunConfig) -> Path:
    """A directory that no other run has, named by the time, and by a number in a busy second."""
    name = f"{config.command}-{config.dataset}-{datetime.now():%Y%m%d-%H%M%S}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(directory for directory in map(DEFAULT_PLACE.joinpath, names) if is_made(directory))


def is_made(directory: Path) -> bool:
    """Make a directory; False where there is one."""
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise cannot_make(directory, error) from error
    return True


def claim(directory: Path, config: RunConfig) -> None:
    """Make the directory that of this run and of no other, by its ``config.json``."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_make(directory, error) from error
    refuse_used(directory)
    try:
        create_atomically(directory / "config.json", as_json(to_stored(config)))
    except FileExistsError as error:
        raise UserError(
            f"--output-dir: expected a directory for this run alone, got {directory}, where "
            "another run has just started; if none has, delete the rest of one that was killed, "
            f"{temporary_of(directory / 'config.json')}"
        ) from error
    except OSError as error:
        raise cannot_make(directory, error) from error


def refuse_used(directory: Path) -> None:
    expected = f"--output-dir: expected a directory without a run, got {directory}, which holds"
    if (directory / "config.json").exists():
        raise UserError(
            f"{expected} one; continue that one with --resume {directory}, or choose another "
            "directory"
        )
    if found := checkpoint.saved(directory / CHECKPOINTS):
        raise UserError(f"{expected} the checkpoint {found[-1]} of one; choose another directory")


def cannot_make(directory: Path, error: OSError) -> UserError:
    return UserError(f"--output-dir: cannot make a run in {directory}: {error.strerror}")


class Recorder:
    """Writes checkpoints, ``metrics.csv`` and, where TensorBoard is installed, its events.

    All on the first rank alone.

    As a context it sees to what an error leaves behind: a new run that comes to no checkpoint
    gives its directory back.
    """

    def __init__(self, directory: Path, data: str, is_new: bool) -> None:
        self.directory = directory
        self.checkpoints = directory / CHECKPOINTS
        self.data = data  # the fingerprint of the data set
        self.is_new = is_new
        self.rows_in_tensorboard = 0
        self.epochs_before = 0  # those of earlier processes

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        kept = checkpoint.saved(self.checkpoints)
        if error and self.is_new and not kept and ranks.is_first():
            (self.directory / "config.json").unlink(missing_ok=True)
        if isinstance(error, NonFiniteError):
            raise NonFiniteError(f"{error}; {self._what_remains(kept)}") from error

    def _what_remains(self, kept: list[Path]) -> str:
        if kept:
            return f"start a new run; the checkpoint {kept[-1]}, from before, is intact"
        if self.is_new:
            return f"nothing was saved, and {self.directory} is free for the next try"
        return f"nothing was saved; start a new run, and delete {self.directory}"

    def restore(self, training: Training) -> None:
        """Put the training where the newest checkpoint has it, if there is one."""
        if not restore(training, self.directory, self.data, "--resume"):
            return
        ranks.of_first(lambda: self._write_metrics(training))
        self.rows_in_tensorboard = len(training.history)
        self.epochs_before = training.epoch

    def save(self, training: Training) -> None:
        ranks.of_first(lambda: self._save(training))

    def _save(self, training: Training) -> None:
        checkpoint.save(self.checkpoints, training.state_dict() | {"data": self.data})
        self._write_metrics(training)
        self.show_in_tensorboard(training.history[self.rows_in_tensorboard :])
        self.rows_in_tensorboard = len(training.history)

    def _write_metrics(self, training: Training) -> None:
        # All rows every time: what the checkpoint holds, no row lost or doubled by resuming.
        write_atomically(self.directory / "metrics.csv", as_csv(training.columns, training.history))

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
        # Resumed from an older checkpoint, the epochs after it are there from before: hide those.
        return SummaryWriter(self.directory / "tensorboard", purge_step=self.epochs_before + 1)


def restore(training: Training, directory: Path, data: str, argument: str) -> bool:
    """Put a training where the newest checkpoint of a run has it; False where there is none.

    ``data`` is the fingerprint of the data set, ``argument`` the one that names the directory.
    """
    folder = directory / CHECKPOINTS
    saved, state = ranks.of_first(lambda: (checkpoint.saved(folder), checkpoint.load(folder)))
    if state is None:
        return False

    def other_run(got: str) -> UserError:
        return UserError(
            f"{argument}: expected the checkpoint {saved[-1]} to be one of the run that "
            f"{directory / 'config.json'} tells of, got {got}"
        )

    if state.keys() != training.state_dict().keys() | {"data"}:
        raise other_run(f"one that holds {', '.join(map(str, state))}")
    if state["data"] != data:
        raise UserError(
            f"--data-dir: expected the data that {directory} was started with, "
            "got images or labels that differ from them"
        )
    try:
        training.load_state_dict(state)
    except Exception as error:  # one for every way in which something can be misshapen
        reason = " ".join(str(error).split())
        raise other_run(f"one that does not fit ({reason})") from error
    return True


def read_config(kind: type[Config], path: Path, argument: str) -> Config:
    """The configuration of a run; ``argument`` is the one that names its directory."""
    try:
        return from_stored(json.loads(path.read_text()), kind)
    except OSError as error:
        raise UserError(
            f"{argument}: expected the directory of a run, with a config.json, got {path.parent} "
            f"({error.strerror})"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{argument}: cannot use {path}: {error}") from error
