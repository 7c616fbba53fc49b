"""Data sets of images with classes, read once; and how a class is made rare in training.

A new data set is one module here: a class that is registered and reads a ``Dataset``.
"""

import importlib
import pkgutil
from typing import Any

from sqloss.common.flags import settings_of
from sqloss.datasets.dataset import Dataset
from sqloss.datasets.source import DATASETS, Place, Source

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["DATASETS", "Dataset", "Place", "Source", "load_dataset"]


def load_dataset(name: str, **given: Any) -> Dataset:
    """A data set by its name, with flags of its own and of ``Place``."""
    kind = DATASETS[name]
    own = {flag: given.pop(flag) for flag in settings_of(kind) if flag in given}
    return kind(**own).read(Place(**given))
