"""Priors compared at imputation: arms, each trained with every seed, and paired statistics.

An arm is a change to the configuration. With one seed, all arms start from the same weights, see
the same batches and the same missing pixels: their differences are paired by the seed.
"""

import csv
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sqloss.experiments.directory import keep_settings
from sqloss.experiments.imputation import (
    COLUMNS,
    METRICS,
    NO_MODEL,
    ONE_SHOT,
    PSEUDO_GIBBS,
    ImputeConfig,
    Row,
    baseline_methods,
    make_masks,
    measure,
    vae_methods,
)
from sqloss.experiments.processes import in_processes
from sqloss.experiments.statistics import Paired, mean_interval, paired, paired_table
from sqloss.models.classifier import Classifier
from sqloss.training.config import to_stored
from sqloss.training.datasets import Dataset
from sqloss.training.errors import UserError
from sqloss.training.files import as_csv, write_atomically
from sqloss.training.flags import LARGEST, as_flag, changed, expect, flag
from sqloss.training.loop import fit
from sqloss.training.progress import Silence
from sqloss.training.tables import CONFIDENCE, aligned
from sqloss.training.threads import set_threads
from sqloss.training.vae.config import VAEConfig
from sqloss.training.vae.loop import VAETraining, begin

CONTROL = "normal"
CLASSIFIER_SEED = 0  # not --seed, which may be another when a comparison is taken up again
# What arms are made of, and what changes where a result comes from but not what it is.
NOT_SETTINGS = ("prior", "df", "learn_df", "seed", *VAEConfig.of_machine)
ELBO = "test_negative_elbo"
COMPARED_COLUMNS = ("arm", "seed", ELBO, *COLUMNS)
TEXTS = ("arm", "model", "method", "mask")
LABELS = {"rmse": "RMSE", "mae": "MAE", "ssim": "SSIM", "accuracy": "Accuracy", ELBO: "-ELBO"}
DIGITS = {ELBO: 2}
USUAL_DIGITS = 4


@dataclass(frozen=True)
class CompareConfig:
    """Which arms are compared, valid by construction."""

    dfs: str = flag("3,5,21", "df of the t priors to compare, or none", metavar="DF,...")
    betas: str = flag(
        "0.5,2", "weights of the KL of the normal controls, or none", metavar="BETA,..."
    )
    seeds: int = flag(8, "seeds to train every arm with, from --seed on", metavar="N")
    jobs: int = flag(1, "processes that train at the same time, each with one thread", metavar="N")

    def __post_init__(self) -> None:
        expect(self, "seeds", 2 <= self.seeds <= LARGEST, f"a whole number from 2 to {LARGEST}")
        expect(self, "jobs", 1 <= self.jobs <= LARGEST, f"a whole number from 1 to {LARGEST}")
        parse_numbers("dfs", self.dfs)
        parse_numbers("betas", self.betas)


def parse_numbers(name: str, text: str) -> tuple[float, ...]:
    """The numbers that a flag names: "0.5,2" is (0.5, 2), "none" is ()."""
    try:
        return () if text == "none" else tuple(map(float, text.split(",")))
    except ValueError as error:
        raise UserError(
            f"{as_flag(name)}: expected 'none' or numbers such as 3 or 0.5,2, got {text!r}"
        ) from error


# Arms and their trials.


class Task(NamedTuple):
    """One arm with one seed; the baselines are an arm too."""

    arm: str
    config: VAEConfig


def make_arms(config: VAEConfig, compare_config: CompareConfig) -> dict[str, VAEConfig]:
    """The control, Student-t priors of each df, and the control with other weights of the KL.

    A t prior pulls less than the normal one does; those weights tell whether that is all.
    """
    control = changed(config, prior="normal")
    students = {
        f"t, df {df:g}": changed_by("dfs", config, prior="t", df=df)
        for df in parse_numbers("dfs", compare_config.dfs)
    }
    weights = {
        f"normal, beta {beta:g}": changed_by("betas", control, beta=beta)
        for beta in parse_numbers("betas", compare_config.betas)
    }
    return {CONTROL: control} | students | weights


def changed_by(name: str, config: VAEConfig, **changes: Any) -> VAEConfig:
    """A configuration with changes that come from the flag of this name."""
    try:
        return changed(config, **changes)
    except UserError as error:
        raise UserError(f"{as_flag(name)}: {error}") from error


def make_tasks(arms: Mapping[str, VAEConfig], seeds: int) -> list[Task]:
    """Seed by seed, so that a comparison that is stopped has whole pairs."""
    first = arms[CONTROL].seed
    return [
        Task(arm, changed(config, seed=seed))
        for seed in range(first, first + seeds)
        for arm, config in {**arms, NO_MODEL: arms[CONTROL]}.items()
    ]


def trial(
    task: Task, whole: Dataset, classifier: Classifier, impute_config: ImputeConfig
) -> list[Row]:
    """Train one arm with one seed, and measure how it imputes the test images."""
    config = task.config
    data = whole.imbalanced(config.imbalance, config.seed).to(config.torch_device)
    set_threads(config, data)
    elbos: dict[str, float] = {}
    if task.arm == NO_MODEL:
        methods = baseline_methods(data.train_images, impute_config, config.seed)
    else:
        training = train(data, config)
        elbos = {row["model"]: row[ELBO] for row in training.latest_rows()}
        methods = vae_methods(training.models, data.train_images, impute_config, config.seed)
    masks = make_masks(data.test_images, impute_config, config.seed)
    rows, _ = measure(methods, data.test_images, data.test_labels, masks, classifier)
    return [
        {"arm": task.arm, "seed": config.seed, ELBO: elbos.get(row["model"], "")} | row
        for row in rows
    ]


def trials(
    tasks: Sequence[Task],
    whole: Dataset,
    classifier: Classifier,
    impute_config: ImputeConfig,
    jobs: int,
) -> Iterator[list[Row]]:
    """The rows of each task, as the tasks are finished."""
    return in_processes(trial, [(task, whole, classifier, impute_config) for task in tasks], jobs)


def train(data: Dataset, config: VAEConfig) -> VAETraining:
    """A training in memory, from its beginning to its end."""
    training = begin(config, data)
    if not fit(training, data, config, lambda: None, Silence()):
        raise KeyboardInterrupt
    return training


# The directory of a comparison: its settings in compare.json, what was measured in compare.csv.


class Ledger:
    """The rows that a directory holds; those of a task come and go as one."""

    def __init__(self, directory: Path, config: VAEConfig, impute_config: ImputeConfig) -> None:
        self.path = directory / "compare.csv"
        settings = {k: v for k, v in to_stored(config).items() if k not in NOT_SETTINGS}
        settings |= dataclasses.asdict(impute_config)
        begun = self.path.exists()  # nothing is lost where nothing was measured
        keep_settings(directory / "compare.json", settings, "comparison", begun)
        self.rows = read_rows(self.path) if begun else []

    def lacks(self, task: Task) -> bool:
        return all((row["arm"], row["seed"]) != (task.arm, task.config.seed) for row in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        self.rows.extend(rows)
        write_atomically(self.path, as_csv(COMPARED_COLUMNS, self.rows))

    def of(self, tasks: Sequence[Task]) -> list[Row]:
        """The rows of these tasks, in their order."""
        rows_of: dict[tuple[str, int], list[Row]] = {}
        for row in self.rows:
            rows_of.setdefault((row["arm"], row["seed"]), []).append(row)
        return [row for task in tasks for row in rows_of[task.arm, task.config.seed]]


def read_rows(path: Path) -> list[Row]:
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if tuple(reader.fieldnames or ()) != COMPARED_COLUMNS:
                raise ValueError(f"expected the columns {', '.join(COMPARED_COLUMNS)}")
            return [as_row(row) for row in reader]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"--output-dir: cannot use {path}: {error}") from error


def as_row(texts: Mapping[str, str]) -> Row:
    numbers = {k: float(v) for k, v in texts.items() if k not in TEXTS and (k != ELBO or v)}
    return {**texts, **numbers, "seed": int(texts["seed"])}


# Series of values, one per seed.


class Key(NamedTuple):
    """Whose values: those of one metric, a value per seed, are a series."""

    arm: str
    model: str
    method: str
    mask: str


Series = dict[Key, dict[int, float]]


def series_of(rows: Sequence[Row], metric: str) -> Series:
    series: Series = {}
    for row in rows:
        key = Key(*(row[name] for name in TEXTS))
        series.setdefault(key, {})[row["seed"]] = row[metric]
    return series


def elbo_series(rows: Sequence[Row]) -> Series:
    """The -ELBO of each model, of which every row of the model tells."""
    models = (row | {"method": "", "mask": ""} for row in rows if row["arm"] != NO_MODEL)
    return series_of(list(models), ELBO)


def against_control(series: Series) -> dict[Key, Paired]:
    """Every arm of a VAE against the control of the same model, method and mask."""
    return {
        key: paired(values, series[key._replace(arm=CONTROL)])
        for key, values in series.items()
        if key.arm not in (CONTROL, NO_MODEL)
    }


def against_one_shot(series: Series) -> dict[Key, Paired]:
    """Pseudo-Gibbs imputation against one-shot imputation by the same models."""
    return {
        key: paired(values, series[key._replace(method=ONE_SHOT)])
        for key, values in series.items()
        if key.method == PSEUDO_GIBBS
    }


# The report.


def as_markdown(rows: Sequence[Row], metrics: Sequence[str] = METRICS) -> str:
    parts = [f"# Priors compared at imputation\n\n{HOW_TO_READ}"]
    parts += sections(elbo_series(rows), ELBO)
    for metric in metrics:
        parts += sections(series_of(rows, metric), metric)
    return "\n\n".join(parts) + "\n"


HOW_TO_READ = f"""\
Means over seeds, in brackets their {CONFIDENCE:.0%} t intervals. Differences are paired by the
seed, and relative to the mean of what they are from; p is of the paired t test, and Holm's
correction is over the rows of its table. A difference below 0 is better in -ELBO, RMSE and MAE, and
worse in SSIM and accuracy. RMSE and MAE are over the missing pixels, SSIM is of whole images, and
accuracy is the share of images whose class one classifier gets right. The -ELBO is that of the same
test images, with weight 1 whatever the beta of the training."""


def sections(series: Series, metric: str) -> Iterator[str]:
    """A metric in tables: the means, the arms against the control, iterating against one shot."""
    label = LABELS[metric]
    yield f"## {label}\n\n" + table(means_table(series, metric))
    if differences := against_control(series):
        yield f"{label}: difference from {CONTROL}\n\n" + differences_table(differences, metric)
    if differences := against_one_shot(series):
        yield f"{label}: {PSEUDO_GIBBS} - {ONE_SHOT}\n\n" + differences_table(differences, metric)


def table(rows: Iterator[list[str]]) -> str:
    return "\n".join(aligned(list(rows)))


def means_table(series: Series, metric: str) -> Iterator[list[str]]:
    masks = list(dict.fromkeys(key.mask for key in series))
    yield ["", *(mask or LABELS[metric] for mask in masks)]
    digits = DIGITS.get(metric, USUAL_DIGITS)
    for key in dict.fromkeys(key._replace(mask="") for key in series):
        intervals = [
            mean_interval(list(series[key._replace(mask=mask)].values())) for mask in masks
        ]
        cells = [
            f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
            for mean, low, high in intervals
        ]
        yield [name_of(key), *cells]


def differences_table(differences: Mapping[Key, Paired], metric: str) -> str:
    named = {name_of(key): difference for key, difference in differences.items()}
    return table(paired_table(named, DIGITS.get(metric, USUAL_DIGITS)))


def name_of(key: Key) -> str:
    arm = key.arm if key.model in ("standard", NO_MODEL) else f"{key.arm}, {key.model}"
    return ": ".join(filter(None, [arm, key.method, key.mask]))
