"""Files that are either the whole new content or the old one, never half of anything."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from sqloss.training.errors import UserError


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace ``path`` by ``content``; on failure it keeps its old content and no rest is left."""
    temporary = path.with_name(f".{path.name}.tmp")
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


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
