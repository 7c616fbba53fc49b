"""Means over seeds, and differences that are paired by the seed."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from sqloss.common.errors import require
from sqloss.common.tables import CONFIDENCE


class Paired(NamedTuple):
    """The mean difference of a series from another, with its interval and its p value."""

    difference: float
    low: float
    high: float
    relative: float  # to the mean of the other series
    below: int  # seeds in which the difference is below 0
    seeds: int
    p: float


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean with its t interval."""
    if are_equal(values):
        return values[0], values[0], values[0]
    interval = require("scipy.stats").ttest_1samp(values, 0).confidence_interval(CONFIDENCE)
    return statistics.fmean(values), float(interval.low), float(interval.high)


def are_equal(values: Sequence[float]) -> bool:
    """Whether all are one number but for rounding: a t test would take that for its spread."""
    return math.isclose(min(values), max(values), rel_tol=1e-9, abs_tol=1e-12)


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Paired:
    """Compare two series over the seeds that both have, by a paired t test."""
    seeds = sorted(values.keys() & others.keys())
    left, right = [values[seed] for seed in seeds], [others[seed] for seed in seeds]
    differences = [a - b for a, b in zip(left, right, strict=True)]
    mean, low, high = mean_interval(differences)
    origin = statistics.fmean(right)
    if are_equal(differences):
        p = 1.0  # a t test knows nothing of differences without spread
    else:
        p = float(require("scipy.stats").ttest_rel(left, right).pvalue)
    return Paired(
        difference=mean,
        low=low,
        high=high,
        relative=mean / origin if origin else math.nan,
        below=sum(difference < 0 for difference in differences),
        seeds=len(seeds),
        p=p,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down correction, in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def paired_table(differences: Mapping[str, Paired], digits: int) -> Iterator[list[str]]:
    """The rows of a table of differences; Holm's correction is over them."""
    yield ["", "difference", "relative", "below 0", "p", "p (Holm)"]
    corrected = holm([difference.p for difference in differences.values()])
    for (name, d), p in zip(differences.items(), corrected, strict=True):
        yield [
            name,
            f"{d.difference:+.{digits}f} [{d.low:+.{digits}f}, {d.high:+.{digits}f}]",
            "-" if math.isnan(d.relative) else f"{d.relative:+.1%}",
            f"{d.below}/{d.seeds}",
            f"{d.p:.2g}",
            f"{p:.2g}",
        ]
