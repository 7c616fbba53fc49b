"""The directory of a sweep: one process at a time, and always the same settings."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sqloss.common.errors import UserError, require
from sqloss.common.files import write_json
from sqloss.common.flags import renamed, settings_of


def keep_settings(path: Path, settings: Mapping[str, Any], kind: type, begun: bool) -> None:
    """Make the directory of ``path`` that of a sweep with these settings, and keep them there.

    They are of runs of a ``kind`` of configuration, and others. Where the sweep has ``begun``,
    UserError is raised for settings that are not those of before.
    """
    if begun and path.exists():
        refuse_others(path, settings, kind)
    make_directory(path.parent)
    write_json(path, dict(settings))


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Hold a directory for this process; where it ends otherwise, the system lets go of it."""
    filelock = require("filelock")
    make_directory(directory)
    lock = filelock.FileLock(directory / ".lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise UserError(
            f"--output-dir: expected a directory in which no sweep is under way, got {directory}, "
            "in which another process is at work"
        ) from error
    try:
        yield
    finally:
        lock.release()


def make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output-dir: cannot make the directory {directory}: {error.strerror}"
        ) from error


def refuse_others(path: Path, settings: Mapping[str, Any], kind: type) -> None:
    try:
        stored: dict[str, Any] = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--output-dir: cannot use {path}: {error}") from error
    before: dict[str, Any] = {}
    for name, setting in settings_of(kind).items():
        if name in settings:  # an older sweep may lack it
            before |= setting.in_format(0)
    former = renamed(kind)
    before |= {former.get(name, name): value for name, value in stored.items()}
    differing = sorted(
        k for k in before.keys() | settings.keys() if before.get(k) != settings.get(k)
    )
    if differing:
        raise UserError(
            "--output-dir: expected a directory without a sweep, or one with these settings, "
            f"got {path.parent}, where these differ: {', '.join(differing)}"
        )
