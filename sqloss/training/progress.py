"""How far training is, on stderr: a line per epoch, and on a terminal a bar below them."""

import sys
from collections.abc import Sequence
from typing import Any

from sqloss.training.errors import require


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


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

    def epoch(self, rows: Sequence[dict[str, Any]]) -> None:
        """Tell the metrics of an epoch, one row per model."""
        models = "; ".join(
            f"{row['model']} -ELBO {row['test_negative_elbo']:.2f}, "
            f"CVaR {row['test_negative_elbo_cvar']:.2f}"
            for row in rows
        )
        self._bar.write(f"epoch {rows[0]['epoch']}/{self._epochs}: {models}", file=sys.stderr)


class Silence(Progress):
    """Tells nothing: many trainings are told of by those who run them."""

    def __init__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def step(self) -> None:
        pass

    def epoch(self, rows: Sequence[dict[str, Any]]) -> None:
        pass
