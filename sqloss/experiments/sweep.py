"""Sweeps: arms, each trained with every seed as a run of its own, and compared by their reports.

An arm is a change to the configuration. With one seed all arms start alike, as far as their models
are alike, and see the data in the same order: their differences are paired by the seed.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sqloss.experiments.directory import keep_settings
from sqloss.experiments.processes import in_processes
from sqloss.training.config import RunConfig
from sqloss.training.errors import UserError, require
from sqloss.training.files import write_json
from sqloss.training.flags import (
    LARGEST,
    as_flag,
    as_text,
    changed,
    configure,
    expect,
    flag,
    flat,
    renamed,
    settings_of,
    warn_of_renamed,
)
from sqloss.training.loop import NonFiniteError
from sqloss.training.progress import Silence
from sqloss.training.run import Run
from sqloss.training.trainer import Preset, product
from sqloss.training.trainers import TRAINERS

Flags = Mapping[str, Any]  # values of fields of a configuration
Arms = Mapping[str, Flags]
Row = dict[str, Any]

BASELINE = "baseline"  # the only arm where nothing is swept
FAILED = "failed.json"  # in the directory of a run that came to no report


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

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs"):
            in_range = 1 <= getattr(self, name) <= LARGEST
            expect(self, name, in_range, f"a whole number from 1 to {LARGEST}")


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


def make_arms(command: str, sweep_config: SweepConfig) -> Arms:
    """Every arm of the preset with every combination of the grids."""
    preset = find_preset(command, sweep_config.preset)
    grids = parse_grids(command, sweep_config.grid)
    twice = [name for name in grids if any(name in flags for flags in preset.arms.values())]
    if twice:
        raise UserError(
            f"--grid: expected flags that --preset {sweep_config.preset} does not sweep over, "
            f"got {as_flag(twice[0])[2:]}"
        )
    return {
        ", ".join(filter(None, [name, other])) or BASELINE: {**flags, **others}
        for name, flags in preset.arms.items()
        for other, others in product(grids).items()
    }


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
    def is_done(self) -> bool:
        return (self.directory / "report.json").exists() or self.has_failed

    @property
    def has_failed(self) -> bool:
        return (self.directory / FAILED).exists()


@dataclass(frozen=True)
class Sweep:
    """What is to be trained, in a directory that is its own."""

    command: str
    directory: Path
    fields: Sequence[str]  # that the arms set
    tasks: Sequence[Task]

    @property
    def missing(self) -> list[Task]:
        return [task for task in self.tasks if not task.is_done]


def plan(command: str, sweep_config: SweepConfig, output_dir: Path | None, given: Flags) -> Sweep:
    """The sweep that flags ask for; ``given`` are those of the trainer.

    Its directory is made, and refused where it holds runs with other settings.
    """
    require("joblib")
    trainer = TRAINERS[command]
    kind = trainer.config
    preset, arms = find_preset(command, sweep_config.preset), make_arms(command, sweep_config)
    fields = swept(arms)
    for name in fields:
        if name in given:
            raise UserError(
                f"{as_flag(name)}: expected no such flag where the sweep sets it, "
                f"got {as_text(given[name])}"
            )
    base: dict[str, Any] = {"threads": 1, **preset.base, **given}
    config = configure(kind, **base)
    whole = flat(config)
    name = config.title.replace(command, sweep_config.preset or command, 1)
    directory = output_dir or Path("runs") / f"sweep-{name}"
    common = base | dict(trainer.shared_settings(directory, whole))
    origin = "--grid" if sweep_config.grid else "--preset"
    configs = {
        arm: configure_arm(kind, common, flags, f"{origin}: {arm}") for arm, flags in arms.items()
    }
    for config in configs.values():
        config.check_place(directory)
    tasks = make_tasks(directory, configs, sweep_config.seeds)
    left_out = ("seed", *kind.of_machine)
    settings = {"command": command} | {k: v for k, v in whole.items() if k not in left_out}
    begun = any(directory.glob("*/seed-*"))
    keep_settings(directory / "sweep.json", settings, "sweep", begun)
    return Sweep(command, directory, fields, tasks)


def configure_arm(kind: type[RunConfig], base: Flags, flags: Flags, name: str) -> RunConfig:
    """The configuration of an arm; its name is told where what is wrong comes from the arm."""
    try:
        return configure(kind, **{**base, **flags})
    except UserError as error:
        if complaint(kind, base) == str(error):
            raise
        raise UserError(f"{name}: {error}") from error


def complaint(kind: type[RunConfig], values: Flags) -> str:
    """What is wrong with values, if anything is."""
    try:
        configure(kind, **values)
    except UserError as error:
        return str(error)
    return ""


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


def data_of(command: str, config: RunConfig) -> Any:
    """The data of a run; read once per process, as far as the runs are of one data set."""
    names = TRAINERS[command].data_settings()
    key = (command, *(value for name, value in flat(config).items() if name in names))
    if _loaded.get("key") != key:
        _loaded.update(key=key, data=TRAINERS[command].load(config))
    return _loaded["data"]


_loaded: dict[str, Any] = {}  # the last that was read, and which that is


def prepare(sweep: Sweep, tell: Callable[[str], object]) -> None:
    """Raise before the first run what a run would raise at its beginning; make what they share.

    What the runs train on is told, once where it is the same for many.
    """
    trainer = TRAINERS[sweep.command]
    told = set()
    missing = sweep.missing
    for task in {task.arm: task for task in missing}.values():
        config = task.config
        config.check_machine()
        trainer.check(config)
        whole = data_of(sweep.command, config)
        trainer.check_data(whole, config)
        run_in(task.directory, config)
        data = trainer.training_data(whole, config)
        trainer.begin(config, data)
        words = trainer.describe(whole, data)
        if words not in told:
            told.add(words)
            tell(words)
    if missing:
        config = missing[0].config
        trainer.prepare(config, data_of(sweep.command, config), sweep.tasks[0].config.seed)


def train(sweep: Sweep, jobs: int) -> Iterator[Task]:
    """Do what is missing; the tasks as they are done."""
    return in_processes(train_run, [(sweep.command, task) for task in sweep.missing], jobs)


def train_run(command: str, task: Task) -> Task:
    """Train one arm with one seed and report on it, or note why that cannot be."""
    config = task.config
    run = run_in(task.directory, config)
    run.begin(TRAINERS[command], data_of(command, config))
    try:
        if not run.fit(Silence()):
            raise KeyboardInterrupt
        run.report()
    except NonFiniteError as error:
        reason = str(error.__cause__ or error)  # without what a run of its own would leave behind
        write_json(task.directory / FAILED, {"error": reason})
    return task


def run_in(directory: Path, config: RunConfig) -> Run[Any]:
    """The run of this configuration, taken up again where the directory has it."""
    if not (directory / "config.json").exists():
        return Run.new(directory, config)
    return Run.resumed(type(config), directory, flat(config))
