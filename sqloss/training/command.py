"""``sqloss vae`` and its like: a run from its flags to its report."""

import shlex
from pathlib import Path
from typing import Any

from sqloss.common import ranks
from sqloss.common.flags import configure
from sqloss.common.ranks import say
from sqloss.common.streams import show
from sqloss.training.estimate import estimate
from sqloss.training.progress import Progress, Silence
from sqloss.training.run import Run
from sqloss.training.trainer import Trainer

INTERRUPTED = 130  # what a shell returns for it: 128 + SIGINT


def train(
    trainer: Trainer[Any, Any],
    output_dir: Path | None = None,
    resume: Path | None = None,
    **given: Any,
) -> int:
    """Start a run, or take it up again, and report on it once it is trained."""
    kind = trainer.config
    run: Run[Any] = (
        Run.resumed(kind, resume, given)
        if resume
        else Run.new(output_dir, configure(kind, **given))
    )
    config = run.config
    run.set_up(trainer)
    say(f"run: {run.directory} on {config.torch_device}")
    say(trainer.describe(run.whole, run.data))

    resuming = f"sqloss {trainer.name} --resume {shlex.quote(str(run.directory))}"
    with run:
        if words := estimate(run):
            say(words)
    progress = Progress(*run.steps(), config.epochs) if ranks.is_first() else Silence()
    if not run.fit(progress):
        say(f"stopped and saved after {run.training.done()}; continue with: {resuming}")
        return INTERRUPTED

    if not ranks.disband():
        return 0
    say(f"the training is done and saved; {trainer.reporting}")
    try:
        report = run.report()
    except KeyboardInterrupt:
        say(f"\nstopped before the report; the training is saved, make the report with: {resuming}")
        return INTERRUPTED
    show(trainer.tables(report))
    for line in trainer.closing_words(report):
        say(line)
    say(f"how to read this, and the pictures: {run.directory / 'report.md'}")
    return 0
