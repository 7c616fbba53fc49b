"""What a run of ``sqloss gan`` has come to: how good its images are, and what classes they show."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sqloss.common.errors import UserError
from sqloss.common.flags import flat
from sqloss.common.tables import CONFIDENCE, table
from sqloss.datasets import Dataset
from sqloss.models.classifier import Classifier, accuracy
from sqloss.models.gan import Generator
from sqloss.models.seeding import generator as stream
from sqloss.training import sampling_report
from sqloss.training.attributes import AttributeJudge, attribute_note, attribute_table
from sqloss.training.gan.config import GANConfig
from sqloss.training.gan.generation import generate_many
from sqloss.training.gan.loop import D_METRICS, G_METRICS
from sqloss.training.gan.metrics import LEAST_IMAGES, floor, measure_images, true_fid
from sqloss.training.gan.stability import failures
from sqloss.training.loop import Row
from sqloss.training.progress import counted
from sqloss.training.shares import check_classifier_file, class_shares, share, share_table

Report = dict[str, Any]
QUALITY = {
    "cfid": "cFID",
    "ckid": "cKID",
    "precision": "precision",
    "recall": "recall",
    "label_entropy": "label entropy",
    "modes": "modes",
}


def check_data(whole: Dataset, config: GANConfig) -> None:
    """Fail before the training where the report would fail after it."""
    for kind, images in (("training", whole.train_images), ("test", whole.test_images)):
        if len(images) < LEAST_IMAGES:
            raise UserError(
                f"--dataset: expected at least {LEAST_IMAGES} {kind} images, got {len(images)}"
            )
    if config.classifier_file:
        check_classifier_file(config.classifier_file, whole)


def make_report(
    generators: Mapping[str, Generator],
    history: Sequence[Row],
    classifier: Classifier,
    whole: Dataset,
    data: Dataset,
    config: GANConfig,
) -> Report:
    """The report on generators trained on ``data``; ``whole`` is that before the imbalance.

    Distances are of as many generated images as there are real ones to compare with, up to
    --num-samples, so that they can be held against those of the real ones.
    """
    whole = whole.to(data.train_images.device)
    judged = min(config.num_samples, len(whole.train_images))
    attributes = (
        AttributeJudge.learn(whole, config.imbalance, config.torch_device, config.seed)
        if whole.train_attributes
        else None
    )
    real = floor(judged, whole.train_images, data.test_images, classifier, config.seed)
    return {
        "config": flat(config),
        "risks": config.risk_names,
        "alpha_of_cvar": config.metric_alpha,
        "class_names": list(data.class_names),
        "train_images": data.class_counts(),
        "train_images_before_imbalance": whole.class_counts(),
        "classifier_test_accuracy": accuracy(classifier, data.test_images, data.test_labels),
        "real": real,
        **({"attributes": attributes.describe(whole, data)} if attributes else {}),
        "models": {
            name: measure_model(model, classifier, attributes, judged, data, config)
            | {"losses": latest_losses(history, name)}
            | {"failures": failures(history, name, config.loss)}
            for name, model in generators.items()
        },
    }


def measure_model(
    model: Generator,
    classifier: Classifier,
    attributes: AttributeJudge | None,
    judged: int,
    data: Dataset,
    config: GANConfig,
) -> dict[str, Any]:
    """The numbers of one generator; every model gets the same noise."""
    images, labels = generated(model, config)
    measured: dict[str, Any] = {
        "generated": class_shares(classifier, [images]),
        "quality": measure_images(
            images[:judged], data.train_images, data.test_images, classifier, config.seed
        ),
    }
    if attributes:
        measured["attributes"] = attributes.shares([images])
    if labels is not None:
        agreeing = int((classifier.predict(images) == labels).sum())
        measured["label_agreement"] = share(agreeing, len(labels))
    if config.fid_weights_file:
        fid = true_fid(images[:judged], data.test_images, config.fid_weights_file)
        measured["fid"] = fid
    return measured


def generated(model: Generator, config: GANConfig) -> tuple[Tensor, Tensor | None]:
    """--num-samples images of pixels, and the classes that a conditional model was asked for."""
    batches = list(generate_many(model, config.num_samples, stream(config.seed, "samples")))
    images = torch.cat([batch for batch, _ in batches])
    labels = [noise.labels for _, noise in batches if noise.labels is not None]
    return images, torch.cat(labels) if labels else None


def latest_losses(history: Sequence[Row], name: str) -> dict[str, float]:
    """The metrics of a model in the last epoch."""
    row = next(row for row in reversed(history) if row["model"] == name)
    return {metric: row[metric] for metric in (*D_METRICS, *G_METRICS)}


def as_markdown(report: Report) -> str:
    config = report["config"]
    real = report["real"]
    pictures = {
        "gan_loss_curves.png": "Losses over the epochs",
        "gan_loss_distribution.png": "Distribution of the losses of images",
        "gan_samples.png": "Generated images",
        "gan_nearest.png": "Generated images and their nearest training images",
    } | ({"gan_codes.png": "One code per row"} if config["info_codes"] else {})
    shown = "\n".join(f"![{words}]({name})" for name, words in pictures.items())
    classes_note = (
        "\n- Classes were asked for with equal probability, however rare they are in the training:"
        "\n  their shares tell how well the generator obeys, and no more."
        if config["conditional"]
        else ""
    )
    losses_note = (
        " Those of two models are of two\n  discriminators, and say nothing of which generates"
        " better images; `gan_loss_distribution.png`\n  has both models' images before one"
        " discriminator."
        if len(report["models"]) > 1
        else ""
    )
    return f"""\
# GAN on {config["dataset"]}

{how_trained(report)}
Every setting is in `config.json`.

{tables(report)}

{stability(report)}
## How to read this

- cFID and cKID are the Frechet and the kernel distance (Heusel et al., 2017; Binkowski et al.,
  2018) of {real["images"]} images from the {real["reference_images"]} test images, in the features
  of a small classifier and not in Inception's: they are no FID, and compare only what one
  classifier has judged. "real" are as many training images, from before the imbalance, in the
  place of the generated ones: the floor.
- Precision is the share of generated images that are near some test image, recall the share of test
  images that are near some generated one (Kynkaanniemi et al., 2019). One outlier among the test
  images can have all generated ones near it, so with few test images even noise may be precise.
  The label entropy is at most {real["label_entropy_max"]:.3f} nats. A mode is a class that at least
  a tenth of an even share of the images show, to the classifier with a probability of 0.9.
- That classifier was trained on the training images before the imbalance, and gets
  {report["classifier_test_accuracy"]:.1%} of the test images right. The intervals are Wilson's at
  {CONFIDENCE:.0%}; they cover the number of generated images, not the classifier's
  errors.{classes_note}{attribute_note(report)}
- Losses are means over the steps of the last epoch, weighted by their images.{losses_note}
  The AUC is the share of pairs of a real and a generated image of a step of which the real one has
  the higher logit: 0.5 is all that a discriminator gets of images that it cannot tell apart.
- A generator that has learnt its training images by heart makes images much nearer to them than the
  held-out ones are.
- This is one run with one seed. A difference between the models on one seed is not evidence for one
  of them: repeat it with several seeds (`sqloss sweep gan --seeds 5`).
{sampling_report.note(report)}
{shown}
"""


def how_trained(report: Report) -> str:
    config = report["config"]
    risks = report["risks"]
    games = "; ".join(f"`{model}` on the {risks[model]}" for model in report["models"])
    alike = ", from the same initial weights, on the same batches and noise"
    condition = ", both players told the class" if config["conditional"] else ""
    return (
        f"With the {config['loss']} loss{condition}, trained for "
        f"{counted(config['epochs'], 'epoch')}{alike if len(report['models']) > 1 else ''}:\n"
        f"{games}."
    )


def stability(report: Report) -> str:
    """The failures, and in which epochs they were."""
    lines = [
        f"- {name}: {words}: in {counted(len(epochs), 'epoch')}, first in epoch {epochs[0]}."
        for name, model in report["models"].items()
        for words, epochs in model["failures"].items()
    ]
    return "## What went wrong\n\n" + "\n".join(lines) + "\n" if lines else ""


def tables(report: Report) -> str:
    """The numbers of a report, as Markdown that a terminal shows well too."""
    parts = [quality_table(report), share_table(report), loss_table(report), nearest_table(report)]
    if "attributes" in report:
        parts.insert(2, attribute_table(report))
    return "\n\n".join(map(table, parts))


def quality_table(report: Report) -> Iterator[list[str]]:
    models = report["models"].values()
    yield [f"{report['real']['images']} images", "real", *report["models"]]
    columns = [report["real"], *(model["quality"] for model in models)]
    for metric, label in QUALITY.items():
        yield [label, *(in_digits(metric, column[metric]) for column in columns)]
    if report["config"]["conditional"]:
        shares = [f"{model['label_agreement']['share']:.1%}" for model in models]
        yield [f"of the class asked for, of {report['config']['num_samples']}", "", *shares]
    if report["config"]["fid_weights"]:
        yield ["FID", "", *(f"{model['fid']:.2f}" for model in models)]


def in_digits(metric: str, value: float) -> str:
    """A number with the digits that it deserves."""
    if metric == "modes":
        return str(value)
    if metric == "ckid":  # in the unit of the features, of which there is no usual size
        return f"{value:.3g}"
    return f"{value:.2f}" if metric == "cfid" else f"{value:.3f}"


def loss_table(report: Report) -> Iterator[list[str]]:
    alpha = f"{report['alpha_of_cvar']:g}"
    yield ["losses, last epoch", *report["models"]]
    for label, metric in (
        ("discriminator: mean", "d_loss_mean"),
        (f"discriminator: CVaR {alpha}", "d_loss_cvar"),
        ("generator: mean", "g_loss_mean"),
        (f"generator: CVaR {alpha}", "g_loss_cvar"),
    ):
        yield [label, *(f"{model['losses'][metric]:.3f}" for model in report["models"].values())]
    areas = [model["losses"]["d_auc"] for model in report["models"].values()]
    yield ["discriminator: AUC", *(f"{area:.3f}" for area in areas)]


def nearest_table(report: Report) -> Iterator[list[str]]:
    """Quantiles of the distances to the nearest training image."""
    models = report["models"]
    yield ["nearest training image", "held out", *models]
    rows = zip(*(model["quality"]["nearest"] for model in models.values()), strict=True)
    for of_models in rows:
        distances = [of_models[0]["held_out"], *(row["generated"] for row in of_models)]
        yield [f"distance, quantile {of_models[0]['quantile']:g}", *(f"{d:.3f}" for d in distances)]
