"""How a sweep's runs do with rare classes: what they generate of each class, and how well.

Each model is judged from its own prior, and a model with an encoder from priors fitted to its
training images as well. Whatever is compared, it is compared with the first arm from its own prior.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sqloss.common.errors import UserError
from sqloss.common.files import write_json
from sqloss.datasets import Dataset
from sqloss.datasets.imbalance import thinned
from sqloss.experiments.measurement import Control, Judged, Key, Series, metrics_of_rows
from sqloss.generation.measures import Samples
from sqloss.models.classifier import Classifier
from sqloss.models.mixture import Mixture
from sqloss.models.pixels import Images, pixels
from sqloss.models.seeding import generator
from sqloss.training.run import Run
from sqloss.training.trainer import Latents, Metric, Report
from sqloss.training.vae.bounds import evaluated_rows
from sqloss.training.vae.evaluation import evaluate, importance_weighted
from sqloss.training.vae.priors import (
    COMMUNITIES,
    MIXTURE,
    FittedPrior,
    PriorConfig,
    TrainedModel,
    fitted_prior,
)

PRIORS = (
    PriorConfig(),
    *(PriorConfig(COMMUNITIES, power=power) for power in (0.0, 1.0, 1.5)),
    *(PriorConfig(MIXTURE, power=power) for power in (0.0, 1.5)),
)
BOUND_IMAGES, BOUND_DRAWS = 500, 50  # of the importance-weighted bound: a second for each prior
MOST_COMPARED = 300  # images whose nearest training images are looked for


METRICS = metrics_of_rows(
    ("rare_share", "rare share", 4, "higher"),
    ("rare_clear", "among clear", 4, "higher"),
    ("rare_confidence", "confidence", 3, "higher"),
    ("clear", "clear", 4, "higher"),
    ("least_share", "least common", 4, "higher"),
    ("from_training", "from training's", 4, "lower"),
    ("from_uniform", "from uniform", 4, "lower"),
    ("negative_elbo", "-ELBO", 2, "lower"),
    ("rare_negative_elbo", "-ELBO of rare", 2, "lower"),
    ("worst_class_negative_elbo", "-ELBO of worst class", 2, "lower"),
    ("negative_iw_bound", f"-IW-{BOUND_DRAWS}", 2, "lower"),
    ("rare_nearest", "nearest, rare", 3, ""),
    ("common_nearest", "nearest, common", 3, ""),
    ("weight_of_rare", "weight of rare", 4, ""),
)

HOW_TO_READ = """\
The classes that --imbalance thins are rare. Shares are of all generated images, by the likeliest
class of one small classifier; clear are those that it gives a probability of 0.8. The confidence is
the mean probability of what it calls rare. The least common is the smallest share of a class that
is not rare; the distances from the training's shares and from uniform ones are half the sum of all
differences. Losses are of the test images, under the prior of the row. The nearest training image
of a class, in pixels, is as far from a generated image as from a test image where this ratio
is 1: the lower, the more is copied, or smoothed away, which that of common classes tells. The
weight of the rare classes is that of their training images in the prior, or in the batches of a
sampler."""


def first_row(key: Key, series: Series) -> Key | None:
    """The first arm from its own prior."""
    first = next(iter(series))
    return None if key == first else first


@dataclass(frozen=True)
class RareClasses(Judged):
    """What the models of a run make of rare classes, by the prior that they generate from."""

    name: ClassVar[str] = "rare"
    title: ClassVar[str] = "Rare classes"
    file: ClassVar[str] = "rare.json"
    parts: ClassVar[tuple[str, ...]] = ("model", "prior")
    controls: ClassVar[Mapping[str, Control]] = {"the first arm from its own prior": first_row}
    how_to_read: ClassVar[str] = HOW_TO_READ
    metrics: ClassVar[Mapping[str, Metric]] = METRICS
    main_metrics: ClassVar[tuple[str, ...]] = tuple(METRICS)

    def __post_init__(self) -> None:
        if not self.trainer.priors:
            raise UserError(
                f"--measure: expected report for sqloss {self.command}, got {self.name}"
            )

    def measure(self, run: Run[Any], is_trained: bool) -> None:
        classifier = self.classifier(run.directory.parents[1], run.config, run.whole)
        rows = [row for name in run.training.models for row in rows_of_model(run, name, classifier)]
        write_json(run.directory / self.file, {"rows": rows})


def rows_of_model(run: Run[Any], name: str, classifier: Classifier) -> Iterator[Report]:
    """A row for each prior that a model can generate from."""
    classes = len(run.data.class_names)
    is_common = torch.ones(classes, dtype=torch.bool).index_fill(0, rare_classes(run), False)
    parts = {"rare": ~is_common, "common": is_common}
    known = {name: Known.of(run.data, classes) for name, classes in parts.items()}
    for config in PRIORS:
        if config.prior in run.trainer.priors:
            fitted, mixture = None, None
            if config.is_fitted:
                fitted = fitted_prior(TrainedModel.of(run, name), config)
                mixture = fitted.mixture.with_power(config.power)
            yield {
                **{"model": name, "prior": config.in_words},
                "weight_of_rare": weight_of_rare(run, fitted, config.power),
                **(of_losses(run, name, mixture) if COMMUNITIES in run.trainer.priors else {}),
                **of_samples(run, name, mixture, classifier, known),
            }


def rare_classes(run: Run[Any]) -> Tensor:
    """The classes that the run's imbalance thins, by number."""
    parts = thinned(run.config.imbalance, run.data.class_names, run.data.train_attributes)
    return torch.tensor([part for part in parts if isinstance(part, int)], dtype=torch.int64)


def weight_of_rare(run: Run[Any], fitted: FittedPrior | None, power: float) -> float | None:
    """The weight of rare classes in a fitted prior, or else in the batches of a sampler."""
    rare = torch.isin(run.data.labels, rare_classes(run)).double()
    if not rare.any():
        return None
    if fitted:
        weights, groups = fitted.mixture.with_power(power).weights.cpu(), fitted.groups
        members = torch.bincount(groups, minlength=len(weights)).double()
        return (rare * (weights / members)[groups]).sum().item()
    kept = run.training.of_sampler
    return (rare * kept["p"]).sum().item() if kept else None


def of_losses(run: Run[Any], name: str, mixture: Mixture | None) -> Report:
    """The losses of the test images under a prior."""
    model, data, seed = run.training.models[name], run.data, run.config.seed
    losses = evaluate(model, data, seed, prior=mixture)["negative_elbo"]
    labels = data.test_labels.cpu()
    rare = torch.isin(labels, rare_classes(run))
    rows = evaluated_rows(data, BOUND_IMAGES)
    bounds = importance_weighted(model, data.test_images, rows, seed, BOUND_DRAWS, prior=mixture)
    return {
        "negative_elbo": losses.mean().item(),
        "rare_negative_elbo": losses[rare].mean().item() if rare.any() else None,
        "worst_class_negative_elbo": max(
            losses[labels == label].mean().item() for label in labels.unique()
        ),
        "negative_iw_bound": bounds["negative_iw_bound"].mean().item(),
    }


def of_samples(
    run: Run[Any],
    name: str,
    mixture: Mixture | None,
    classifier: Classifier,
    known: Mapping[str, "Known"],
) -> Report:
    """What the generated images show."""
    count, data = run.config.num_samples, run.data
    draws = generator(run.config.seed, "samples")
    batches = run.trainer.draw(run.training, name, count, draws, Latents(mixture))
    samples = Samples.of(batches, classifier)
    shares = torch.bincount(samples.classes, minlength=classifier.classes).double() / count
    in_training = torch.tensor(data.class_counts()).double() / len(data)
    is_common = known["common"].classes
    rare, clear = ~is_common[samples.classes], samples.are_clear
    measured: Report = {
        "clear": clear.double().mean().item(),
        "least_share": shares[is_common].min().item(),
        "from_training": (shares - in_training).abs().sum().item() / 2,
        "from_uniform": (shares - 1 / len(shares)).abs().sum().item() / 2,
        **{f"{name}_nearest": each.ratio(samples) for name, each in known.items()},
    }
    if not is_common.all():
        sure = samples.probabilities[rare]
        measured |= {
            "rare_share": rare.double().mean().item(),
            "rare_clear": (rare & clear).sum().item() / clear.sum().item() if clear.any() else None,
            "rare_confidence": sure.mean().item() if len(sure) else None,
        }
    return measured


@dataclass(frozen=True)
class Known:
    """The training images of some classes, which generated ones may be copies of."""

    classes: Tensor  # bool, by class
    images: Tensor  # [N, D]
    held_out: float  # the median distance of a test image from the nearest of them; nan for none

    @classmethod
    def of(cls, data: Dataset, classes: Tensor) -> "Known":
        images = flat_pixels(data.train_images, classes[data.train_labels.cpu()])
        held_out = flat_pixels(data.test_images, classes[data.test_labels.cpu()])
        return cls(classes, images, median_distance(held_out, images))

    def ratio(self, samples: Samples) -> float | None:
        """The median distance of a clear image, by that of a test image."""
        seen = self.classes[samples.classes] & samples.are_clear
        generated = median_distance(flat_pixels(samples.images, seen), self.images)
        ratio = generated / (self.held_out or math.nan)
        return None if math.isnan(ratio) else ratio


def median_distance(images: Tensor, known: Tensor) -> float:
    """Of images from the nearest of the known ones, nan where there are none."""
    if not (len(images) and len(known)):
        return math.nan
    return torch.cdist(images[:MOST_COMPARED], known).amin(1).median().item()


def flat_pixels(images: Images, mask: Tensor) -> Tensor:
    """The pixels of some images, [N, D] on the CPU."""
    rows = mask.nonzero().flatten().to(images.device)
    return pixels(images[rows]).flatten(1).cpu()
