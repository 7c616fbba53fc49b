"""The directory of a run: its configuration, its checkpoints, and whose it is."""

import contextlib
import itertools
import json
from datetime import datetime
from pathlib import Path

from sqloss.common import ranks
from sqloss.common.errors import UserError, told
from sqloss.common.files import as_json, create_atomically, temporary_of
from sqloss.common.flags import as_flag
from sqloss.training import checkpoint
from sqloss.training.config import Config, RunConfig, from_stored, to_stored
from sqloss.training.loop import Training

CHECKPOINTS = "checkpoints"
DEFAULT_PLACE = Path("runs")


def make_default_directory(config: RunConfig) -> Path:
    """A directory that no other run has, named by the time, and by a number in a busy second."""
    name = f"{config.title}-{datetime.now():%Y%m%d-%H%M%S}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(directory for directory in map(DEFAULT_PLACE.joinpath, names) if is_made(directory))


def is_made(directory: Path) -> bool:
    """Make a directory; False where there is one."""
    with told_of_making(directory):
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            return False
    return True


def claim(directory: Path, config: RunConfig) -> None:
    """Make the directory that of this run and of no other, by its ``config.json``."""
    taken = (
        f"{as_flag('output_dir')}: expected a directory for this run alone, got {directory}, "
        "where another run has just started; if none has, delete the rest of one that was killed, "
        f"{temporary_of(directory / 'config.json')}"
    )
    with told_of_making(directory):
        directory.mkdir(parents=True, exist_ok=True)
        check_unused(directory)
        with told(FileExistsError, lambda _: taken):
            create_atomically(directory / "config.json", as_json(to_stored(config)))


def check_unused(directory: Path) -> None:
    expected = (
        f"{as_flag('output_dir')}: expected a directory without a run, got {directory}, which holds"
    )
    if (directory / "config.json").exists():
        raise UserError(
            f"{expected} one; continue that one with {as_flag('resume')}, or choose another "
            "directory"
        )
    if found := checkpoint.saved(directory / CHECKPOINTS):
        raise UserError(f"{expected} the checkpoint {found[-1]} of one; choose another directory")


def told_of_making(directory: Path) -> contextlib.AbstractContextManager[None]:
    refusal = f"{as_flag('output_dir')}: cannot make a run in {directory}"
    return told(OSError, lambda error: f"{refusal}: {error.strerror}")


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
            f"{as_flag('data_dir')}: expected the data that {directory} was started with, "
            "got data that differ from them"
        )
    for name, got in training.brought.items():
        if got != (had := state["brought"].get(name)):
            raise UserError(
                f"{as_flag(name)}: expected {had}, with which {directory} was started, got {got}"
            )
    try:
        training.load_state_dict(state)
    except Exception as error:  # one for every way in which something can be misshapen
        reason = " ".join(str(error).split())
        raise other_run(f"one that does not fit ({reason})") from error
    return True


def command_of(directory: Path, argument: str) -> str:
    """The command that a run is of; ``argument`` is the one that names its directory."""
    path = directory / "config.json"
    try:
        return str(json.loads(path.read_text())["command"])
    except OSError as error:
        raise no_run(directory, argument, error) from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{argument}: cannot use {path}: it names no command") from error


def no_run(directory: Path, argument: str, error: OSError) -> UserError:
    return UserError(
        f"{argument}: expected the directory of a run, with a config.json, got {directory} "
        f"({error.strerror})"
    )


def read_config(kind: type[Config], path: Path, argument: str) -> Config:
    """The configuration of a run; ``argument`` is the one that names its directory."""
    try:
        return from_stored(json.loads(path.read_text()), kind)
    except OSError as error:
        raise no_run(path.parent, argument, error) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{argument}: cannot use {path}: {error}") from error
