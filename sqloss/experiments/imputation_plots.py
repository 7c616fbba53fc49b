"""The pictures of imputation."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sqloss.datasets import Dataset
from sqloss.experiments.imputation import Imputed, filled, mean_pixels, means_at_draws, name_of
from sqloss.models import VAE
from sqloss.models.pixels import pixels
from sqloss.models.seeding import generator
from sqloss.training.figures import label_rows, mosaic, new_figure, save_picture, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING_COLOUR = (0.84, 0.37, 0.0)  # no grey value, and no pixel of the images shown
SHOWN = 10  # test images, the first
RECONSTRUCTIONS = 10
DRAWS = 30
PER_ROW = 10
ONE_IMAGE_MASK = "bottom half"  # where draws differ most


def draw_imputations(
    directory: Path,
    models: Mapping[str, VAE],
    imputed: Mapping[str, Imputed],
    masks: Mapping[str, Tensor],
    data: Dataset,
    seed: int,
) -> None:
    """Write every picture of imputation into the directory of a run."""
    for mask_name, guesses in imputed.items():
        picture = grid(pixels(data.test_images[:SHOWN]), masks[mask_name][:SHOWN], guesses)
        picture.suptitle(f"Missing: {mask_name}")
        save_picture(directory / f"imputation_{mask_name.replace(' ', '_')}.png", picture)
    picture = draws_of_one_image(models, masks[ONE_IMAGE_MASK][:1], data, seed)
    save_picture(directory / "imputation_draws.png", picture)


def grid(originals: Tensor, mask: Tensor, guesses: Imputed) -> "Figure":
    """Original, masked and imputed by each method, a row each."""
    rows = {"original": coloured(originals), "masked": coloured(originals, mask)}
    for (model, method), guess in guesses.items():
        rows[name_of(model, method)] = coloured(guess[: len(originals)])
    figure = new_figure(9, 0.5 + 0.7 * len(rows))
    axes = figure.subplots()
    show(axes, mosaic(torch.cat(list(rows.values())), columns=len(originals)))
    label_rows(axes, list(rows), height=originals.shape[2])
    return figure


def draws_of_one_image(
    models: Mapping[str, VAE], mask: Tensor, data: Dataset, seed: int
) -> "Figure":
    """Each model's reconstructions of the first test image, and draws of what is missing of it."""
    original = pixels(data.test_images[:1])
    incomplete = original.masked_fill(mask, torch.nan)
    start = filled(incomplete, mean_pixels(data.train_images))
    figure = new_figure(5.6 * len(models), 4)
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, (name, model) in zip(panels, models.items(), strict=True):
        noise = generator(seed, "imputation", "one image")
        reconstructions = means_at_draws(model, original, RECONSTRUCTIONS, noise)[:, 0]
        draws = filled(incomplete, means_at_draws(model, start, DRAWS, noise)[:, 0])
        first = torch.cat([coloured(original), coloured(original, mask)])
        rest = coloured(torch.cat([reconstructions, draws]))
        blank = torch.ones_like(rest[: PER_ROW - len(first)])
        show(axes, mosaic(torch.cat([first, blank, rest]), columns=PER_ROW))
        axes.set_title(name)
        labels = ["original, masked", "reconstructions", "imputed:", "a draw", "each"]
        label_rows(axes, labels, height=original.shape[2])
    return figure


def coloured(images: Tensor, mask: Tensor | None = None) -> Tensor:
    """Images [N, C, H, W] with three channels, and what the mask covers in a colour."""
    in_colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    if mask is None:
        return in_colour
    colour = torch.tensor(MISSING_COLOUR, device=images.device).view(3, 1, 1)
    return torch.where(mask, colour, in_colour)
