"""Work that several processes do at the same time."""

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from sqloss.common.errors import UserError, require

Result = TypeVar("Result")

WATCHED_EVERY = 1.0  # seconds


def in_processes(
    work: Callable[..., Result], calls: Sequence[tuple[Any, ...]], jobs: int
) -> Iterator[Result]:
    """What ``work`` returns for each of these arguments, as it is done.

    Ctrl-C and SIGTERM raise KeyboardInterrupt, and end every process. One job is done here.
    """
    joblib = require("joblib")
    each = joblib.delayed(supervised)
    parallel = joblib.Parallel(max(1, min(jobs, len(calls))), return_as="generator_unordered")
    with sigterm_as_ctrl_c():
        try:
            yield from parallel(each(os.getpid(), work, *arguments) for arguments in calls)
        except joblib.externals.loky.process_executor.TerminatedWorkerError as error:
            raise UserError(
                f"--jobs: expected processes that nothing else ends, got one of {jobs} killed, "
                "which is what becomes of those that want more memory than there is"
            ) from error


def supervised(parent: int, work: Callable[..., Result], *arguments: Any) -> Result:
    """Work in a process that does not outlive its parent, which had no time to end it if killed."""
    if os.getpid() != parent:
        watch(parent)
    return work(*arguments)


@functools.cache
def watch(parent: int) -> None:
    def end_after() -> None:
        while os.getppid() == parent:
            time.sleep(WATCHED_EVERY)
        os._exit(1)

    threading.Thread(target=end_after, daemon=True).start()


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Python delivers signals to the main thread only: elsewhere nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
