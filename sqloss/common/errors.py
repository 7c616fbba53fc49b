"""What the user can put right is a ``UserError``: its message names what was expected and got."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


class UserError(ValueError):
    """A wrong argument, missing data, a full disk: shown without a traceback."""


def require(module: str) -> Any:
    """Import a module of the optional ``train`` dependencies, where it is needed and not before."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{package} is needed here and cannot be imported ({error}): "
            "pip install 'sqloss[train]'"
        ) from error
    except (RuntimeError, OSError) as error:  # how a torchvision built for another torch fails
        raise UserError(
            f"{package} is installed but does not load beside torch {torch.__version__} "
            f"({error}); install the {package} that matches this torch: "
            "pip install 'sqloss[train]'"
        ) from error


@contextlib.contextmanager
def told(
    kind: type[Exception] | tuple[type[Exception], ...], message: Callable[[Any], str]
) -> Iterator[None]:
    """Raise exceptions of a kind as what the user can do about them."""
    try:
        yield
    except kind as error:
        raise UserError(message(error)) from error
