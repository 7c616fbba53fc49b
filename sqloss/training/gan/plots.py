"""The pictures of a run of ``sqloss gan``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sqloss.datasets import Dataset
from sqloss.models.gan import GAN, Discriminator, Generator
from sqloss.models.gan_losses import fake_losses, real_losses
from sqloss.models.pixels import pixels, signed_pixels, to_signed
from sqloss.models.seeding import generator as stream
from sqloss.training.figures import (
    draw_curves,
    edges,
    label_rows,
    mosaic,
    new_figure,
    save_picture,
    show,
    style,
)
from sqloss.training.gan.config import GANConfig
from sqloss.training.gan.generation import Noise, draw_noise, generate
from sqloss.training.gan.metrics import nearest_neighbours
from sqloss.training.loop import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SAMPLES_PER_SIDE = 8
CLASSES_SHOWN = 10
NEAREST = 10
CODES_SHOWN = 20
CODE_STEPS = 9  # from -1 to 1
JUDGED = 1000  # images of each kind in the distributions


def draw_pictures(
    directory: Path,
    models: Mapping[str, GAN],
    generators: Mapping[str, Generator],
    history: Sequence[Row],
    data: Dataset,
    config: GANConfig,
) -> None:
    """Write every picture of a run into its directory."""
    figures = {
        "gan_loss_curves.png": loss_curves(history, config),
        "gan_loss_distribution.png": loss_distribution(models, generators, data, config),
        "gan_samples.png": samples(generators, data, config.seed),
        "gan_nearest.png": nearest(generators, data, config.seed),
    }
    if config.info_codes:
        figures["gan_codes.png"] = codes(generators, config.seed)
    for name, figure in figures.items():
        save_picture(directory / name, figure)


def loss_curves(history: Sequence[Row], config: GANConfig) -> "Figure":
    """Both players' losses, of all models by their mean and by their tail."""
    figure = new_figure(9, 6.4)
    tail = f"CVaR {config.metric_alpha:g}"
    for row, (player, prefix) in zip(
        figure.subplots(2, 2), (("discriminator", "d"), ("generator", "g")), strict=True
    ):
        for axes, (words, suffix) in zip(row, (("mean", "mean"), (tail, "cvar")), strict=True):
            draw_curves(axes, history, f"{prefix}_loss_{suffix}")
            axes.set_title(f"{player}: {words} of the losses")
            axes.legend()
    return figure


@torch.no_grad()
def loss_distribution(
    models: Mapping[str, GAN],
    generators: Mapping[str, Generator],
    data: Dataset,
    config: GANConfig,
) -> "Figure":
    """The losses of all models' images under one discriminator; a panel for each of these."""
    figure = new_figure(4.8 * len(models), 3.8)
    noises = {
        name: draw_noise(JUDGED, model, stream(config.seed, "samples"))
        for name, model in generators.items()
    }
    images = {name: to_signed(generate(model, noises[name])) for name, model in generators.items()}
    real, labels = signed_pixels(data.test_images[:JUDGED]), data.test_labels[:JUDGED]
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, (judge, model) in zip(panels, models.items(), strict=True):
        losses = {
            f"by {name}": fake_losses(
                config.loss, logits(model.discriminator, images[name], noises[name].labels)
            )
            for name in images
        }
        of_real = real_losses(config.loss, logits(model.discriminator, real, labels))
        bins = edges([of_real, *losses.values()])
        draw_shares(axes, of_real, bins, color="0.8", label="test images, as real")
        for name, (label, values) in zip(images, losses.items(), strict=True):
            draw_shares(axes, values, bins, histtype="step", label=label, **style(name, images))
        title = f"before {judge}'s discriminator"
        axes.set(title=title, xlabel="its loss", ylabel="share of the images")
        axes.legend(loc="upper right")  # to look for the best place takes longer than all else
    figure.suptitle("All images before one and the same discriminator")
    return figure


def draw_shares(axes: "Axes", values: Tensor, bins: list[float], **look: Any) -> None:
    """A histogram of shares: there may be far fewer test images than generated ones."""
    axes.hist(values.tolist(), bins, weights=[1 / len(values)] * len(values), **look)


def logits(judge: Discriminator, images: Tensor, labels: Tensor | None) -> Tensor:
    """The logits of each image by itself: batch norm uses the statistics that it has learnt."""
    was_training = judge.training
    judge.eval()
    found: Tensor = judge(images, labels if judge.classes else None)
    judge.train(was_training)
    return found


def samples(generators: Mapping[str, Generator], data: Dataset, seed: int) -> "Figure":
    """Images of the same noise; those of a conditional model have a class per row."""
    conditional = next(iter(generators.values())).classes > 0
    rows = min(len(data.class_names), CLASSES_SHOWN) if conditional else SAMPLES_PER_SIDE
    labels = torch.arange(rows).repeat_interleave(SAMPLES_PER_SIDE) if conditional else None
    figure = new_figure(4.2 * len(generators), 0.4 + 4.2 * rows / SAMPLES_PER_SIDE)
    panels = figure.subplots(1, len(generators), squeeze=False)[0]
    for axes, (name, model) in zip(panels, generators.items(), strict=True):
        noise = draw_noise(rows * SAMPLES_PER_SIDE, model, stream(seed, "samples"), labels)
        show(axes, mosaic(generate(model, noise), columns=SAMPLES_PER_SIDE))
        axes.set_title(name)
        if conditional:
            label_rows(axes, data.class_names[:rows], height=data.shape[1])
    figure.suptitle("Generated from the same noise")
    return figure


def nearest(generators: Mapping[str, Generator], data: Dataset, seed: int) -> "Figure":
    """Generated images above the training images that are nearest to them, pixel by pixel."""
    figure = new_figure(7, 1.9 * len(generators))
    panels = figure.subplots(len(generators), 1, squeeze=False)[:, 0]
    for axes, (name, model) in zip(panels, generators.items(), strict=True):
        images = generate(model, draw_noise(NEAREST, model, stream(seed, "samples")))
        distances, indices = nearest_neighbours(images, data.train_images)
        neighbours = pixels(data.train_images[indices.to(data.train_images.device)])
        show(axes, mosaic(torch.cat([images, neighbours]), columns=NEAREST))
        label_rows(axes, [name, "nearest"], height=data.shape[1])
        step = data.shape[2] + 1
        axes.set_xticks(
            [step * i + step / 2 for i in range(NEAREST)], [f"{d:.2f}" for d in distances]
        )
    figure.suptitle("Generated images, the nearest training images, and the distances")
    return figure


def codes(generators: Mapping[str, Generator], seed: int) -> "Figure":
    """A row per code: it goes from -1 to 1, and all else stays."""
    rows = min(next(iter(generators.values())).codes, CODES_SHOWN)
    figure = new_figure(4.6 * len(generators), 0.8 + 0.5 * rows)
    panels = figure.subplots(1, len(generators), squeeze=False)[0]
    for axes, (name, model) in zip(panels, generators.items(), strict=True):
        images = generate(model, noise_by_code(model, rows, seed))
        show(axes, mosaic(images, columns=CODE_STEPS))
        label_rows(axes, [f"code {i + 1}" for i in range(rows)], height=images.shape[2])
        axes.set_title(name)
    figure.suptitle("One code per row, from -1 to 1")
    return figure


def noise_by_code(model: Generator, rows: int, seed: int) -> Noise:
    """Of one image, with each of the first codes at CODE_STEPS values and the others at 0."""
    count = rows * CODE_STEPS
    one = draw_noise(1, model, stream(seed, "codes"))
    values = torch.linspace(-1, 1, CODE_STEPS, device=one.z.device)
    varied = torch.zeros(rows, CODE_STEPS, model.codes, device=one.z.device)
    for code in range(rows):
        varied[code, :, code] = values
    labels = None if one.labels is None else one.labels.expand(count)
    return Noise(one.z.expand(count, -1), labels, varied.flatten(0, 1))
