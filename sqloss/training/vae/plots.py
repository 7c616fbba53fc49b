"""The pictures of a run of ``sqloss vae``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import sqloss
from sqloss.datasets import Dataset
from sqloss.models import VAE
from sqloss.models.pixels import pixels
from sqloss.models.seeding import generator
from sqloss.student_t import draw_seed
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
from sqloss.training.loop import Row
from sqloss.training.vae.config import VAEConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLES_PER_SIDE = 8
RECONSTRUCTIONS = 8  # of the first test images, and as many of the worst


def draw_pictures(
    directory: Path,
    models: Mapping[str, VAE],
    losses: Mapping[str, Mapping[str, Tensor]],
    history: Sequence[Row],
    data: Dataset,
    config: VAEConfig,
) -> None:
    """Write every picture of a run into its directory."""
    measured = {name: config.objective_names[name] for name in config.objectives}
    figures = {
        "vae_loss_curves.png": loss_curves(history, measured),
        "vae_loss_distribution.png": loss_distribution(losses, config.metric_alpha),
        "vae_samples.png": samples(models, config.seed),
        "vae_reconstructions.png": reconstructions(models, losses, data),
    }
    for name, figure in figures.items():
        save_picture(directory / name, figure)


def loss_curves(history: Sequence[Row], objective_names: Mapping[str, str]) -> "Figure":
    """One panel per objective, in which every model is measured by it."""
    figure = new_figure(4.5 * len(objective_names), 3.6)
    panels = figure.subplots(1, len(objective_names), squeeze=False)[0]
    for axes, (objective, words) in zip(panels, objective_names.items(), strict=True):
        metric = f"test_objective_{objective}"
        draw_curves(axes, history, metric)
        axes.set_ylabel("nats per test image")
        axes.set_title(words.replace("-ELBO", "$-$ELBO"), fontsize="medium")
        # The fall of the first epochs would press all the rest flat.
        settled = [row[metric] for row in history if row["epoch"] > history[-1]["epoch"] // 10]
        margin = 0.05 * (max(settled) - min(settled)) or 1
        axes.set_ylim(min(settled) - margin, max(settled) + margin)
        axes.legend()
    return figure


def loss_distribution(losses: Mapping[str, Mapping[str, Tensor]], alpha: float) -> "Figure":
    """The -ELBO of all test images under each model, on common bins."""
    figure = new_figure(9, 3.6)
    axes = figure.subplots()
    bounds = {name: of_model["negative_elbo"] for name, of_model in losses.items()}
    bins = edges(bounds.values())
    for name, bound in bounds.items():
        look = style(name, bounds)
        color = look["color"]
        axes.hist(bound.tolist(), bins, color=color, alpha=0.2)
        axes.hist(bound.tolist(), bins, histtype="step", label=name, **look)
        mean, cvar = bound.mean().item(), sqloss.cvar(bound, alpha).item()
        axes.axvline(mean, color=color, linestyle=":", label=f"{name}: mean {mean:.1f}")
        axes.axvline(cvar, color=color, linestyle="-.", label=f"{name}: CVaR {cvar:.1f}")
    axes.set(
        title=f"Test $-$ELBO per image, with its mean and its CVaR at $\\alpha$ = {alpha:g}",
        xlabel="$-$ELBO (nats)",
        ylabel="test images",
    )
    axes.legend()
    return figure


@torch.no_grad()
def samples(models: Mapping[str, VAE], seed: int) -> "Figure":
    """Images that each model generates from the same latent noise."""
    figure = new_figure(4.2 * len(models), 4.6)
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    draw = draw_seed(generator=generator(seed, "samples"))
    for axes, (name, model) in zip(panels, models.items(), strict=True):
        images = model.sample(SAMPLES_PER_SIDE**2, draw)
        show(axes, mosaic(images, columns=SAMPLES_PER_SIDE))
        axes.set_title(name)
    figure.suptitle("Generated from the same latent noise")
    return figure


@torch.no_grad()
def reconstructions(
    models: Mapping[str, VAE], losses: Mapping[str, Mapping[str, Tensor]], data: Dataset
) -> "Figure":
    """Originals above each model's reconstructions: the first test images, and the worst."""
    average = torch.stack([of_model["reconstruction"] for of_model in losses.values()]).mean(0)
    count = min(RECONSTRUCTIONS, len(average))
    blocks = {
        "First test images": torch.arange(count),
        "Worst reconstructed on average of the models": average.topk(count).indices,
    }
    labels = ["original", *models]
    figure = new_figure(11, 1 + 0.65 * len(labels))
    for axes, (title, chosen) in zip(figure.subplots(1, 2), blocks.items(), strict=True):
        originals = pixels(data.test_images[chosen.to(data.test_images.device)])
        rows = [originals, *(model.reconstruct(originals) for model in models.values())]
        show(axes, mosaic(torch.cat(rows), columns=count))
        axes.set_title(title)
        label_rows(axes, labels, height=data.shape[1])
    return figure
