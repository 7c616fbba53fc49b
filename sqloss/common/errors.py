"""What the user can put right is a ``UserError``: its message names what was expected and got."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from sqloss._extras import UserError as UserError
from sqloss._extras import require as require


@contextlib.contextmanager
def told(
    kind: type[Exception] | tuple[type[Exception], ...], message: Callable[[Any], str]
) -> Iterator[None]:
    """Raise exceptions of a kind as what the user can do about them."""
    try:
        yield
    except kind as error:
        raise UserError(message(error)) from error
