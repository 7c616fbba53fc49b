"""What a sweep makes of its runs: rows of numbers, and which of these are compared with which.

The values of one metric, a value per seed, are a series.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from sqloss.datasets import Dataset
from sqloss.models.classifier import Classifier
from sqloss.training.config import ImageConfig
from sqloss.training.run import Run
from sqloss.training.shares import kept_classifier
from sqloss.training.threads import set_threads
from sqloss.training.trainer import Metric, Report, Trainer
from sqloss.training.trainers import TRAINERS

Row = dict[str, Any]
CLASSIFIER_SEED = 0  # not --seed, which may be another when a sweep is taken up again


class Key(NamedTuple):
    """Whose series: an arm's model, and where a model has several rows what tells them apart."""

    arm: str
    model: str
    rest: tuple[str, ...] = ()


Series = dict[Key, dict[int, float]]
Control = Callable[[Key, Series], Key | None]  # what a series is compared with, if with anything


def first_arm(key: Key, series: Series) -> Key | None:
    """The first arm's model of the same name, or else its own one, which is the last of its models.

    The models of the first arm are compared with the first of them.
    """
    first = next(iter(series)).arm
    like = [other for other in series if other.arm == first and other.rest == key.rest]
    if not like or key == like[0]:
        return None
    named = key._replace(arm=first)
    return like[0] if key.arm == first else named if named in like else like[-1]


@dataclass(frozen=True)
class Measurement:
    """What is made of each run of ``sqloss COMMAND``, and how it is told: its trainer's report.

    A subclass may make something else of a run.
    """

    command: str
    name: ClassVar[str] = "sweep"
    """The stem of its tables' files in the directory of the sweep."""
    file: ClassVar[str] = "report.json"
    """In the directory of a run; written last, it tells that the run is done."""
    parts: ClassVar[tuple[str, ...]] = ("model",)
    """The columns that tell the rows of a run apart, the model first."""
    across: ClassVar[str] = ""
    """The part whose values are the columns of the tables, a table per metric; "" puts the metrics
    side by side in one table."""
    untrained: ClassVar[tuple[str, ...]] = ()
    """The arms that train nothing."""
    controls: ClassVar[Mapping[str, Control]] = {"": first_arm}
    """What is compared with what, by the name of what all is compared with, where it has one."""
    how_to_read: ClassVar[str] = ""
    """What a reader must know of the metrics."""

    @property
    def trainer(self) -> Trainer[Any, Any]:
        return TRAINERS[self.command]

    @property
    def title(self) -> str:
        return f"Sweep of sqloss {self.command}"

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return self.trainer.metrics

    @property
    def main_metrics(self) -> Sequence[str]:
        """Those of the tables."""
        return self.trainer.main_metrics

    @property
    def settings(self) -> Mapping[str, Any]:
        """What must stay, beside the settings of the runs, when a directory is taken up again."""
        return {}

    def parts_of(self, metric: str) -> tuple[str, ...]:
        """The parts that a metric differs by."""
        return self.parts

    def prepare(self, directory: Path, config: Any, whole: Any, seed: int) -> None:
        """Make what the runs of a sweep share; ``seed`` is that of the first."""
        self.trainer.prepare(config, whole, seed)

    def measure(self, run: Run[Any], is_trained: bool) -> None:
        """Write the file of a run that has trained, or that trains nothing."""
        run.report()

    def measured(self, report: Report, config: Any) -> Mapping[tuple[str, ...], Any]:
        """What the metrics are the values of, by the parts of its row."""
        models = report.get("models") or dict.fromkeys(config.contenders)
        return {(name,): model for name, model in models.items()}

    def rows(self, report: Report, config: Any) -> list[Row]:
        """Those of a file, by parts and metrics."""
        return [
            dict(zip(self.parts, parts, strict=True))
            | {name: m.value(report, found) for name, m in self.metrics.items()}
            for parts, found in self.measured(report, config).items()
        ]


@dataclass(frozen=True)
class Judged(Measurement):
    """One of rows that it writes itself, in which one classifier judges all runs of a sweep."""

    def prepare(self, directory: Path, config: ImageConfig, whole: Dataset, seed: int) -> None:
        set_threads(config, whole)
        self.classifier(directory, config, whole)

    def classifier(self, directory: Path, config: ImageConfig, whole: Dataset) -> Classifier:
        path = config.classifier_file or directory / "classifier.pt"
        return kept_classifier(path, whole, config.torch_device, CLASSIFIER_SEED)

    def measured(self, report: Report, config: Any) -> Mapping[tuple[str, ...], Any]:
        return {tuple(row[part] for part in self.parts): row for row in report["rows"]}


def metrics_of_rows(*columns: tuple[str, str, int, str]) -> dict[str, Metric]:
    """Metrics of ``Judged``: the name in a row, the label, the digits, and which is better."""

    def of_row(name: str) -> Callable[[Report, Report], float | None]:
        return lambda _, row: row.get(name)

    return {
        name: Metric(label, digits, better, of_row(name)) for name, label, digits, better in columns
    }


def series_of(rows: Sequence[Row], metric: str, parts: Sequence[str] = ("model",)) -> Series:
    """The values that there are and that are finite.

    A failed run has no parts but its models; it has a series where these have no other.
    """
    series: Series = {}
    for row in rows:
        key = Key(row["arm"], row["model"], tuple(row.get(part, "") for part in parts[1:]))
        values = series.setdefault(key, {})
        for value in finite(row.get(metric)):
            values[row["seed"]] = value
    whole = {key[:2] for key, values in series.items() if values}
    return {key: values for key, values in series.items() if values or key[:2] not in whole}


def finite(value: float | None) -> list[float]:
    """The value, if there is one."""
    return [value] if value is not None and math.isfinite(value) else []
