"""A run: its configuration, its directory, its data and its training, from begin to report."""

import functools
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic

from sqloss.common import ranks
from sqloss.common.errors import UserError
from sqloss.common.files import as_csv, write_atomically, write_json
from sqloss.common.flags import as_flag, changed, flat
from sqloss.training import checkpoint
from sqloss.training.config import Config, RunConfig, to_stored
from sqloss.training.loop import NonFiniteError, Row, Training, TrainingData, fit
from sqloss.training.progress import Progress
from sqloss.training.run_directory import (
    CHECKPOINTS,
    DEFAULT_PLACE,
    check_unused,
    claim,
    make_default_directory,
    read_config,
    restore,
)
from sqloss.training.threads import set_threads

if TYPE_CHECKING:
    from sqloss.training.trainer import Report, Trainer


class Run(Generic[Config]):
    """A run; nothing is written before ``start``.

    It writes checkpoints, ``metrics.csv`` and, where TensorBoard is installed, its events: all on
    the first rank alone. As a context it sees to what an error leaves behind: a new run that comes
    to no checkpoint gives its directory back.
    """

    directory: Path  # from ``start`` on
    training: Any  # what the trainer begins
    whole: Any  # the data before the imbalance
    data: Any

    def __init__(self, place: Path | None, config: Config, is_new: bool) -> None:
        self.place = place  # None: a new directory, named when the run starts
        self.config = config
        self.is_new = is_new
        self.rows_in_tensorboard = 0
        self.epochs_before = 0  # those of earlier processes

    @classmethod
    def new(cls, directory: Path | None, config: Config) -> "Run[Config]":
        """A run in a directory that holds none yet."""
        place = directory or DEFAULT_PLACE
        ranks.of_first(lambda: config.check_place(place))
        if directory is not None:
            ranks.of_first(lambda: check_unused(directory))
        return cls(directory, config, is_new=True)

    @classmethod
    def resumed(cls, kind: type[Config], directory: Path, changes: dict[str, Any]) -> "Run[Config]":
        """The run that a directory holds, with changes that do not make it another run."""
        path = directory / "config.json"
        stored = ranks.of_first(lambda: read_config(kind, path, as_flag("resume")))
        before = flat(stored)
        for name, value in changes.items():
            if name not in kind.may_change() and value != before.get(name):
                allowed = ", ".join(map(as_flag, kind.may_change()))
                had = before.get(name, "none")
                raise UserError(
                    f"{as_flag(name)}: expected {had}, with which {directory} was started, got "
                    f"{value}; with {as_flag('resume')} only {allowed} may change"
                )
        return cls(directory, changed(stored, **changes), is_new=False)

    def set_up(self, trainer: "Trainer[Any, Any]") -> None:
        """Check the machine and the ranks, read the data, and begin."""
        config = self.config
        config.check_machine()
        config.check_ranks()
        ranks.of_first(lambda: trainer.check(config))
        self.begin(trainer, trainer.load(config))

    def begin(self, trainer: "Trainer[Any, Any]", whole: Any) -> None:
        """Start on what the configuration makes of all data."""
        config = self.config
        self.trainer, self.whole = trainer, whole
        ranks.of_first(lambda: trainer.check_data(whole, config))
        self.data = trainer.training_data(whole, config)
        check_ranks_agree(config, self.fingerprint)
        set_threads(config, self.data)
        training = trainer.begin(config, self.data)
        ranks.of_first(lambda: config.sampling.check(self.data, training))
        ranks.of_first(lambda: check_risk(config, self.data, training))
        self.start(training, self.data)

    def start(self, training: Training, data: Any) -> "Run[Config]":
        """Take the directory, or take up the training where the directory has it."""
        config = self.config
        self.training, self.data = training, data
        self.directory = self.place or ranks.of_first(lambda: make_default_directory(config))
        if self.is_new:
            ranks.of_first(lambda: claim(self.directory, config))
        else:
            self.restore()
            self._check_epochs()
            ranks.of_first(lambda: write_json(self.directory / "config.json", to_stored(config)))
        return self

    @functools.cached_property
    def fingerprint(self) -> str:
        """That of the data, which may take long."""
        return str(self.data.fingerprint())

    def _check_epochs(self) -> None:
        begun = self.training.epoch + (self.training.step > 0)
        if begun > self.config.epochs:
            raise UserError(
                f"{as_flag('epochs')}: expected at least {begun}, as {self.directory} has trained "
                f"for them already, got {self.config.epochs}"
            )

    def steps(self) -> tuple[int, int]:
        """The steps of the whole training, and those of them done already."""
        per_epoch = self.data.steps(self.config.batch_size)
        done = per_epoch * self.training.epoch + self.training.step
        return per_epoch * self.config.epochs, done

    def fit(self, progress: Progress) -> bool:
        """Train to the end; False where told to stop, and stopped and saved."""
        with self, progress:
            return fit(self.training, self.data, self.config, self.save, progress)

    def report(self) -> "Report":
        """Measure and draw what the training has come to; the report is the last that is written:
        where there is one, there is all."""
        return self.trainer.report(self)

    def __enter__(self) -> "Run[Config]":
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        kept = checkpoint.saved(self.directory / CHECKPOINTS)
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

    def restore(self) -> None:
        """Put the training where the newest checkpoint has it, if there is one."""
        if not restore(self.training, self.directory, self.fingerprint, as_flag("resume")):
            return
        ranks.of_first(self._write_metrics)
        self.rows_in_tensorboard = len(self.training.history)
        self.epochs_before = self.training.epoch

    def save(self) -> None:
        ranks.of_first(self._save)

    def _save(self) -> None:
        state = self.training.state_dict() | {"data": self.fingerprint}
        checkpoint.save(self.directory / CHECKPOINTS, state)
        self._write_metrics()
        history = self.training.history
        self.show_in_tensorboard(history[self.rows_in_tensorboard :])
        self.rows_in_tensorboard = len(history)

    def _write_metrics(self) -> None:
        # All rows every time: what the checkpoint holds, no row lost or doubled by resuming.
        content = as_csv(self.training.columns, self.training.history)
        write_atomically(self.directory / "metrics.csv", content)

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


def check_risk(config: RunConfig, data: TrainingData, training: Training) -> None:
    """Raise for a risk that needs of the samples what the training does not give it."""
    if not set(config.risk.needs) <= {*training.gives}:
        raise UserError(
            f"{as_flag('risk')}: expected one that needs the losses alone with sqloss "
            f"{config.command}, got {config.risk.name}"
        )
    config.risk.check(data, training)


def check_ranks_agree(config: RunConfig, fingerprint: str) -> None:
    """Raise where a machine has other data or another kind of device, or was told other flags."""
    if ranks.count() > 1:
        of_machine = {*config.paths, *config.of_machine}
        flags = {as_flag(k): v for k, v in flat(config).items() if k not in of_machine}
        flags[as_flag("device")] = config.torch_device.type  # where it is auto
        flags[as_flag("data_dir")] = f"data with the hash {fingerprint}"
        ranks.check_same_on_ranks(flags)
