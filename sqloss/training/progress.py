"""How far training is, on stderr: a line per epoch, and on a terminal a bar below them."""

import sys
from collections.abc import Sequence

from sqloss.common.errors import require
from sqloss.common.streams import may_be_left


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """Seconds in words, to two digits or so: "0.35 s", "48 s", "12 min", "3 h 20 min"."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 600 else f"{hours} h"


class Progress:
    """Counts steps; ``done`` of ``steps`` were done before."""

    def __init__(self, steps: int, done: int, epochs: int) -> None:
        self._epochs = epochs
        self._bar = require("tqdm").tqdm(
            desc="training",
            total=steps,
            initial=done,
            unit="step",
            disable=None,
            dynamic_ncols=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self) -> None:
        self._bar.update()

    def epoch(self, epoch: int, models: Sequence[str]) -> None:
        """Tell what each model has come to after an epoch."""
        self.tell(f"epoch {epoch}/{self._epochs}: {'; '.join(models)}")

    def tell(self, line: str) -> None:
        with may_be_left(sys.stderr):
            self._bar.write(line, file=sys.stderr)


class Silence(Progress):
    """Shows nothing: a sweep reports on its many trainings itself."""

    def __init__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def step(self) -> None:
        pass

    def epoch(self, epoch: int, models: Sequence[str]) -> None:
        pass

    def tell(self, line: str) -> None:
        pass
