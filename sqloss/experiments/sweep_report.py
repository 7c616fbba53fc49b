"""What a sweep has come to: a row per run and model, means over seeds, and paired differences."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sqloss.common.errors import UserError
from sqloss.common.files import as_csv, write_atomically
from sqloss.common.flags import as_text, flat
from sqloss.common.tables import CONFIDENCE, table
from sqloss.common.text import in_markdown
from sqloss.experiments.measurement import (
    Control,
    Key,
    Measurement,
    Row,
    Series,
    finite,
    series_of,
)
from sqloss.experiments.statistics import Paired, mean_interval, paired, paired_table
from sqloss.experiments.sweep import FAILED, Sweep, Task, data_of
from sqloss.experiments.sweep_plots import Panel, draw_panels
from sqloss.training.trainer import Metric, Report

PICTURE = "sweep.png"


def metric_to_choose_by(measurement: Measurement, name: str) -> str:
    """That of --best-by, or the first of the tables; "" where there are no metrics."""
    allowed = [metric for metric, m in measurement.metrics.items() if m.better]
    name = name or next(iter([*measurement.main_metrics, *allowed]), "")
    if name and name not in allowed:
        expected = f"one of {', '.join(allowed)}" if allowed else "no such flag without metrics"
        raise UserError(f"--best-by: expected {expected}, got {name}")
    return name


def is_of_one_tail(sweep: Sweep, metric: str) -> bool:
    """Whether a metric is the same one in every arm: tails at different alphas do not compare."""
    alphas = {task.config.metric_alpha for task in sweep.tasks}
    return len(alphas) == 1 or not sweep.measurement.metrics[metric].of_tail


def refuse_other_tails(sweep: Sweep, metric: str) -> None:
    if metric and not is_of_one_tail(sweep, metric):
        raise UserError(
            f"--best-by: expected a metric that is the same one in every arm, got {metric}, "
            "which is of the tail at each arm's own --alpha"
        )


# Rows.


def rows_of(sweep: Sweep) -> list[Row]:
    """Those of the runs that are done."""
    return [row for task in sweep.tasks if sweep.is_done(task) for row in rows_of_task(sweep, task)]


def rows_of_task(sweep: Sweep, task: Task) -> list[Row]:
    config, values = task.config, flat(task.config)
    flags = {name: as_text(values.get(name, "")) for name in sweep.fields}
    named = {"arm": task.arm, "seed": config.seed, **flags}
    if task.has_failed:
        models, error = config.contenders, reason(task)
        return [{**named, "model": name, "error": error} for name in models]
    report = read_json(task.directory / sweep.measurement.file)
    return [named | row for row in sweep.measurement.rows(report, config)]


def reason(task: Task) -> str:
    """Why a run has failed."""
    return str(read_json(task.directory / FAILED)["error"])


def read_json(path: Path) -> Report:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--output-dir: cannot use {path}: {error}") from error


def write_csv(sweep: Sweep) -> None:
    m = sweep.measurement
    columns = ("arm", "seed", *m.parts, *sweep.fields, *m.metrics, "error")
    write_atomically(sweep.csv, as_csv(columns, rows_of(sweep)))


def outcome(sweep: Sweep, task: Task, metric: str) -> str:
    """What a run has come to, in words."""
    name = f"{task.arm}, seed {task.config.seed}"
    if task.has_failed:
        return f"{name} has failed: {reason(task)}"
    if not metric or len(sweep.measurement.parts) > 1:
        return f"{name} is done"
    m = sweep.measurement.metrics[metric]
    rows = rows_of_task(sweep, task)
    values = [f"{cell(dict(enumerate(finite(row[metric]))), m)} ({row['model']})" for row in rows]
    warnings = [(row["model"], sweep.measurement.trainer.warning(row)) for row in rows]
    alarms = [
        f"; {model}: {warning}, see {task.directory / 'report.md'}"
        for model, warning in warnings
        if warning
    ]
    return f"{name}: {m.label} {', '.join(values)}{''.join(alarms)}"


def best_of(series: Series, better: str, seeds: int) -> Key | None:
    """The best on average, of those that have a value for every seed."""
    means = {
        key: mean_interval(list(values.values()))[0]
        for key, values in series.items()
        if len(values) == seeds
    }
    choose = min if better == "lower" else max
    return choose(means, key=means.__getitem__) if means else None


# The report.


def write_report(sweep: Sweep, metric: str) -> None:
    draw_samples(sweep)
    write_atomically(sweep.markdown, as_markdown(sweep, metric).encode())


def draw_samples(sweep: Sweep) -> None:
    """What every arm generates with the first seed, but for those that failed with it."""
    trainer, seed = sweep.measurement.trainer, sweep.tasks[0].config.seed
    # A row of several is not of its model alone
    has_samples = trainer.has_samples and len(sweep.measurement.parts) == 1
    panels = []
    for task in sweep.tasks:
        if task.config.seed == seed and not task.has_failed and has_samples:
            rows = rows_of_task(sweep, task)
            data = data_of(trainer, task.config)
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
    return f"{name}\n{sweep.measurement.trainer.caption(row)}"


def as_markdown(sweep: Sweep, metric: str) -> str:
    how_to_read = f"{HOW_TO_READ} {sweep.measurement.how_to_read}".rstrip()
    parts = [f"# {sweep.measurement.title}", how_to_read, summary(sweep, metric)]
    rows = rows_of(sweep)
    for other in present(sweep, rows):
        if other != metric:
            parts += means(sweep, rows, other) if sweep.measurement.across else []
            parts += differences(sweep, rows, other)
    if (sweep.directory / PICTURE).exists():
        parts.append(f"![Samples of every arm]({PICTURE})")
    return "\n\n".join(parts) + "\n"


HOW_TO_READ = f"""\
Means over seeds, in brackets their {CONFIDENCE:.0%} t intervals. Differences are paired by the
seed, and relative to the mean of what they are from; p is of the paired t test, and Holm's
correction is over the rows of its table. The best of many rows is the best by luck too: only the
differences tell how far it is to be believed, and with one seed nothing does. The settings that
all arms share are in `sweep.json`, and those of each run in its `config.json`."""


HOW_TO_RETRY = f"Failed (a run is tried again once the {FAILED} in its directory is deleted):"


def summary(sweep: Sweep, metric: str) -> str:
    """The means, the best of them, and the differences in the metric that it is the best by."""
    rows = rows_of(sweep)
    parts = means(sweep, rows, metric)
    failed = [
        f"- {in_markdown(task.arm)}, seed {task.config.seed}: {reason(task)}"
        for task in sweep.tasks
        if task.has_failed
    ]
    if failed:
        parts.append(f"{HOW_TO_RETRY}\n\n" + "\n".join(failed))
    return "\n\n".join([*parts, *differences(sweep, rows, metric)])


def present(sweep: Sweep, rows: Sequence[Row]) -> list[str]:
    """The metrics of the table that some row has, and that compare."""
    return [
        metric
        for metric in sweep.measurement.main_metrics
        if any(row.get(metric) is not None for row in rows) and is_of_one_tail(sweep, metric)
    ]


def columns_of(sweep: Sweep, rows: Sequence[Row], metric: str) -> Iterator[tuple[str, str, Series]]:
    """The label, the metric and the series of each column of the means that are told together."""
    m = sweep.measurement
    parts = m.parts_of(metric)
    if m.across in parts:
        others = [part for part in parts if part != m.across]
        for value in dict.fromkeys(row[m.across] for row in rows if m.across in row):
            ours = [row for row in rows if row.get(m.across, value) == value]
            yield value, metric, series_of(ours, metric, others)
        return
    beside = [] if m.across else present(sweep, rows)
    for other in dict.fromkeys(filter(None, [metric, *beside])):
        yield m.metrics[other].label, other, series_of(rows, other, parts)


def means(sweep: Sweep, rows: Sequence[Row], metric: str) -> list[str]:
    """A table of means, and the best by the metric in words."""
    metrics, seeds = sweep.measurement.metrics, len({task.config.seed for task in sweep.tasks})
    columns = list(columns_of(sweep, rows, metric))
    by = metrics[metric].label if metric else ""
    best, words = [], []
    for label, name, series in columns:
        key = best_of(series, metrics[name].better, seeds) if name == metric else None
        best.append(key)
        of = by if label == by else f"{by}, {label}"
        if key:
            name, value = in_markdown(name_of(key, rows)), cell(series[key], metrics[metric])
            words.append(f"Best by {of} ({metrics[metric].better} is better): **{name}**, {value}.")
        elif name == metric:
            words.append(f"No row is the best by {of}: none has it for every seed.")
    lines = [[by if sweep.measurement.across else "", "seeds", *(label for label, _, _ in columns)]]
    for key in columns[0][2] if columns else series_of(rows, metric):
        done = {r["seed"] for r in rows if (r["arm"], r["model"]) == key[:2] and "error" not in r}
        name = in_markdown(name_of(key, rows))
        cells = [cell(series.get(key, {}), metrics[other]) for _, other, series in columns]
        cells = [f"**{c}**" if b == key else c for c, b in zip(cells, best, strict=True)]
        told = str(seeds) if len(done) == seeds else f"{len(done)} of {seeds}"
        lines.append([f"**{name}**" if key in best else name, told, *cells])
    return [table(lines), "\n".join(words)] if words else [table(lines)]


def cell(values: Mapping[int, float], metric: Metric) -> str:
    """The mean over seeds with its interval, where there are several."""
    if not values:
        return "-"
    mean, *interval = (f"{each:.{metric.digits}f}" for each in mean_interval([*values.values()]))
    return f"{mean} [{', '.join(interval)}]" if len(values) > 1 else mean


def compared(series: Series, control_of: Control) -> dict[tuple[Key, Key], Paired]:
    """Every series with its control, where both have several seeds."""
    pairs = [(key, control) for key in series if (control := control_of(key, series))]
    return {
        (key, control): paired(series[key], series[control])
        for key, control in pairs
        if len(series[key].keys() & series[control].keys()) > 1
    }


def differences(sweep: Sweep, rows: Sequence[Row], metric: str) -> list[str]:
    """A table for each kind of control."""
    series = series_of(rows, metric, sweep.measurement.parts_of(metric))
    tables = []
    for origin, control_of in sweep.measurement.controls.items():
        found = compared(series, control_of)
        controls = {control._replace(rest=()) for _, control in found}
        if not found:
            continue
        named = {name_of(key, rows): difference for (key, _), difference in found.items()}
        if not origin and len(controls) > 1:
            origin = "the first arm"
            named = {
                f"{name_of(key, rows)} - {name_of(control._replace(rest=()), rows)}": difference
                for (key, control), difference in found.items()
            }
        origin = origin or name_of(controls.pop(), rows)
        m = sweep.measurement.metrics[metric]
        heading = f"{m.label}: difference from {in_markdown(origin)} ({m.better} is better)"
        named = {in_markdown(name): difference for name, difference in named.items()}
        tables.append(f"{heading}\n\n{table(paired_table(named, m.digits))}")
    return tables


def name_of(key: Key, rows: Sequence[Row]) -> str:
    """The arm, the model where the arm has several, and the rest."""
    models = {row["model"] for row in rows if row["arm"] == key.arm}
    model = [key.model] if len(models) > 1 else []
    return ": ".join([key.arm, *model, *filter(None, key.rest)])
