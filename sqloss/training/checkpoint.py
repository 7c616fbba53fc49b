"""Checkpoints: written whole or not at all, the newest two kept, read without running code."""

import hashlib
import io
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sqloss.common.errors import UserError
from sqloss.common.files import write_atomically

KEPT = 2  # should the newest prove unreadable, the one before it is still there


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write a state that knows its ``epoch`` and ``step`` as the newest checkpoint of a folder."""
    content = io.BytesIO()
    torch.save(plain(state), content)
    content.seek(0)
    if unsafe := types_not_read(content):
        raise UserError(
            f"cannot save the checkpoint: expected tensors, numbers and text, got {unsafe}, which "
            "torch.load reads only where torch.serialization.add_safe_globals allows it"
        )
    older = saved(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name_of(state["epoch"], state["step"]), content.getbuffer())
    except (UserError, OSError) as error:
        kept = f"{older[-1]} is intact" if older else "there is none before it"
        raise UserError(f"cannot save the checkpoint: {error}; {kept}") from error
    for path in saved(folder)[:-KEPT]:
        path.unlink()


def plain(state: Any) -> Any:
    """A state that can be read without running code: numbers of NumPy become Python's."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(map(plain, state))
    is_number = type(state).__module__ == "numpy" and getattr(state, "ndim", None) == 0
    return state.item() if is_number else state


def load(folder: Path) -> dict[str, Any] | None:
    """The newest state of a folder; None where there is none yet."""
    paths = saved(folder)
    if not paths:
        return None
    try:
        return read(paths[-1])
    except UnreadableError as error:
        older = next((path for path in reversed(paths[:-1]) if is_readable(path)), None)
        way_out = (
            f"delete it and resume again to continue from {older}, which is intact"
            if older
            else "there is no intact one before it; delete it to resume from the start"
        )
        raise UserError(f"{error}; {way_out}") from error


def saved(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    found = [(match, path) for path in folder.glob("*.pt") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted((position(match), path) for match, path in found)]


NAME = re.compile(r"epoch-(\d+)(?:-step-(\d+))?\.pt")


def name_of(epoch: int, step: int) -> str:
    """After so many whole epochs, and so many steps of the next one."""
    return f"epoch-{epoch:04d}" + (f"-step-{step:06d}" if step else "") + ".pt"


def position(match: re.Match[str]) -> tuple[int, int]:
    return int(match[1]), int(match[2] or 0)


class UnreadableError(Exception):
    """A checkpoint that is damaged or not one."""


def is_readable(path: Path) -> bool:
    try:
        read(path)
    except (UnreadableError, UserError):
        return False
    return True


def read(path: Path) -> dict[str, Any]:
    try:
        damaged = first_damaged(path)
        unsafe = types_not_read(path)
        state = None if unsafe else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UnreadableError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise no_checkpoint(path) from error
    if unsafe and not damaged:
        raise UserError(
            f"cannot read the checkpoint {path}: expected tensors, numbers and text, got {unsafe}, "
            "which may run code"
        )
    if damaged or state is None or not is_state(state):
        raise no_checkpoint(path)
    return dict(state)


def first_damaged(path: Path) -> str | None:
    """The first part of a checkpoint whose checksum is wrong, which torch.load does not look at."""
    with zipfile.ZipFile(path) as parts:
        return parts.testzip()


def types_not_read(checkpoint: Path | io.BytesIO) -> str:
    """What a checkpoint holds that torch.load would not read without running code, in words."""
    return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(checkpoint)))


def is_state(state: Any) -> bool:
    """Whether what was read at least knows its ``epoch`` and ``step``."""
    return isinstance(state, dict) and all(type(state.get(k)) is int for k in ("epoch", "step"))


def no_checkpoint(path: Path) -> UnreadableError:
    return UnreadableError(f"cannot read the checkpoint {path}: not a checkpoint, or damaged")


def fingerprint(model: nn.Module) -> str:
    """Equal for equal parameters only."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
