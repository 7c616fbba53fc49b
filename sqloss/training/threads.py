"""How many CPU threads share the work."""

from typing import Any

import torch

from sqloss.common.errors import require
from sqloss.training.config import RunConfig


def set_threads(config: RunConfig, data: Any) -> None:
    """Threads share the work of large images; on small ones they only wait for one another.

    Where other processes want the same cores that waiting has cost five times the whole training.
    """
    threads = config.cpu_threads
    if not threads and config.is_of_small(data):
        threads = 1
    if threads:
        torch.set_num_threads(threads)
        if config.uses_numpy:
            require("threadpoolctl").threadpool_limits(threads, "blas")
