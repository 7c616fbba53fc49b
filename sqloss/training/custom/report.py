"""What a user's own models have come to: their test losses, by class where there are classes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

import sqloss
from sqloss.common.errors import UserError, require
from sqloss.common.files import write_report
from sqloss.common.flags import flat
from sqloss.common.tables import table
from sqloss.training.config import RunConfig
from sqloss.training.figures import draw_curves, edges, new_figure, save_picture, style
from sqloss.training.trainer import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sqloss.training.custom.trainer import CustomTraining


# By model: the test losses by name, and the classes of the samples if they have any.
Tested = Mapping[str, tuple[Mapping[str, Tensor], Tensor | None]]


def make_report(training: "CustomTraining", tested: Tested, config: RunConfig) -> Report:
    models: dict[str, Any] = {}
    for row in training.latest_rows():
        name = row["model"]
        models[name] = {"metrics": {k: v for k, v in row.items() if k not in ("epoch", "model")}}
        if name in tested:
            losses, labels = tested[name]
            models[name]["test"] = {"samples": len(losses["loss"])} | summary(losses, config)
            if labels is not None:
                models[name]["test_by_class"] = by_class(losses, labels, config)
    return {
        "config": flat(config),
        "alpha_of_cvar": config.metric_alpha,
        "risks": {name: risk.words for name, risk in config.risks.items()},
        "models": models,
    }


def summary(losses: Mapping[str, Tensor], config: RunConfig) -> dict[str, float]:
    """The mean of each loss, and the tail of what is minimised."""
    means = {name: values.mean().item() for name, values in losses.items()}
    return means | {"loss_cvar": sqloss.cvar(losses["loss"], config.metric_alpha).item()}


def by_class(
    losses: Mapping[str, Tensor], labels: Tensor, config: RunConfig
) -> list[dict[str, Any]]:
    return [
        {"class": label, "samples": int((labels == label).sum())}
        | summary({name: values[labels == label] for name, values in losses.items()}, config)
        for label in labels.unique().tolist()
    ]


def write(
    directory: Path, report: Report, training: "CustomTraining", tested: Tested
) -> list[Path]:
    """Write the report, and its pictures where matplotlib is there; these are returned."""
    pictures = draw(directory, training, tested)
    shown = "".join(f"\n![{path.stem}]({path.name})" for path in pictures)
    trained = "; ".join(f"`{name}` on the {words}" for name, words in report["risks"].items())
    text = f"# Training\n\nTrained side by side: {trained}.\n\n{tables(report)}\n{shown}\n"
    write_report(directory, text, report)
    return pictures


def tables(report: Report) -> str:
    """The numbers of a report, as Markdown that a terminal shows well too."""
    parts = [loss_table(report)]
    if all("test_by_class" in model for model in report["models"].values()):
        parts.append(class_table(report))
    return "\n\n".join(map(table, parts))


def loss_table(report: Report) -> Iterator[list[str]]:
    models = report["models"].values()
    yield ["", *report["models"]]
    for part in ("metrics", "test"):
        for name in next(iter(models)).get(part, {}):
            if part == "test" or not name.startswith("test_"):
                yield [f"{part}: {name}", *(f"{model[part][name]:.5g}" for model in models)]


def class_table(report: Report) -> Iterator[list[str]]:
    models = report["models"]
    yield ["class", "test", *(f"{of} {m}" for of in ("mean", "CVaR") for m in models)]
    for rows in zip(*(model["test_by_class"] for model in models.values()), strict=True):
        numbers = [f"{row[of]:.5g}" for of in ("loss", "loss_cvar") for row in rows]
        yield [str(rows[0]["class"]), str(rows[0]["samples"]), *numbers]


def draw(directory: Path, training: "CustomTraining", tested: Tested) -> list[Path]:
    try:
        require("matplotlib.figure")
    except UserError:  # pictures are a convenience
        return []
    figures = {"loss_curves.png": loss_curves(training)}
    if tested:
        figures["loss_distribution.png"] = loss_distribution(tested)
    for name, figure in figures.items():
        save_picture(directory / name, figure)
    return [directory / name for name in figures]


def loss_curves(training: "CustomTraining") -> "Figure":
    metrics = [column for column in training.columns if column not in ("epoch", "model")]
    figure = new_figure(4.5 * len(metrics), 3.6)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        draw_curves(axes, training.history, metric)
        axes.set_title(metric.replace("_", " "))
        axes.legend()
    return figure


def loss_distribution(tested: Tested) -> "Figure":
    figure = new_figure(9, 3.6)
    axes = figure.subplots()
    losses = {name: by_name["loss"] for name, (by_name, _) in tested.items()}
    bins = edges(losses.values())
    for name, values in losses.items():
        axes.hist(values.tolist(), bins, histtype="step", label=name, **style(name, losses))
    axes.set(xlabel="test loss", ylabel="samples")
    axes.legend()
    return figure
