"""What a sweep has come to: a row per run and model, means over seeds, and paired differences."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sqloss.experiments.statistics import Paired, mean_interval, paired, paired_table
from sqloss.experiments.sweep import FAILED, Row, Sweep, Task, data_of
from sqloss.experiments.sweep_plots import Panel, draw_panels
from sqloss.training.errors import UserError
from sqloss.training.files import as_csv, write_atomically
from sqloss.training.flags import as_text, flat
from sqloss.training.progress import counted
from sqloss.training.tables import CONFIDENCE, aligned
from sqloss.training.text import in_markdown
from sqloss.training.trainer import Report
from sqloss.training.trainers import TRAINERS

PICTURE = "sweep.png"


def metric_to_choose_by(command: str, name: str) -> str:
    """That of --best-by, or the trainer's first."""
    name = name or TRAINERS[command].main_metrics[0]
    allowed = [metric for metric, m in TRAINERS[command].metrics.items() if m.better]
    if name not in allowed:
        raise UserError(f"--best-by: expected one of {', '.join(allowed)}, got {name}")
    return name


def is_of_one_tail(sweep: Sweep, metric: str) -> bool:
    """Whether a metric is the same one in every arm: tails at different alphas do not compare."""
    alphas = {task.config.metric_alpha for task in sweep.tasks}
    return len(alphas) == 1 or not TRAINERS[sweep.command].metrics[metric].of_tail


def refuse_other_tails(sweep: Sweep, metric: str) -> None:
    if not is_of_one_tail(sweep, metric):
        raise UserError(
            f"--best-by: expected a metric that is the same one in every arm, got {metric}, "
            "which is of the tail at each arm's own --alpha"
        )


# Rows.


def rows_of(sweep: Sweep) -> list[Row]:
    """Those of the runs that are done, one per model."""
    return [row for task in sweep.tasks if task.is_done for row in rows_of_task(sweep, task)]


def rows_of_task(sweep: Sweep, task: Task) -> list[Row]:
    row = {"arm": task.arm, "seed": task.config.seed}
    settings = flat(task.config)
    flags = {n: as_text(settings[n]) if n in settings else "" for n in sweep.fields}
    if task.has_failed:
        error = reason(task)
        return [row | {"model": name, **flags, "error": error} for name in task.config.contenders]
    report = read_json(task.directory / "report.json")
    return [
        row
        | {"model": name, **flags}
        | {metric: m.value(report, model) for metric, m in TRAINERS[sweep.command].metrics.items()}
        for name, model in report["models"].items()
    ]


def reason(task: Task) -> str:
    """Why a run has failed."""
    return str(read_json(task.directory / FAILED)["error"])


def read_json(path: Path) -> Report:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--output-dir: cannot use {path}: {error}") from error


def write_csv(sweep: Sweep) -> None:
    columns = ("arm", "seed", "model", *sweep.fields, *TRAINERS[sweep.command].metrics, "error")
    write_atomically(sweep.directory / "sweep.csv", as_csv(columns, rows_of(sweep)))


def outcome(sweep: Sweep, task: Task, metric: str) -> str:
    """What a run has come to, in words."""
    name = f"{task.arm}, seed {task.config.seed}"
    if task.has_failed:
        return f"{name} has failed: {reason(task)}"
    m = TRAINERS[sweep.command].metrics[metric]
    rows = rows_of_task(sweep, task)
    values = [f"{cell(finite(row[metric]), m.digits)} ({row['model']})" for row in rows]
    alarms = [
        f"; {row['model']}: something was wrong in {counted(row['failed_epochs'], 'epoch')}, "
        f"see {task.directory / 'report.md'}"
        for row in rows
        if row.get("failed_epochs")
    ]
    return f"{name}: {m.label} {', '.join(values)}{''.join(alarms)}"


# Series of values, one per seed.


class Key(NamedTuple):
    """Whose values: those of one metric, a value per seed, are a series."""

    arm: str
    model: str


Series = dict[Key, dict[int, float]]


def series_of(rows: Sequence[Row], metric: str) -> Series:
    """The values that there are and that are finite."""
    series: Series = {}
    for row in rows:
        values = series.setdefault(Key(row["arm"], row["model"]), {})
        for value in finite(row.get(metric)):
            values[row["seed"]] = value
    return series


def finite(value: float | None) -> list[float]:
    """The value, if there is one."""
    return [value] if value is not None and math.isfinite(value) else []


def best_of(series: Series, better: str, seeds: int) -> Key | None:
    """The best on average, of those that have a value for every seed."""
    means = {
        key: mean_interval(list(values.values()))[0]
        for key, values in series.items()
        if len(values) == seeds
    }
    choose = min if better == "lower" else max
    return choose(means, key=means.__getitem__) if means else None


def against_first(series: Series) -> dict[tuple[Key, Key], Paired]:
    """Every arm against the first one: its like-named model, or else its first one.

    The models of the first arm are against the first of them.
    """
    first, *_ = series
    differences = {}
    for key, values in series.items():
        like = first._replace(model=key.model)
        control = like if like in series and like != key else first
        if key != first and len(values.keys() & series[control].keys()) > 1:
            differences[key, control] = paired(values, series[control])
    return differences


# The report.


def write_report(sweep: Sweep, metric: str) -> None:
    draw_samples(sweep)
    write_atomically(sweep.directory / "sweep.md", as_markdown(sweep, metric).encode())


def draw_samples(sweep: Sweep) -> None:
    """What every arm generates with the first seed, but for those that failed with it."""
    trainer, seed = TRAINERS[sweep.command], sweep.tasks[0].config.seed
    panels = []
    for task in sweep.tasks:
        if task.config.seed == seed and not task.has_failed and trainer.has_samples:
            rows = rows_of_task(sweep, task)
            data = data_of(sweep.command, task.config)
            images = trainer.samples(task.config, data, task.directory)
            panels += [
                Panel(caption(sweep, row, rows), images[row["model"]])
                for row in rows
                if row["model"] in images
            ]
    if panels:
        title = f"Generated from the same noise, with seed {seed}"
        draw_panels(sweep.directory / PICTURE, panels, title)


def caption(sweep: Sweep, row: Row, rows: Sequence[Row]) -> str:
    """The name of a row, and what its trainer tells of it."""
    name = name_of(Key(row["arm"], row["model"]), rows)
    return f"{name}\n{TRAINERS[sweep.command].caption(row)}"


def as_markdown(sweep: Sweep, metric: str) -> str:
    parts = [f"# Sweep of sqloss {sweep.command}", HOW_TO_READ, summary(sweep, metric)]
    rows = rows_of(sweep)
    others = [other for other in present(sweep, rows) if other != metric]
    parts += [table for other in others if (table := differences(sweep, rows, other))]
    if (sweep.directory / PICTURE).exists():
        parts.append(f"![Samples of every arm]({PICTURE})")
    return "\n\n".join(parts) + "\n"


HOW_TO_READ = f"""\
Means over seeds, in brackets their {CONFIDENCE:.0%} t intervals. Differences are paired by the
seed, and relative to the mean of what they are from; p is of the paired t test, and Holm's
correction is over the rows of its table. The best of many rows is the best by luck too: only the
differences tell how far it is to be believed, and with one seed nothing does. The settings that
all arms share are in `sweep.json`, and those of each run in the `config.json` beside its report."""


HOW_TO_RETRY = f"Failed (a run is tried again once the {FAILED} in its directory is deleted):"


def summary(sweep: Sweep, metric: str) -> str:
    """The means, the best of them, and the differences in the metric that it is the best by."""
    rows = rows_of(sweep)
    seeds = len({task.config.seed for task in sweep.tasks})
    m = TRAINERS[sweep.command].metrics[metric]
    best = best_of(series_of(rows, metric), m.better, seeds)
    parts = [table(means_table(sweep, rows, metric, best, seeds))]
    if best:
        value = cell(list(series_of(rows, metric)[best].values()), m.digits)
        name = in_markdown(name_of(best, rows))
        parts.append(f"Best by {m.label} ({m.better} is better): **{name}**, {value}.")
    else:
        parts.append(f"No row is the best by {m.label}: none has it for every seed.")
    failed = [
        f"- {in_markdown(task.arm)}, seed {task.config.seed}: {reason(task)}"
        for task in sweep.tasks
        if task.has_failed
    ]
    if failed:
        parts.append(f"{HOW_TO_RETRY}\n\n" + "\n".join(failed))
    return "\n\n".join(filter(None, [*parts, differences(sweep, rows, metric)]))


def present(sweep: Sweep, rows: Sequence[Row]) -> list[str]:
    """The metrics of the table that some row has, and that compare."""
    return [
        metric
        for metric in TRAINERS[sweep.command].main_metrics
        if any(row.get(metric) is not None for row in rows) and is_of_one_tail(sweep, metric)
    ]


def means_table(
    sweep: Sweep, rows: Sequence[Row], metric: str, best: Key | None, seeds: int
) -> Iterator[list[str]]:
    known = TRAINERS[sweep.command].metrics
    metrics = list(dict.fromkeys([metric, *present(sweep, rows)]))
    yield ["", "seeds", *(known[other].label for other in metrics)]
    series = {other: series_of(rows, other) for other in metrics}
    for key in series[metric]:
        cells = [cell(list(series[other][key].values()), known[other].digits) for other in metrics]
        done = sum(Key(row["arm"], row["model"]) == key and "error" not in row for row in rows)
        name = in_markdown(name_of(key, rows))
        if key == best:
            name, cells[0] = f"**{name}**", f"**{cells[0]}**"
        yield [name, str(seeds) if done == seeds else f"{done} of {seeds}", *cells]


def cell(values: Sequence[float], digits: int) -> str:
    """The mean over seeds with its interval, where there are several."""
    if not values:
        return "-"
    mean, low, high = mean_interval(values)
    interval = f" [{low:.{digits}f}, {high:.{digits}f}]" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{interval}"


def differences(sweep: Sweep, rows: Sequence[Row], metric: str) -> str:
    found = against_first(series_of(rows, metric))
    if not found:
        return ""
    m = TRAINERS[sweep.command].metrics[metric]
    controls = {control for _, control in found}
    if len(controls) == 1:
        origin = name_of(controls.pop(), rows)
        named = {name_of(key, rows): difference for (key, _), difference in found.items()}
    else:
        origin = "the first arm"
        named = {
            f"{name_of(key, rows)} - {name_of(control, rows)}": difference
            for (key, control), difference in found.items()
        }
    heading = f"{m.label}: difference from {in_markdown(origin)} ({m.better} is better)"
    named = {in_markdown(name): difference for name, difference in named.items()}
    return f"{heading}\n\n{table(paired_table(named, m.digits))}"


def table(rows: Iterator[list[str]]) -> str:
    return "\n".join(aligned(list(rows)))


def name_of(key: Key, rows: Sequence[Row]) -> str:
    """The arm, and the model where the arm has several."""
    models = {row["model"] for row in rows if row["arm"] == key.arm}
    return key.arm if len(models) == 1 else f"{key.arm}: {key.model}"
