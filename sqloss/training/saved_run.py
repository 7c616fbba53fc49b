"""The models of a finished or stopped run, read from its directory; nothing there is changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqloss.common import ranks
from sqloss.common.errors import UserError
from sqloss.common.flags import changed
from sqloss.training.run_directory import read_config, restore
from sqloss.training.trainer import Trainer

ARGUMENT = "RUN_DIR"


@dataclass(frozen=True)
class SavedRun:
    """A finished or a stopped run at its newest checkpoint, on the device of its config."""

    config: Any
    whole: Any  # the data before the imbalance
    data: Any  # that of the training
    models: Mapping[str, Any]
    training: Any
    done: str  # how far the training is, in words


def load_saved_run(
    trainer: Trainer[Any, Any],
    directory: Path,
    changes: Mapping[str, Any],
    argument: str = ARGUMENT,
) -> SavedRun:
    """The models of a run and their data; ``changes`` are of settings ``of_machine``.

    ``argument`` is the one that names the directory.
    """
    path = directory / "config.json"
    config = ranks.of_first(lambda: read_config(trainer.config, path, argument))
    config = changed(config, **changes)
    whole = trainer.load(config)
    data = trainer.training_data(whole, config)
    training = trainer.begin(config, data)
    if not restore(training, directory, data.fingerprint(), argument):
        raise UserError(
            f"{argument}: expected a run with a checkpoint, got {directory}, which has none yet"
        )
    return SavedRun(config, whole, data, training.models, training, training.done())
