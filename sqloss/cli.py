"""The command line: one subcommand is one function."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch

import sqloss
from sqloss.training import ranks
from sqloss.training.config import RunConfig, as_flag, expanded
from sqloss.training.data import Dataset, load_dataset, refuse_output_among_data
from sqloss.training.errors import UserError, require
from sqloss.training.files import as_csv, write_atomically
from sqloss.training.gan.config import GANConfig
from sqloss.training.progress import Progress, Silence
from sqloss.training.run import Run
from sqloss.training.settings import alone_in
from sqloss.training.shares import classifier_of
from sqloss.training.streams import flush_stdout, show, tell
from sqloss.training.sweep import PRESETS, SweepConfig
from sqloss.training.sweep import plan as plan_sweep
from sqloss.training.sweep import prepare as prepare_sweep
from sqloss.training.sweep import train as train_sweep
from sqloss.training.sweep_report import (
    MAIN,
    metric_to_choose_by,
    outcome,
    refuse_other_tails,
    summary,
    write_csv,
)
from sqloss.training.sweep_report import write_report as write_sweep_report
from sqloss.training.threads import set_threads
from sqloss.training.trainers import (
    TRAINERS,
    RunUnderWay,
    Trainer,
    require_what_the_report_needs,
)
from sqloss.training.vae.bounds import BoundsConfig, bounds_table, measure_bounds, write_bounds
from sqloss.training.vae.comparison import (
    CLASSIFIER_SEED,
    CompareConfig,
    Ledger,
    Task,
    as_markdown,
    make_arms,
    make_tasks,
    trials,
)
from sqloss.training.vae.config import VAEConfig
from sqloss.training.vae.imputation import COLUMNS as IMPUTE_COLUMNS
from sqloss.training.vae.imputation import (
    ImputeConfig,
    as_table,
    baseline_methods,
    first_test_images,
    make_masks,
    measure,
    vae_methods,
)
from sqloss.training.vae.imputation_plots import draw_imputations
from sqloss.training.vae.trained import MAY_DIFFER, Trained, load_trained

Settings = TypeVar("Settings", BoundsConfig, ImputeConfig, CompareConfig, SweepConfig)

# How priors are compared where nothing else is asked for.
PLAIN: dict[str, Any] = {"alpha": 0.0, "imbalance": "none"}
# What its arms set themselves, and what it has no use for: no report, no checkpoints.
NOT_COMPARED = ("prior", "df", "learn_df", "num_samples", "checkpoint_every")
USER_ERROR = 2
SMALLER = {
    "vae": "; use --microbatch-size, or a smaller --batch-size, --hidden, --channels, --latent, "
    "--iwae-samples, --image-size, --limit or --num-samples",
    "gan": "; use a smaller --batch-size, --width, --latent, --image-size, --limit or "
    "--num-samples",
    "impute": "; use a smaller --test-images, --draws or --neighbour-images",
}
INTERRUPTED = 130  # what a shell returns for it: 128 + SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``sqloss``."""
    try:
        with ranks.joined():
            return run_command(arguments)
    finally:
        flush_stdout()


def run_command(arguments: Sequence[str] | None) -> int:
    with ranks.only_first_prints():
        flags = vars(parser().parse_args(arguments))
    command, subcommand = flags.pop("command"), flags.pop("subcommand")
    try:
        refuse_ranks(command)
        return int(subcommand(**flags))
    except UserError as error:
        return complain(command, str(error))
    except KeyboardInterrupt:
        say(f"\nsqloss {command}: interrupted")
        return INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            if ranks.another_has_failed():
                return USER_ERROR
            raise
        return complain(
            command,
            "expected work that fits into memory, got work that does not"
            f"{SMALLER.get(command, '')} ({first_line(error)})",
        )


def complain(command: str, message: str) -> int:
    ranks.tell_error(f"sqloss {command}: error: {message}")
    return USER_ERROR


def refuse_ranks(command: str) -> None:
    if command not in TRAINERS and ranks.count() > 1:
        raise UserError(f"expected one process, got {ranks.count()} of torchrun")


def is_out_of_memory(error: Exception) -> bool:
    """Torch says so by its own exception on a GPU, and by a plain RuntimeError's text on a CPU."""
    texts = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        text in str(error) for text in texts
    )


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def gan() -> int:
    """The command ``gan``, which is ``sqloss gan``."""
    return main(["gan", *sys.argv[1:]])


def vae() -> int:
    """The command ``vae``, which is ``sqloss vae``."""
    return main(["vae", *sys.argv[1:]])


def train_vae(output_dir: Path | None = None, resume: Path | None = None, **given: Any) -> int:
    """Train VAEs on the mean and on the tail of the loss, side by side, and report on them."""
    return train(TRAINERS["vae"], output_dir, resume, given)


def train_gan(output_dir: Path | None = None, resume: Path | None = None, **given: Any) -> int:
    """Train GANs on the mean and on the tail of their losses, side by side, and report on them."""
    return train(TRAINERS["gan"], output_dir, resume, given)


def train(
    trainer: Trainer[Any, Any],
    output_dir: Path | None,
    resume: Path | None,
    given: dict[str, Any],
) -> int:
    """Start a run, or take it up again, and report on it once it is trained."""
    kind = trainer.config
    run = Run.resumed(kind, resume, given) if resume else Run.new(output_dir, kind(**given))
    config = run.config
    config.refuse_other_machine()
    ranks.refuse(config)
    ranks.of_first(lambda: require_what_the_report_needs(config))
    work = RunUnderWay(trainer, run, load(config))
    announce(work)

    resuming = f"sqloss {config.command} --resume {shlex.quote(str(work.directory))}"
    progress = Progress(*work.steps(), config.epochs) if ranks.is_first() else Silence()
    if not work.fit(progress):
        done = work.training.done()
        say(f"stopped and saved after {done}; continue with: {resuming}")
        return INTERRUPTED

    if not ranks.disband():
        return 0
    say("the training is done and saved; now a small classifier judges, for the report")
    try:
        report = work.report()
    except KeyboardInterrupt:
        say(f"\nstopped before the report; the training is saved, make the report with: {resuming}")
        return INTERRUPTED
    show(trainer.tables(report))
    say(f"the classifier gets {report['classifier_test_accuracy']:.1%} of the test images right")
    say(f"how to read this, and the pictures: {work.directory / 'report.md'}")
    return 0


def load(config: RunConfig) -> Dataset:
    """The data of a run; where they are to be fetched, by one rank, which the others wait for."""

    def of_config() -> Dataset:
        return load_dataset(config.dataset, config.source)

    return ranks.in_turns(of_config) if config.download else of_config()


def sweep(trainer: str, output_dir: Path | None = None, **given: Any) -> int:
    """Train with several settings and seeds, a run for each, and compare what they come to."""
    sweep_config, given = taken(SweepConfig, given)
    metric = metric_to_choose_by(trainer, sweep_config.best_by)
    whole = plan_sweep(trainer, sweep_config, output_dir, given)
    refuse_other_tails(whole, metric)
    with alone_in(whole.directory, "sweep"):
        missing = whole.missing
        say(f"sweep: {whole.directory}, {len(missing)} of {len(whole.tasks)} runs to do")
        try:
            prepare_sweep(whole, say)
            for number, task in enumerate(train_sweep(whole, sweep_config.jobs), 1):
                write_csv(whole)
                say(f"{number}/{len(missing)}: {outcome(whole, task, metric)}")
        except KeyboardInterrupt:
            say("\nstopped; what is done is kept: the same command does the rest")
            return INTERRUPTED
        write_sweep_report(whole, metric)
    show(summary(whole, metric))
    say(f"with every metric: {whole.directory / 'sweep.md'}; every number: sweep.csv beside it")
    return 0


def impute(run_dir: Path | None = None, compare: bool = False, **given: Any) -> int:
    """Fill in missing pixels with the VAEs of a run, or compare priors at it (--compare)."""
    if (run_dir is None) != compare:
        got = "neither" if run_dir is None else "both"
        raise UserError(f"RUN_DIR: expected the directory of a run, or --compare, got {got}")
    for needed in ("matplotlib.figure", "scipy.stats", "sklearn", "torchmetrics"):
        require(needed)
    impute_config, given = taken(ImputeConfig, given)
    if run_dir is None:
        return compare_priors(impute_config, **given)
    refuse_all_but(MAY_DIFFER, given, "with RUN_DIR, whose models are trained already")
    return impute_with(load_trained(run_dir, given), impute_config, run_dir)


def impute_with(trained: Trained, impute_config: ImputeConfig, directory: Path) -> int:
    """Measure and draw how the VAEs of a run, and the baselines, impute its test images."""
    config, models = trained.config, trained.models
    data = first_test_images(trained.data, impute_config.test_images)
    set_threads(config, data)
    say(f"imputing {len(data.test_images)} test images with the models of {trained.done}")
    classifier = classifier_of(trained.whole, config.torch_device, config.seed)
    masks = make_masks(data.test_images, impute_config, config.seed)
    methods = vae_methods(models, data.train_images, impute_config, config.seed)
    methods |= baseline_methods(data.train_images, impute_config, config.seed)
    rows, imputed = measure(methods, data.test_images, data.test_labels, masks, classifier)
    write_atomically(directory / "impute.csv", as_csv(IMPUTE_COLUMNS, rows))
    draw_imputations(directory, models, imputed, masks, data, config.seed)
    show(as_table(rows))
    say(
        "RMSE and MAE are over the missing pixels, SSIM is of whole images; accuracy is the share "
        "of images whose class a small classifier gets right"
    )
    say(
        f"the classifier gets {rows[0]['accuracy_of_originals']:.1%} of the originals right; "
        f"the rows are in {directory / 'impute.csv'}, the pictures beside it"
    )
    return 0


def compare_priors(
    impute_config: ImputeConfig, output_dir: Path | None = None, **given: Any
) -> int:
    """Train every arm with every seed, unless it is there already, and compare what they impute."""
    compare_config, given = taken(CompareConfig, given)
    config = VAEConfig(**PLAIN | given)
    if compare_config.jobs > 1 and not config.cpu_threads:
        config = dataclasses.replace(config, threads=1)
    tasks = make_tasks(make_arms(config, compare_config), compare_config.seeds)
    directory = output_dir or Path("runs") / f"impute-{config.dataset}"
    refuse_output_among_data(config.dataset, config.source, directory)
    with alone_in(directory, "comparison"):
        return compare_in(directory, tasks, config, impute_config, compare_config.jobs)


def compare_in(
    directory: Path,
    tasks: Sequence[Task],
    config: VAEConfig,
    impute_config: ImputeConfig,
    jobs: int,
) -> int:
    ledger = Ledger(directory, config, impute_config)
    missing = [task for task in tasks if ledger.lacks(task)]
    say(f"comparison: {directory}, {len(missing)} of {len(tasks)} trainings to do")
    if missing:
        whole = load_dataset(config.dataset, config.source)
        whole = first_test_images(whole, impute_config.test_images)
        say(whole.imbalanced(config.imbalance, config.seed).in_words(whole))
        set_threads(config, whole)
        classifier = classifier_of(whole, config.torch_device, CLASSIFIER_SEED)
        try:
            for rows in trials(missing, whole, classifier, impute_config, jobs):
                ledger.add(rows)
                say(f"done: {rows[0]['arm']}, seed {rows[0]['seed']}")
        except KeyboardInterrupt:
            say("\nstopped; what is done is kept: the same command does the rest")
            return INTERRUPTED
    rows = ledger.of(tasks)
    write_atomically(directory / "compare.md", as_markdown(rows).encode())
    show(as_markdown(rows, metrics=["rmse"]).rstrip())
    say(f"the same for the other metrics: {directory / 'compare.md'}; every number: {ledger.path}")
    return 0


def taken(kind: type[Settings], given: dict[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """The settings of one kind among those given, and the rest of these."""
    names = {field.name for field in dataclasses.fields(kind)}
    own = {name: value for name, value in given.items() if name in names}
    return kind(**own), {name: value for name, value in given.items() if name not in names}


def refuse_all_but(allowed: Sequence[str], given: Mapping[str, Any], where: str) -> None:
    for name in given:
        if name not in allowed:
            flags = ", ".join(map(as_flag, allowed))
            raise UserError(f"{as_flag(name)}: expected no such flag {where}, but {flags}")


def evaluate_run(run_dir: Path, **given: Any) -> int:
    """Measure the VAEs of a run by their -ELBO and importance-weighted bound on test images."""
    require("scipy.stats")
    bounds_config, given = taken(BoundsConfig, given)
    trained = load_trained(run_dir, given)
    set_threads(trained.config, trained.data)
    bounds = measure_bounds(trained, bounds_config)
    write_bounds(run_dir, bounds)
    show(bounds_table(bounds))
    say(
        "both bounds are of the same draws for each image; error and interval cover the choice of "
        "test images, not the seed of the training"
    )
    say(f"with more digits: {run_dir / 'evaluation.json'}")
    return 0


def show_config() -> int:
    """Show how sqloss was built and what it runs on."""
    sqloss.show_config()
    return 0


def announce(work: RunUnderWay) -> None:
    data = work.data
    say(f"run: {work.directory} on {data.train_images.device}")
    say(data.in_words(work.whole))


def say(line: str) -> None:
    """Tell on stderr how the work goes: once, whatever the number of ranks."""
    if ranks.is_first():
        tell(line)


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        "sqloss", description="Train on the worst tail of the loss instead of its mean."
    )
    whole.add_argument("--version", action="version", version=f"sqloss {sqloss.__version__}")
    subcommands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (subcommand, add_flags) in {
        "vae": (train_vae, add_vae_flags),
        "gan": (train_gan, add_gan_flags),
        "sweep": (sweep, add_sweep_flags),
        "evaluate": (evaluate_run, add_evaluate_flags),
        "impute": (impute, add_impute_flags),
        "config": (show_config, None),
    }.items():
        description = subcommand.__doc__
        part = subcommands.add_parser(name, help=description, description=description)
        part.set_defaults(subcommand=subcommand)
        if add_flags:
            add_flags(part)
    return whole


def add_vae_flags(vae: argparse.ArgumentParser) -> None:
    add_run_flags(vae, VAEConfig)


def add_gan_flags(gan: argparse.ArgumentParser) -> None:
    add_run_flags(gan, GANConfig)


def add_run_flags(part: argparse.ArgumentParser, kind: type[RunConfig]) -> None:
    """A flag per field of ``kind``; those not given stay absent, so that --resume can tell."""
    add_config_flags(part, kind)
    place = part.add_mutually_exclusive_group()
    place.add_argument(
        "--output-dir",
        type=expanded,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help=f"where the run goes (default: runs/{kind.command}-DATASET-TIME)",
    )
    place.add_argument(
        "--resume",
        type=expanded,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="continue the run in DIR with its own settings; --epochs raises its total",
    )


def add_sweep_flags(sweep: argparse.ArgumentParser) -> None:
    trainers = sweep.add_subparsers(dest="trainer", required=True, metavar="TRAINER")
    for name, trainer in TRAINERS.items():
        description = f"sweep over settings and seeds of sqloss {name}"
        part = trainers.add_parser(name, help=description, description=description)
        defaults = {
            "grid": "none",
            "preset": f"none; there are {', '.join(PRESETS[name])}",
            "best_by": MAIN[name][0],
        }
        add_config_flags(part, SweepConfig, defaults)
        part.add_argument(
            "--output-dir",
            type=expanded,
            default=argparse.SUPPRESS,
            metavar="DIR",
            help="where the runs, sweep.csv and sweep.md go; runs that are there already are not "
            f"done again (default: runs/sweep-{name}-DATASET, or with the preset's name)",
        )
        own = {"threads": 1, "classifier": "classifier.pt in the directory of the sweep"}
        training = part.add_argument_group(f"how sqloss {name} trains")
        add_config_flags(training, trainer.config, own)


def add_evaluate_flags(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument(
        "run_dir",
        type=expanded,
        metavar="RUN_DIR",
        help="a run of sqloss vae; evaluation.json goes there",
    )
    add_config_flags(evaluate, BoundsConfig)
    add_flags_that_may_differ(evaluate)


def add_impute_flags(impute: argparse.ArgumentParser) -> None:
    impute.add_argument(
        "run_dir",
        nargs="?",
        type=expanded,
        metavar="RUN_DIR",
        help="a run of sqloss vae; impute.csv and imputation_*.png go there",
    )
    add_config_flags(impute, ImputeConfig)
    comparison = impute.add_argument_group("comparing priors")
    comparison.add_argument(
        "--compare",
        action="store_true",
        default=argparse.SUPPRESS,
        help="train normal and t priors, and controls, with several seeds each, and compare them",
    )
    add_config_flags(comparison, CompareConfig)
    comparison.add_argument(
        "--output-dir",
        type=expanded,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="where compare.csv and compare.md go; trainings that are there already are not done "
        "again (default: runs/impute-DATASET)",
    )
    training = impute.add_argument_group(
        "how --compare trains; with RUN_DIR only " + ", ".join(map(as_flag, MAY_DIFFER))
    )
    add_config_flags(training, VAEConfig, PLAIN, without=NOT_COMPARED)


def add_flags_that_may_differ(part: argparse.ArgumentParser) -> None:
    """Those of the flags of a run that a command on a run of before has too."""
    for field in dataclasses.fields(VAEConfig):
        if field.name in MAY_DIFFER:
            add_config_flag(part, field, "as in the run")


def add_config_flags(
    part: argparse._ActionsContainer,
    kind: type,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    without: Sequence[str] = (),
) -> None:
    """A flag per field of a configuration."""
    for field in dataclasses.fields(kind):
        if field.name not in without:
            add_config_flag(part, field, str(defaults.get(field.name, field.default)) or "none")


def add_config_flag(
    part: argparse._ActionsContainer, field: "dataclasses.Field[Any]", default: str
) -> None:
    """The flag of a field of a configuration, absent where it is not given."""
    kind: dict[str, Any] = {"action": "store_true"} if field.type is bool else {"type": field.type}
    options = kind | dict(field.metadata)
    options["help"] = f"{field.metadata['help']} (default: {default})"
    part.add_argument(as_flag(field.name), default=argparse.SUPPRESS, **options)
