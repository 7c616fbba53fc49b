"""What ``sqloss sample`` does, from its flags to its files."""

import itertools
import math
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqloss.common.errors import UserError, require
from sqloss.common.files import made_whole
from sqloss.common.flags import expect, expect_whole, flag, flat, taken
from sqloss.common.ranks import say
from sqloss.common.streams import show
from sqloss.generation.files import draw_communities, write_images, write_samples
from sqloss.generation.measures import Samples, measure, tables
from sqloss.models.classifier import accuracy
from sqloss.models.seeding import generator
from sqloss.training.figures import save_picture
from sqloss.training.run_directory import command_of
from sqloss.training.saved_run import ARGUMENT, SavedRun, load_saved_run
from sqloss.training.shares import kept_classifier
from sqloss.training.threads import set_threads
from sqloss.training.trainer import TRAINERS, Latents, Trainer
from sqloss.training.vae.priors import PriorConfig, prior_of

CLASSIFIER = "classifier.pt"  # in the run's directory


@dataclass(frozen=True)
class SampleConfig:
    """What to generate, valid by construction."""

    count: int = flag(1000, "images to generate", metavar="N")
    model: str = flag("", "the model that generates them, such as standard", metavar="NAME")
    temperature: float = flag(1.0, "scales the standard deviations of the latent variables")
    seed: int = flag(0, "seed of the latent variables", metavar="N")

    def __post_init__(self) -> None:
        expect_whole(self, 1, "count")
        expect(self, "temperature", 0 <= self.temperature < math.inf, "a number from 0 up")
        expect(self, "seed", self.seed >= 0, "a whole number from 0 up")


def sample(
    run_dir: Path, output_dir: Path | None = None, folder: Path | None = None, **given: Any
) -> int:
    """Generate images with a model of a run, and tell which classes they show."""
    for needed in ("matplotlib.figure", "scipy.stats", "PIL.Image"):
        require(needed)
    config, given = taken(SampleConfig, given)
    prior_config, given = taken(PriorConfig, given)
    trainer = trainer_of(run_dir, prior_config)
    check_places(output_dir, folder)
    trained = load_saved_run(trainer, run_dir, given)
    run_config, data = trained.config, trained.data
    for place in filter(None, (output_dir, folder)):
        run_config.check_place(place)
    name = chosen_model(trained, config.model)
    set_threads(run_config, data)
    classifier = kept_classifier(
        run_config.classifier_file or run_dir / CLASSIFIER,
        *(trained.whole, run_config.torch_device, run_config.seed, ARGUMENT),
    )
    prior = prior_of(trained, run_dir, name, prior_config)
    mixture = prior.mixture.with_power(prior_config.power) if prior else None
    say(
        f"generating {config.count} images with the {name} model of {trained.done}; prior: "
        f"{prior_config.in_words}"
    )
    draws = generator(config.seed, "samples")
    latents = Latents(mixture, config.temperature)
    samples = Samples.of(
        trainer.draw(trained.training, name, config.count, draws, latents), classifier
    )
    report = {
        **flat(config),
        **flat(prior_config),
        **{"model": name, "trained_for": trained.done},
        "class_names": list(data.class_names),
        "train_images": data.class_counts(),
        "classifier_test_accuracy": accuracy(classifier, data.test_images, data.test_labels),
        **measure(samples, classifier.classes, mixture),
    }
    output_dir = output_dir or new_place(run_dir)
    with ExitStack() as both_or_none:
        place = both_or_none.enter_context(made_whole(output_dir))
        write_samples(place, samples, report)
        if prior and mixture:
            model = trained.models[name]
            picture = draw_communities(
                *(model, mixture, prior.groups, data, config.temperature, config.seed)
            )
            save_picture(place / "communities.png", picture)
        if folder:
            write_images(both_or_none.enter_context(made_whole(folder)), samples.images)
    show(tables(report))
    say(f"the classifier gets {report['classifier_test_accuracy']:.1%} of the test images right")
    say(f"the images, and every number in samples.json: {output_dir}")
    return 0


def trainer_of(run_dir: Path, prior: PriorConfig) -> Trainer[Any, Any]:
    """The trainer of a run, where its models make images from such a prior."""
    command = command_of(run_dir, ARGUMENT)
    trainer = TRAINERS.get(command)
    if trainer is None or not trainer.priors:
        able = " or ".join(f"sqloss {t.name}" for t in TRAINERS.values() if t.priors)
        raise UserError(f"{ARGUMENT}: expected a run of {able}, got one of sqloss {command}")
    if prior.prior not in trainer.priors:
        raise UserError(
            f"--prior: expected {' or '.join(trainer.priors)} for a run of sqloss {command}, whose "
            f"models have no encoder, got {prior.prior}"
        )
    return trainer


def check_places(output_dir: Path | None, folder: Path | None) -> None:
    """Raise where something would be overwritten, or could not be made."""
    for argument, place in (("--output-dir", output_dir), ("--folder", folder)):
        if place is not None and (place.exists() or place.is_symlink()):
            raise UserError(f"{argument}: expected a directory that is not there yet, got {place}")
    if output_dir and folder:
        first, second = output_dir.absolute(), folder.absolute()
        if first.is_relative_to(second) or second.is_relative_to(first):
            raise UserError(
                f"--folder: expected a directory outside of --output-dir {output_dir}, got {folder}"
            )


def new_place(run_dir: Path) -> Path:
    """A directory in the run that is not there yet, named by the time."""
    name = f"samples-{datetime.now():%Y%m%d-%H%M%S}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(place for place in map(run_dir.joinpath, names) if not place.exists())


def chosen_model(trained: SavedRun, name: str) -> str:
    """The model of this name; without a name the one of the run's risk, which is the last."""
    if name and name not in trained.models:
        raise UserError(f"--model: expected one of {', '.join(trained.models)}, got {name}")
    return name or list(trained.models)[-1]
