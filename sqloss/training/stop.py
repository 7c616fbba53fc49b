"""Ctrl-C and SIGTERM as a wish to stop, which the loop grants between two steps."""

import signal
import threading
from types import FrameType
from typing import Any

from sqloss.common import ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Within it the first signal sets ``requested``; a second one acts as it did before, at once.

    Python delivers signals to the main thread only: elsewhere nothing is changed.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; all ranks call this at the same time."""
        return ranks.any_of(self.requested)

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        self.__exit__()
