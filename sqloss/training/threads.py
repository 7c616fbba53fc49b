"""How many CPU threads share the work."""

import math

import torch

from sqloss.training.config import RunConfig
from sqloss.training.data import Dataset
from sqloss.training.errors import require

SINGLE_THREADED_PIXELS = 16 * 16  # the digits, at 8 x 8, are no slower with one thread


def set_threads(config: RunConfig, data: Dataset) -> None:
    """Threads share the work of large images; on small ones they only wait for one another.

    Where other processes want the same cores that waiting has cost five times the whole training.
    """
    threads = config.cpu_threads
    if not threads and math.prod(data.shape) <= SINGLE_THREADED_PIXELS:
        threads = 1
    if threads:
        torch.set_num_threads(threads)
        if config.uses_numpy:
            require("threadpoolctl").threadpool_limits(threads, "blas")
