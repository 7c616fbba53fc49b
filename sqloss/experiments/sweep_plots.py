"""The picture of a sweep: what every arm generates."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from sqloss.training.figures import label_rows, mosaic, new_figure, save_picture, show


class Panel(NamedTuple):
    """The images [N, C, H, W] of one model, and what to call them."""

    label: str
    images: Tensor


def draw_panels(path: Path, panels: list[Panel], title: str) -> None:
    """A row of images per panel."""
    figure = new_figure(9, 0.5 + 0.62 * len(panels))
    for axes, panel in zip(
        figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True
    ):
        show(axes, mosaic(panel.images, columns=len(panel.images)))
        label_rows(axes, [panel.label], height=panel.images.shape[2])
    figure.suptitle(title)
    save_picture(path, figure)
