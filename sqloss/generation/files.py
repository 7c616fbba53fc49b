"""The files of ``sqloss sample``."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sqloss.common.errors import require
from sqloss.common.files import write_atomically, write_json
from sqloss.datasets import Dataset
from sqloss.generation.measures import Samples, tables
from sqloss.models import VAE
from sqloss.models.mixture import Mixture
from sqloss.models.pixels import pixels
from sqloss.models.seeding import generator
from sqloss.student_t import draw_seed
from sqloss.training.figures import label_rows, mosaic, new_figure, save_picture, show
from sqloss.training.progress import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 8  # images of a row and of a column of the grid
COLUMNS = 10  # of each kind in the picture of the communities
MOST_ROWS = 60  # in it: the smallest communities


def write_samples(directory: Path, samples: Samples, report: dict[str, Any]) -> None:
    """The grid, all images with what is known of each, and the report."""
    save_picture(directory / "samples.png", grid(samples.images))
    content = io.BytesIO()
    require("numpy").savez_compressed(
        content,
        images=samples.images.numpy(),
        classes=samples.classes.numpy(),
        probabilities=samples.probabilities.numpy(),
        **{name: values.numpy() for name, values in samples.made_of.items()},
    )
    write_atomically(directory / "samples.npz", content.getbuffer())
    write_atomically(directory / "samples.md", (tables(report) + "\n").encode())
    write_json(directory / "samples.json", report)


def write_images(directory: Path, images: Tensor) -> None:
    """One PNG per image, named by its number."""
    image_of = require("PIL.Image").fromarray
    digits = len(str(len(images) - 1))
    for number, image in enumerate(images):
        content = io.BytesIO()
        # Grey ones have two dimensions for Pillow
        image_of(image.permute(1, 2, 0).squeeze(2).numpy()).save(content, "PNG")
        (directory / f"{number:0{digits}}.png").write_bytes(content.getbuffer())


def grid(images: Tensor) -> "Figure":
    """The first images, row by row."""
    shown = pixels(images[: SIDE * SIDE])
    missing = -len(shown) % SIDE
    shown = torch.cat([shown, shown.new_ones(missing, *shown.shape[1:])])
    figure = new_figure(5, 0.6 + 5 * len(shown) / SIDE**2)
    axes = figure.subplots()
    show(axes, mosaic(shown, columns=SIDE))
    return figure


@torch.no_grad()
def draw_communities(
    model: VAE,
    mixture: Mixture,
    groups: Tensor,
    data: Dataset,
    temperature: float,
    seed: int,
) -> "Figure":
    """A row per component: random training images of it, and samples from it alone."""
    draws = generator(seed, "communities")
    numbers = mixture.sizes.argsort(stable=True)[:MOST_ROWS].sort().values.tolist()
    rows = torch.tensor(numbers).repeat_interleave(COLUMNS)
    z = mixture.draws(rows, draw_seed(generator=draws), temperature)
    like = next(model.decoder.parameters())
    made = model.decode(z.to(like)).sigmoid().cpu()
    shown = []
    for number in numbers:
        members = (groups == number).nonzero()[:, 0]
        chosen = members[torch.randperm(len(members), generator=draws)[:COLUMNS]]
        images = pixels(data.train_images[chosen.to(data.train_images.device)]).cpu()
        blank = images.new_ones(COLUMNS - len(images), *data.shape)
        shown.append(torch.cat([images, blank]))
    figure = new_figure(9, 0.8 + 0.42 * len(numbers))
    columns = {"training images": torch.cat(shown), "samples": made}
    for axes, (title, images) in zip(figure.subplots(1, 2), columns.items(), strict=True):
        show(axes, mosaic(images, columns=COLUMNS))
        axes.set_title(title)
    sizes = (groups == torch.arange(len(mixture))[:, None]).sum(1).tolist()
    labels = [
        f"{number}: {counted(sizes[number], 'image')}, {mixture.weights[number]:.1%}"
        for number in numbers
    ]
    label_rows(figure.axes[0], labels, height=data.shape[1])
    return figure
