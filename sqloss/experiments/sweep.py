"""Sweeps: arms, each trained with every seed as a run of its own, measured and compared.

An arm is a change to the configuration. With one seed all arms start alike, as far as their models
are alike, and see the data in the same order: their differences are paired by the seed.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sqloss.common.errors import UserError, require
from sqloss.common.files import write_json
from sqloss.common.flags import (
    as_flag,
    as_text,
    changed,
    configure,
    expect,
    expect_whole,
    flag,
    flat,
    renamed,
    settings_chosen,
    settings_of,
    warn_of_renamed,
)
from sqloss.experiments.directory import keep_settings
from sqloss.experiments.measurement import Measurement
from sqloss.experiments.processes import in_processes
from sqloss.experiments.rare import RareClasses
from sqloss.training.config import RunConfig
from sqloss.training.loop import NonFiniteError
from sqloss.training.progress import Silence
from sqloss.training.run import Run
from sqloss.training.trainer import Preset, Trainer, arm_name, product
from sqloss.training.trainers import TRAINERS

Flags = Mapping[str, Any]  # values of fields of a configuration
Arms = Mapping[str, Flags]

REPORT = "report"
MEASUREMENTS: Mapping[str, type[Measurement]] = {REPORT: Measurement, RareClasses.name: RareClasses}
FAILED = "failed.json"  # in the directory of a run that came to no end
BASELINE = "baseline"  # the only arm where nothing is swept


@dataclass(frozen=True)
class SweepConfig:
    """What is swept, valid by construction but for the values of the grids."""

    grid: Sequence[str] = flag(
        (),
        "sweep over these values of a flag of the trainer, like lr=1e-4,2e-4 or "
        "conditional=true,false; values with commas in them are separated by semicolons; with "
        "several --grid over all combinations",
        metavar="FLAG=VALUE,...",
        action="append",
        type=str,
    )
    preset: str = flag("", "sweep over named arms", metavar="NAME")
    seeds: int = flag(1, "seeds to train every arm with, from --seed on", metavar="N")
    jobs: int = flag(1, "processes that train at the same time", metavar="N")
    best_by: str = flag("", "the metric that the best row is chosen by", metavar="METRIC")
    measure: str = flag(
        REPORT,
        "what is compared: the metrics of the report of each run, or what models make of rare "
        "classes, from their own priors and from fitted ones; runs that are there already are "
        "measured as they are",
        choices=tuple(MEASUREMENTS),
    )

    def __post_init__(self) -> None:
        expect_whole(self, 1, "seeds", "jobs")
        expect(self, "measure", self.measure in MEASUREMENTS, f"one of {', '.join(MEASUREMENTS)}")

    def measurement(self, command: str) -> Measurement:
        return MEASUREMENTS[self.measure](command)


# Arms.


def find_preset(command: str, name: str) -> Preset:
    """That of a name; the one of no name has nothing but one arm that changes nothing."""
    presets = TRAINERS[command].presets
    if name and name not in presets:
        raise UserError(
            f"--preset: expected one of {', '.join(presets)} for sqloss {command}, got {name}"
        )
    return presets[name] if name else Preset({}, {"": {}})


def parse_grids(command: str, texts: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each field that is swept over."""
    grids: dict[str, list[Any]] = {}
    for text in texts:
        name, values = parse_grid(command, text)
        if name in grids:
            raise UserError(f"--grid: expected every flag once, got {as_flag(name)[2:]} twice")
        grids[name] = values
    return grids


def parse_grid(command: str, text: str) -> tuple[str, list[Any]]:
    """The field and the values that --grid names: "lr-g=1e-4,2e-4"."""
    given, equals, values = text.partition("=")
    name = given.removeprefix("--").replace("-", "_")
    former = renamed(TRAINERS[command].config)
    if name in former:
        warn_of_renamed(name, former[name])
        name = former[name]
    types = {name: s.type for name, s in settings_of(TRAINERS[command].config).items()}
    allowed = [name for name in types if name not in TRAINERS[command].not_swept]
    if name not in allowed or not equals:
        flags = ", ".join(as_flag(field)[2:] for field in allowed)
        raise UserError(
            f"--grid: expected FLAG=VALUE,... with one of the flags {flags}, got {text}"
        )
    separator = ";" if ";" in values else ","
    parsed = [parse_value(given, types[name], value) for value in values.split(separator)]
    if len(set(parsed)) < len(parsed):
        raise UserError(f"--grid: expected different values of {given}, got {values}")
    return name, parsed


def parse_value(given: str, kind: Any, text: str) -> Any:
    try:
        return {"true": True, "false": False}[text] if kind is bool else kind(text)
    except (KeyError, ValueError) as error:
        kinds = {bool: "true or false", int: "whole numbers", float: "numbers"}
        raise UserError(f"--grid: expected {kinds[kind]} for {given}, got {text!r}") from error


def make_arms(command: str, sweep_config: SweepConfig, given: Flags) -> Arms:
    """Every arm of the preset with every combination of the grids.

    An arm lacks the flags of what it has not chosen, such as the alpha of another risk.
    """
    preset = find_preset(command, sweep_config.preset)
    grids = parse_grids(command, sweep_config.grid)
    arms: dict[str, Flags] = {}
    for (name, flags), combination in itertools.product(
        preset.arms.items(), product(grids).values()
    ):
        all_flags = {**preset.base, **given, **flags, **combination}
        chosen = settings_chosen(TRAINERS[command].config, all_flags)
        others = {other: value for other, value in combination.items() if other in chosen}
        arms[", ".join(filter(None, [name, arm_name(others)])) or BASELINE] = {**flags, **others}
    for name in grids:
        if any(name in flags for flags in preset.arms.values()):
            expected = f"flags that --preset {sweep_config.preset} does not sweep over"
        elif name not in swept(arms):
            expected = "flags of what some arm has chosen"
        else:
            continue
        raise UserError(f"--grid: expected {expected}, got {as_flag(name)[2:]}")
    return arms


def swept(arms: Arms) -> list[str]:
    """The fields that arms set."""
    return list(dict.fromkeys(itertools.chain.from_iterable(arms.values())))


# Runs.


class Task(NamedTuple):
    """One arm with one seed, and the directory of its run."""

    arm: str
    config: RunConfig
    directory: Path

    @property
    def has_failed(self) -> bool:
        return (self.directory / FAILED).exists()


@dataclass(frozen=True)
class Sweep:
    """What is to be trained and measured, in a directory that is its own."""

    measurement: Measurement
    directory: Path
    fields: Sequence[str]  # that the arms set
    tasks: Sequence[Task]

    def is_done(self, task: Task) -> bool:
        return (task.directory / self.measurement.file).exists() or task.has_failed

    @property
    def csv(self) -> Path:
        """Every number."""
        return self.directory / f"{self.measurement.name}.csv"

    @property
    def markdown(self) -> Path:
        """Means and differences."""
        return self.csv.with_suffix(".md")

    @property
    def missing(self) -> list[Task]:
        return [task for task in self.tasks if not self.is_done(task)]


def plan(command: str, sweep_config: SweepConfig, output_dir: Path | None, given: Flags) -> Sweep:
    """The sweep that flags ask for; ``given`` are those of the trainer."""
    preset, arms = (
        find_preset(command, sweep_config.preset),
        make_arms(command, sweep_config, given),
    )
    for name in swept(arms):
        if name in given:
            raise UserError(
                f"{as_flag(name)}: expected no such flag where the sweep sets it, "
                f"got {as_text(given[name])}"
            )
    return plan_arms(
        sweep_config.measurement(command),
        Preset(preset.base, arms),
        sweep_config.seeds,
        given,
        output_dir,
        name=f"sweep-{sweep_config.preset or command}",
        origin="--grid" if sweep_config.grid else "--preset",
    )


def plan_arms(
    measurement: Measurement,
    preset: Preset,
    seeds: int,
    given: Flags,
    output_dir: Path | None,
    name: str,
    origin: str,
) -> Sweep:
    """A sweep over the arms of a preset; ``name`` begins that of its directory.

    The directory is made, and refused where it holds runs with other settings. ``origin`` is the
    flag that the arms come from.
    """
    require("joblib")
    trainer = measurement.trainer
    kind = trainer.config
    defaults = {"threads": 1, **preset.base}
    configs = configure_arms(kind, defaults, given, {"": {}, **preset.arms}, origin)
    config = configs.pop("")
    whole = flat(config)
    directory = output_dir or Path("runs") / config.title.replace(trainer.name, name, 1)
    shared = trainer.shared_settings(directory, whole)
    configs = {arm: changed(config, **shared) for arm, config in configs.items()}
    for config in configs.values():
        config.check_place(directory)
    tasks = make_tasks(directory, configs, seeds)
    left_out = ("seed", *kind.of_machine)
    common = {k: v for k, v in {**given, **whole}.items() if k not in left_out}
    settings = {"command": trainer.name, **common, **measurement.settings}
    begun = any(directory.glob("*/seed-*"))
    keep_settings(directory / "sweep.json", settings, kind, begun)
    return Sweep(measurement, directory, swept(preset.arms), tasks)


def configure_arms(
    kind: type[RunConfig], defaults: Flags, given: Flags, arms: Arms, origin: str
) -> dict[str, RunConfig]:
    """The configurations of arms; an arm without a name is what they change.

    A flag that is given for what an arm has not chosen, such as the alpha of another risk, is meant
    for other arms, and refused where none has a use for it. What is wrong with an arm alone is told
    of the arm.
    """
    base = {**defaults, **given}
    chosen = {arm: settings_chosen(kind, {**base, **flags}) for arm, flags in arms.items()}
    useless = given.keys() - set().union(*(names for arm, names in chosen.items() if arm))
    configs = {}
    for arm, flags in arms.items():
        own = {k: v for k, v in base.items() if k in chosen[arm] | useless}
        try:
            configs[arm] = configure(kind, **{**own, **flags})
        except UserError as error:
            raise UserError(f"{origin}: {arm}: {error}" if arm else str(error)) from error
    return configs


def make_tasks(directory: Path, configs: Mapping[str, RunConfig], seeds: int) -> list[Task]:
    """Seed by seed, so that a sweep that is stopped has whole pairs."""
    folders = {
        arm: directory / re.sub(r"[^\w.=+,-]", "_", arm.replace(", ", ",")) for arm in configs
    }
    for one, other in itertools.combinations(folders, 2):
        if folders[one] == folders[other]:
            raise UserError(
                f"--grid: expected values that differ as names of files, got {one} and {other}"
            )
    first = next(iter(configs.values())).seed
    return [
        Task(arm, changed(config, seed=seed), folders[arm] / f"seed-{seed}")
        for seed in range(first, first + seeds)
        for arm, config in configs.items()
    ]


def data_of(trainer: Trainer[Any, Any], config: RunConfig) -> Any:
    """The data of a run; read once per process, as far as the runs are of one data set."""
    values = flat(config)
    key = (trainer.name, *(values.get(name) for name in trainer.data_settings()))
    if _loaded.get("key") != key:
        _loaded.update(key=key, data=trainer.load(config))
    return _loaded["data"]


_loaded: dict[str, Any] = {}  # the last that was read, and which that is


def prepare(sweep: Sweep, tell: Callable[[str], object]) -> None:
    """Raise before the first run what a run would raise at its beginning; make what they share.

    What the runs train on is told, once where it is the same for many.
    """
    trainer = sweep.measurement.trainer
    told = set()
    missing = sweep.missing
    for task in {task.arm: task for task in missing}.values():
        config = task.config
        config.check_machine()
        trainer.check(config)
        whole = data_of(trainer, config)
        trainer.check_data(whole, config)
        run_in(task.directory, config)
        data = trainer.training_data(whole, config)
        trainer.begin(config, data)
        words = trainer.describe(whole, data)
        if words not in told:
            told.add(words)
            tell(words)
    if missing:
        config, first = missing[0].config, sweep.tasks[0].config.seed
        whole = data_of(trainer, config)
        sweep.measurement.prepare(sweep.directory, config, whole, first)


def train(sweep: Sweep, jobs: int) -> Iterator[Task]:
    """Do what is missing; the tasks as they are done."""
    return in_processes(train_run, [(sweep.measurement, task) for task in sweep.missing], jobs)


def train_run(measurement: Measurement, task: Task) -> Task:
    """Train one arm with one seed and measure it, or note why that cannot be."""
    run, is_trained = run_in(task.directory, task.config), task.arm not in measurement.untrained
    run.begin(measurement.trainer, data_of(measurement.trainer, task.config))
    try:
        if is_trained and not run.fit(Silence()):
            raise KeyboardInterrupt
        measurement.measure(run, is_trained)
    except NonFiniteError as error:
        reason = str(error.__cause__ or error)  # without what a run of its own would leave behind
        write_json(task.directory / FAILED, {"error": reason})
    return task


def run_in(directory: Path, config: RunConfig) -> Run[Any]:
    """The run of this configuration, taken up again where the directory has it."""
    if not (directory / "config.json").exists():
        return Run.new(directory, config)
    return Run.resumed(type(config), directory, flat(config))
