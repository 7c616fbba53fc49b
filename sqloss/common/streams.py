"""Output on stdout and stderr: its reader may leave, and a terminal may lack letters."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from sqloss.common.errors import UserError


def show(text: str) -> None:
    """Print a result on stdout; what its encoding lacks is escaped, as on stderr."""
    if sys.stdout is not None:  # as it is where it was closed before Python started
        encoding = sys.stdout.encoding or "utf-8"
        with may_be_left(sys.stdout):
            print(text.encode(encoding, "backslashreplace").decode(encoding))


def tell(line: str) -> None:
    """Print how the work goes on stderr."""
    if sys.stderr is not None:
        with may_be_left(sys.stderr):
            print(line, file=sys.stderr)


@contextlib.contextmanager
def may_be_left(stream: TextIO) -> Iterator[None]:
    """Within it something is written to a stream, which ends no work where that fails.

    Once its reader has left, the stream leads nowhere. A full disk behind stdout is a UserError;
    one behind stderr could not be reported.
    """
    try:
        yield
        stream.flush()
    except OSError as error:
        lead_nowhere(stream)
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            raise UserError(f"stdout: cannot write: {error.strerror}") from error


def flush_stdout() -> None:
    """Before Python does so at its end, where it complains of a reader that has left."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        lead_nowhere(sys.stdout)
    except OSError:
        pass  # Python tells of it


def lead_nowhere(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
