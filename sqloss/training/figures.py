"""Parts of pictures: figures, styles, mosaics.

Figures are made without pyplot: no global state, no display needed.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sqloss.common.errors import require
from sqloss.common.files import write_atomically
from sqloss.common.text import printable
from sqloss.training.config import STANDARD

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
# Okabe and Ito's palette, told apart with any colour vision; the line styles differ too.
STANDARD_STYLE = {"color": "#0072B2", "linestyle": "-"}
STYLES = (
    {"color": "#D55E00", "linestyle": "--"},
    {"color": "#009E73", "linestyle": "-."},
    {"color": "#CC79A7", "linestyle": ":"},
)
BINS = 40


def edges(losses: Iterable[Tensor]) -> list[float]:
    """The edges of BINS bins from the lowest to the highest of all losses, both included."""
    lowest, highest = (end.item() for end in torch.cat(list(losses)).double().aminmax())
    inner = torch.linspace(lowest, highest, BINS + 1, dtype=torch.float64)[1:-1]
    return [lowest, *inner.tolist(), highest]  # rounding would leave the extremes outside


def style(name: str, names: Iterable[str]) -> dict[str, Any]:
    """The line style of a model, by its place among these names."""
    if name == STANDARD:
        return STANDARD_STYLE
    others = [other for other in dict.fromkeys(names) if other != STANDARD]
    return STYLES[others.index(name) % len(STYLES)]


def draw_curves(axes: "Axes", history: Sequence[Mapping[str, Any]], metric: str) -> None:
    """A metric of every model over the epochs."""
    names = list(dict.fromkeys(row["model"] for row in history))
    for name in names:
        rows = [row for row in history if row["model"] == name]
        curve = [row["epoch"] for row in rows], [row[metric] for row in rows]
        axes.plot(*curve, label=name, **style(name, names))
    axes.set_xlabel("epoch")
    axes.locator_params("x", integer=True)


def save_picture(path: Path, figure: "Figure") -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI, bbox_inches="tight")
    write_atomically(path, picture.getbuffer())


def new_figure(width: float, height: float) -> "Figure":
    figure: Figure = require("matplotlib.figure").Figure((width, height))
    figure.set_layout_engine("constrained", wspace=0.06)
    return figure


def mosaic(images: Tensor, columns: int) -> Tensor:
    """Images [N, C, H, W] row by row, a white line between them: [rows, columns, C]."""
    bordered = torch.nn.functional.pad(images, (0, 1, 0, 1), value=1.0)
    channels, height, width = bordered.shape[1:]
    grid = bordered.reshape(-1, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    return grid.reshape(-1, columns * width, channels)[:-1, :-1]


def label_rows(axes: "Axes", labels: Sequence[str], height: int) -> None:
    """Name the rows of a mosaic of images of this height; a name may hold anything."""
    middles = [(height + 1) * i + (height - 1) / 2 for i in range(len(labels))]
    lines = ["\n".join(map(printable, label.split("\n"))) for label in labels]
    axes.set_yticks(middles, lines, parse_math=False, usetex=False)


def show(axes: "Axes", image: Tensor) -> None:
    axes.imshow(image.cpu().numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.tick_params(length=0)
    axes.set(xticks=[], yticks=[], frame_on=False)
