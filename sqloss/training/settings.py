"""Work of many trainings in one directory, which a file of settings there says is one work."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqloss.training.errors import UserError
from sqloss.training.files import write_json

# Fields of a configuration that change where a result comes from but not what it is.
NO_SETTINGS = ("seed", "device", "threads", "data_dir", "download")


def keep_settings(path: Path, settings: Mapping[str, Any], work: str, begun: bool) -> None:
    """Make the directory of ``path`` that of a work with these settings, and keep them there.

    Where the work has ``begun``, UserError is raised for settings that are not those of before.
    """
    if begun and path.exists():
        refuse_others(path, settings, work)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output-dir: cannot make the directory {path.parent}: {error.strerror}"
        ) from error
    write_json(path, dict(settings))


def refuse_others(path: Path, settings: Mapping[str, Any], work: str) -> None:
    try:
        before = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--output-dir: cannot use {path}: {error}") from error
    differing = sorted(
        k for k in before.keys() | settings.keys() if before.get(k) != settings.get(k)
    )
    if differing:
        raise UserError(
            f"--output-dir: expected a directory without a {work}, or one with these settings, "
            f"got {path.parent}, where these differ: {', '.join(differing)}"
        )
