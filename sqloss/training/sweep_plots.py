"""The picture of a sweep over GANs: what every arm generates."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from sqloss.models.seeding import generator as stream
from sqloss.training.data import Dataset
from sqloss.training.gan.config import GANConfig
from sqloss.training.gan.generation import draw_noise, generate
from sqloss.training.gan.loop import begin
from sqloss.training.pictures import label_rows, mosaic, new_figure, save_picture, show
from sqloss.training.run import restore

COLUMNS = 16


class Panel(NamedTuple):
    """The images [COLUMNS, C, H, W] of one model, and what to call them."""

    label: str
    images: Tensor


def generated_by(config: GANConfig, whole: Dataset, directory: Path) -> Mapping[str, Tensor]:
    """Images of every model of a run, of the noise that its seed gives: that of every arm.

    Of a run whose checkpoints have been deleted there are none.
    """
    data = whole.imbalanced(config.imbalance, config.seed).to(config.torch_device)
    training = begin(config, data)
    if not restore(training, directory, data.fingerprint(), "--output-dir"):
        return {}
    return {
        name: generate(model, draw_noise(COLUMNS, model, stream(config.seed, "samples")))
        for name, model in training.generators.items()
    }


def draw_panels(path: Path, panels: list[Panel], title: str) -> None:
    """A row of images per panel."""
    figure = new_figure(9, 0.5 + 0.62 * len(panels))
    for axes, panel in zip(
        figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True
    ):
        show(axes, mosaic(panel.images, columns=COLUMNS))
        label_rows(axes, [panel.label], height=panel.images.shape[2])
    figure.suptitle(title)
    save_picture(path, figure)
