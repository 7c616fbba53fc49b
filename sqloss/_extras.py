"""Optional dependencies: imported where they are needed, and an error that says how to get them."""

import importlib
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
