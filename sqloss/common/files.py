"""Files that are either the whole new content or the old one, never half of anything."""

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqloss.common.errors import UserError


def expanded(path: str) -> Path:
    """A path as a user writes it, ``~`` included."""
    return Path(os.path.expanduser(path))


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace ``path`` by ``content``; on failure it keeps its old content and no rest is left."""
    temporary = temporary_of(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # a Ctrl-C leaves no rest either
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        raise


def create_atomically(path: Path, content: bytes) -> None:
    """Make ``path``, whole, where there is none: of several that try at once, one succeeds.

    The others get a ``FileExistsError``.
    """
    temporary = temporary_of(path)
    temporary.touch(exist_ok=False)  # whoever makes it holds the right to make the path
    if path.exists():
        temporary.unlink()
        raise FileExistsError(path)
    write_atomically(path, content)


def temporary_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def made_whole(directory: Path) -> Iterator[Path]:
    """A directory to write into, which becomes the given one at the end; on failure nothing stays.

    Raises:
        UserError: there is one already, or it cannot be made.
    """
    temporary = temporary_of(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except FileExistsError as error:
        raise UserError(
            f"cannot make {directory}: another command is at it; if none is, delete the rest of "
            f"one that was killed, {temporary}"
        ) from error
    except OSError as error:
        raise UserError(f"cannot make {directory}: {error.strerror}") from error
    try:
        yield temporary
        os.rename(temporary, directory)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {directory}: {error.strerror}") from error
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, as_json(content))


def write_report(directory: Path, text: str, report: dict[str, Any]) -> None:
    write_atomically(directory / "report.md", text.encode())
    write_json(directory / "report.json", report)  # the last file: it tells that all is there


def as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def as_csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")  # paths need not be UTF-8
