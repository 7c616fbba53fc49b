"""The command line: parses and dispatches; what a command does is in its module."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

import sqloss
from sqloss.common import ranks
from sqloss.common.errors import UserError
from sqloss.common.files import expanded
from sqloss.common.flags import Setting, as_flag, settings_of, warn_of_renamed
from sqloss.common.ranks import say
from sqloss.common.streams import flush_stdout
from sqloss.experiments.commands import evaluate, impute, sweep
from sqloss.experiments.comparison import NOT_COMPARED, PLAIN, CompareConfig
from sqloss.experiments.imputation import ImputeConfig
from sqloss.experiments.measurement import Measurement
from sqloss.experiments.sweep import SweepConfig
from sqloss.experiments.sweep_report import metric_to_choose_by
from sqloss.generation.command import SampleConfig, sample
from sqloss.training.command import INTERRUPTED, train
from sqloss.training.config import RunConfig
from sqloss.training.trainers import TRAINERS
from sqloss.training.vae.bounds import BoundsConfig
from sqloss.training.vae.config import VAEConfig
from sqloss.training.vae.priors import PriorConfig

USER_ERROR = 2
SMALLER_IMPUTATION = "a smaller --test-images, --draws or --neighbour-images"


def directory(name: str) -> Path:
    """A directory as a user writes it; an empty name would be the working directory."""
    if not name:
        raise argparse.ArgumentTypeError("expected a directory, got an empty name")
    return expanded(name)


DIRECTORY: dict[str, Any] = {"type": directory, "metavar": "DIR"}  # to argparse


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
    smaller = flags.pop("smaller")
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
            f"{smaller and f'; use {smaller}'} ({first_line(error)})",
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


def config() -> int:
    """Show how sqloss was built and what it runs on."""
    sqloss.show_config()
    return 0


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        "sqloss", description="Train on the worst tail of the loss instead of its mean."
    )
    whole.add_argument("--version", action="version", version=f"sqloss {sqloss.__version__}")
    subcommands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, trainer in TRAINERS.items():
        part = add_command(subcommands, name, trainer.about)
        part.set_defaults(subcommand=partial(train, trainer), smaller=trainer.smaller)
        add_run_flags(part, trainer.config)
    for subcommand, add_flags in (
        (sweep, add_sweep_flags),
        (evaluate, add_evaluate_flags),
        (sample, add_sample_flags),
        (impute, add_impute_flags),
        (config, None),
    ):
        part = add_command(subcommands, subcommand.__name__, subcommand.__doc__ or "")
        part.set_defaults(subcommand=subcommand, smaller="")
        if add_flags:
            add_flags(part)
    return whole


def add_command(
    subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, about: str
) -> argparse.ArgumentParser:
    """The parser of a command; the flags that are not given are absent from what it returns."""
    absent = argparse.SUPPRESS
    return subcommands.add_parser(
        name, help=about, description=about, allow_abbrev=False, argument_default=absent
    )


def add_run_flags(part: argparse.ArgumentParser, kind: type[RunConfig]) -> None:
    """A flag per field of ``kind``; those not given stay absent, so that --resume can tell."""
    add_config_flags(part, kind)
    place = part.add_mutually_exclusive_group()
    place.add_argument(
        "--output-dir",
        **DIRECTORY,
        help=f"where the run goes (default: runs/{kind.command}-DATASET-TIME)",
    )
    place.add_argument(
        "--resume",
        **DIRECTORY,
        help="continue the run in DIR with its own settings; --epochs raises its total",
    )


def add_sweep_flags(sweep: argparse.ArgumentParser) -> None:
    trainers = sweep.add_subparsers(dest="trainer", required=True, metavar="TRAINER")
    for name, trainer in TRAINERS.items():
        part = add_command(trainers, name, f"sweep over settings and seeds of sqloss {name}")
        defaults = {
            "grid": "none",
            "preset": f"none; there are {', '.join(trainer.presets) or 'none'}",
            "best_by": metric_to_choose_by(Measurement(name), ""),
        }
        add_config_flags(part, SweepConfig, defaults)
        part.add_argument(
            "--output-dir",
            **DIRECTORY,
            help="where the runs, sweep.csv and sweep.md go; runs that are there already are not "
            f"done again (default: runs/sweep-{name}-DATASET, or with the preset's name)",
        )
        own = {"threads": 1, "classifier": "classifier.pt in the directory of the sweep"}
        training = part.add_argument_group(f"how sqloss {name} trains")
        add_config_flags(training, trainer.config, own)


def add_evaluate_flags(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument(
        "run_dir",
        type=directory,
        metavar="RUN_DIR",
        help="a run of sqloss vae; evaluation.json goes there",
    )
    add_config_flags(evaluate, BoundsConfig)
    add_config_flags(evaluate, PriorConfig)
    add_flags_of_machine(evaluate)


def add_sample_flags(sample: argparse.ArgumentParser) -> None:
    sample.set_defaults(smaller="a smaller --count")
    sample.add_argument(
        "run_dir",
        type=directory,
        metavar="RUN_DIR",
        help="a run of sqloss vae or gan; fitted priors and the judging classifier stay there",
    )
    add_config_flags(sample, SampleConfig, {"model": "that of the run's --risk"})
    add_config_flags(sample, PriorConfig)
    for name, what in (
        (
            "--output-dir",
            "the pictures, samples.npz and samples.json (default: RUN_DIR/samples-TIME)",
        ),
        ("--folder", "each image as a PNG (default: nowhere)"),
    ):
        sample.add_argument(
            name,
            **DIRECTORY,
            default=argparse.SUPPRESS,
            help=f"where to put {what}",
        )
    add_flags_of_machine(sample)


def add_flags_of_machine(part: argparse.ArgumentParser) -> None:
    """Flags of a training that a command on a finished run takes too."""
    for name, setting in settings_of(VAEConfig).items():
        if name in VAEConfig.of_machine:
            add_flag(part, setting, "as in the run")


def add_impute_flags(impute: argparse.ArgumentParser) -> None:
    impute.set_defaults(smaller=SMALLER_IMPUTATION)
    impute.add_argument(
        "run_dir",
        nargs="?",
        default=None,
        type=directory,
        metavar="RUN_DIR",
        help="a run of sqloss vae; impute.csv and imputation_*.png go there",
    )
    add_config_flags(impute, ImputeConfig)
    comparison = impute.add_argument_group("comparing priors")
    comparison.add_argument(
        "--compare",
        action="store_true",
        help="train normal and t priors, and controls, with several seeds each, and compare them",
    )
    add_config_flags(comparison, CompareConfig)
    comparison.add_argument(
        "--output-dir",
        **DIRECTORY,
        help="where the runs, sweep.csv and sweep.md go; runs that are there already are not done "
        "again (default: runs/impute-DATASET)",
    )
    training = impute.add_argument_group(
        "how --compare trains; with RUN_DIR only " + ", ".join(map(as_flag, VAEConfig.of_machine))
    )
    add_config_flags(
        training, VAEConfig, PLAIN, without=(*NOT_COMPARED, *settings_of(ImputeConfig))
    )


def add_config_flags(
    part: argparse._ActionsContainer,
    kind: type,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    without: Sequence[str] = (),
) -> None:
    """A flag per setting of a configuration."""
    for name, setting in settings_of(kind).items():
        if name not in without:
            add_flag(part, setting, str(defaults.get(name, setting.default)) or "none")


def add_flag(part: argparse._ActionsContainer, setting: Setting, default: str) -> None:
    """The flag of a setting, absent where it is not given."""
    kind: dict[str, Any] = (
        {"action": "store_true"} if setting.type is bool else {"type": setting.type}
    )
    options = kind | setting.for_argparse
    options["help"] = f"{setting.metadata['help']} (default: {default})"
    names = part.add_mutually_exclusive_group()
    names.add_argument(as_flag(setting.name), **options)
    if setting.formerly:
        names.add_argument(
            as_flag(setting.formerly),
            action=FormerFlag,
            dest=setting.name,
            help=argparse.SUPPRESS,
            **{"nargs": 0} if setting.type is bool else {"type": setting.type},
        )


class FormerFlag(argparse.Action):
    """A flag by its name before it was renamed: it still works, and warns."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        warn_of_renamed(self.option_strings[0].removeprefix("--").replace("-", "_"), self.dest)
        setattr(namespace, self.dest, True if self.nargs == 0 else values)
