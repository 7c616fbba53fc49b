"""The command line: one subcommand is one function."""

import argparse
import dataclasses
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import sqloss
from sqloss.training.bounds import bounds_table, measure_bounds, write_bounds
from sqloss.training.config import LARGEST, Config, as_flag, expanded
from sqloss.training.data import Dataset, load_dataset
from sqloss.training.errors import UserError, require
from sqloss.training.evaluation import evaluate
from sqloss.training.loop import Training, begin, build_model, fit
from sqloss.training.plots import draw_pictures
from sqloss.training.progress import Progress
from sqloss.training.report import make_report, tables, write_report
from sqloss.training.run import Run
from sqloss.training.trained import MAY_DIFFER, load_trained

USER_ERROR = 2
SINGLE_THREADED_PIXELS = 16 * 16  # the digits, at 8 x 8, are no slower with one thread
SMALLER = {
    "vae": "; use a smaller --batch-size, --hidden, --channels, --latent, --iwae-samples, "
    "--image-size, --limit or --num-samples"
}
INTERRUPTED = 130  # what a shell returns for it: 128 + SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``sqloss``."""
    flags = vars(parser().parse_args(arguments))
    command, subcommand = flags.pop("command"), flags.pop("subcommand")
    try:
        return int(subcommand(**flags))
    except UserError as error:
        return complain(command, str(error))
    except KeyboardInterrupt:
        print(f"\nsqloss {command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return complain(
            command,
            "expected work that fits into memory, got work that does not"
            f"{SMALLER.get(command, '')} ({first_line(error)})",
        )


def complain(command: str, message: str) -> int:
    print(f"sqloss {command}: error: {message}", file=sys.stderr)
    return USER_ERROR


def is_out_of_memory(error: Exception) -> bool:
    """Torch says so by its own exception on a GPU, and by a plain RuntimeError's text on a CPU."""
    texts = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        text in str(error) for text in texts
    )


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def vae() -> int:
    """The command ``vae``, which is ``sqloss vae``."""
    return main(["vae", *sys.argv[1:]])


def train_vae(output_dir: Path | None = None, resume: Path | None = None, **given: Any) -> int:
    """Train VAEs on the mean and on the tail of the loss, side by side, and report on them."""
    run = Run.resumed(resume, given) if resume else Run.new(output_dir, Config(**given))
    config, device = run.config, run.config.torch_device
    require_what_the_report_needs()

    whole = load_dataset(config.dataset, config.source)
    data = whole.imbalanced(config.imbalance, config.seed).to(device)
    set_threads(config, data)
    training = begin(build_model(config, data.shape).to(device), config)
    recorder = run.start(training, data)
    announce(recorder.directory, data, device)

    with recorder, Progress(*steps(training, data, config), config.epochs) as progress:
        finished = fit(training, data, config, recorder.save, progress)
    resuming = f"sqloss vae --resume {shlex.quote(str(recorder.directory))}"
    if not finished:
        say(f"stopped and saved after {training.done()}; continue with: {resuming}")
        return INTERRUPTED

    say("the training is done and saved; now a small classifier learns the classes, to report")
    try:
        report_on(training, whole, data, config, recorder.directory)
    except KeyboardInterrupt:
        say(f"\nstopped before the report; the training is saved, make the report with: {resuming}")
        return INTERRUPTED
    return 0


def report_on(
    training: Training, whole: Dataset, data: Dataset, config: Config, directory: Path
) -> None:
    """Measure, draw and tell what the training has come to."""
    models = training.models
    losses = {
        name: evaluate(model, data, config.seed, config.iwae_samples)
        for name, model in models.items()
    }
    report = make_report(models, losses, whole, data, config)
    write_report(directory, report)
    draw_pictures(directory, models, losses, training.history, data, config)
    print(tables(report))
    say(f"the classifier gets {report['classifier_test_accuracy']:.1%} of the test images right")
    say(f"how to read this, and the pictures: {directory / 'report.md'}")


def evaluate_run(run_dir: Path, iwae_samples: int, images: int, **changes: Any) -> int:
    """Measure the models of a run by their -ELBO and importance-weighted bound on test images."""
    expect_number("--iwae-samples", iwae_samples, 1)
    expect_number("--images", images, 0)
    require("scipy.stats")
    require("tqdm")
    trained = load_trained(run_dir, changes)
    set_threads(trained.config, trained.data)
    bounds = measure_bounds(trained, iwae_samples, images)
    write_bounds(run_dir, bounds)
    print(bounds_table(bounds))
    return 0


def expect_number(name: str, value: int, least: int) -> None:
    if not least <= value <= LARGEST:
        raise UserError(f"{name}: expected a whole number from {least} to {LARGEST}, got {value}")


def show_config() -> int:
    """Show how sqloss was built and what it runs on."""
    sqloss.show_config()
    return 0


def require_what_the_report_needs() -> None:
    """Fail before the training where the report would fail after it."""
    require("matplotlib.figure")
    require("scipy.stats")


def set_threads(config: Config, data: Dataset) -> None:
    """Threads share the work of large images; on small ones they only wait for one another.

    Where other processes want the same cores that waiting has cost five times the whole training.
    """
    threads = config.cpu_threads
    if not threads and math.prod(data.shape) <= SINGLE_THREADED_PIXELS:
        threads = 1
    if threads:
        torch.set_num_threads(threads)
        if config.backend == "numpy":
            require("threadpoolctl").threadpool_limits(threads, "blas")


def announce(directory: Path, data: Dataset, device: torch.device) -> None:
    say(f"run: {directory} on {device}")
    say(
        f"data: {data.name}, {len(data.train_images)} training images of "
        f"{' x '.join(map(str, data.shape))}, per class {data.class_counts()}, "
        f"{len(data.test_images)} test images"
    )


def steps(training: Training, data: Dataset, config: Config) -> tuple[int, int]:
    """The steps of the whole training, and those of them done already."""
    per_epoch = math.ceil(len(data.train_images) / config.batch_size)
    return per_epoch * config.epochs, per_epoch * training.epoch + training.step


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        "sqloss", description="Train on the worst tail of the loss instead of its mean."
    )
    whole.add_argument("--version", action="version", version=f"sqloss {sqloss.__version__}")
    subcommands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (subcommand, add_flags) in {
        "vae": (train_vae, add_vae_flags),
        "evaluate": (evaluate_run, add_evaluate_flags),
        "config": (show_config, None),
    }.items():
        description = subcommand.__doc__
        part = subcommands.add_parser(name, help=description, description=description)
        part.set_defaults(subcommand=subcommand)
        if add_flags:
            add_flags(part)
    return whole


def add_vae_flags(vae: argparse.ArgumentParser) -> None:
    """A flag per field of ``Config``; those not given stay absent, so that --resume can tell."""
    for field in dataclasses.fields(Config):
        add_config_flag(vae, field, str(field.default))
    place = vae.add_mutually_exclusive_group()
    place.add_argument(
        "--output-dir",
        type=expanded,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="where the run goes (default: runs/vae-DATASET-TIME)",
    )
    place.add_argument(
        "--resume",
        type=expanded,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="continue the run in DIR with its own settings; --epochs raises its total",
    )


def add_evaluate_flags(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("run_dir", type=expanded, metavar="RUN_DIR", help="a run of sqloss vae")
    evaluate.add_argument(
        "--iwae-samples",
        type=int,
        default=100,
        metavar="K",
        help="draws per image: the more, the closer is the bound to -log p(x) (default: 100)",
    )
    evaluate.add_argument(
        "--images",
        type=int,
        default=0,
        metavar="N",
        help="random test images, the same for every run; 0: all of them (default: 0)",
    )
    add_flags_that_may_differ(evaluate)


def add_flags_that_may_differ(part: argparse.ArgumentParser) -> None:
    """Those of the flags of a run that a command on a run of before has too."""
    for field in dataclasses.fields(Config):
        if field.name in MAY_DIFFER:
            add_config_flag(part, field, "as in the run")


def add_config_flag(
    part: argparse.ArgumentParser, field: "dataclasses.Field[Any]", default: str
) -> None:
    """The flag of a field of ``Config``, absent where it is not given."""
    kind: dict[str, Any] = {"action": "store_true"} if field.type is bool else {"type": field.type}
    options = dict(field.metadata) | {"help": f"{field.metadata['help']} (default: {default})"}
    part.add_argument(as_flag(field.name), default=argparse.SUPPRESS, **kind, **options)
