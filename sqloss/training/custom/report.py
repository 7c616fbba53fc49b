"""What a user's own models have come to: their test losses, by class where there are classes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import sqloss
from sqloss.training.config import RunConfig
from sqloss.training.errors import UserError, require
from sqloss.training.figures import edges, new_figure, save_picture, style
from sqloss.training.files import write_atomically, write_json
from sqloss.training.flags import flat
from sqloss.training.tables import aligned
from sqloss.training.trainer import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sqloss.training.custom.trainer import CustomTraining


def make_report(training: "CustomTraining", config: RunConfig) -> Report:
    models: dict[str, Any] = {}
    for name in training.models:
        row = next((r for r in reversed(training.history) if r["model"] == name), {})
        models[name] = {"metrics": {k: v for k, v in row.items() if k not in ("epoch", "model")}}
        if training.own.test is not None:
            losses, labels = training.test_losses(name)
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


def write(directory: Path, report: Report, training: "CustomTraining") -> list[Path]:
    """Write the report, and its pictures where matplotlib is there; these are returned."""
    pictures = draw(directory, training)
    shown = "".join(f"\n![{path.stem}]({path.name})" for path in pictures)
    trained = "; ".join(f"`{name}` on the {words}" for name, words in report["risks"].items())
    text = f"# Training\n\nTrained side by side: {trained}.\n\n{tables(report)}\n{shown}\n"
    write_atomically(directory / "report.md", text.encode())
    write_json(directory / "report.json", report)  # the last file: it tells that all is there
    return pictures


def tables(report: Report) -> str:
    """The numbers of a report, as Markdown that a terminal shows well too."""
    parts = [list(loss_table(report))]
    if all("test_by_class" in model for model in report["models"].values()):
        parts.append(list(class_table(report)))
    return "\n\n".join("\n".join(aligned(part)) for part in parts)


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


def draw(directory: Path, training: "CustomTraining") -> list[Path]:
    try:
        require("matplotlib.figure")
    except UserError:  # pictures are a convenience
        return []
    figures = {"loss_curves.png": loss_curves(training)}
    if training.own.test is not None:
        figures["loss_distribution.png"] = loss_distribution(training)
    for name, figure in figures.items():
        save_picture(directory / name, figure)
    return [directory / name for name in figures]


def loss_curves(training: "CustomTraining") -> "Figure":
    metrics = [column for column in training.columns if column not in ("epoch", "model")]
    figure = new_figure(4.5 * len(metrics), 3.6)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for name in training.models:
            rows = [row for row in training.history if row["model"] == name]
            curve = [row["epoch"] for row in rows], [row[metric] for row in rows]
            axes.plot(*curve, label=name, **style(name, training.models))
        axes.set(xlabel="epoch", title=metric.replace("_", " "))
        axes.locator_params("x", integer=True)
        axes.legend()
    return figure


def loss_distribution(training: "CustomTraining") -> "Figure":
    figure = new_figure(9, 3.6)
    axes = figure.subplots()
    losses = {name: training.test_losses(name)[0]["loss"] for name in training.models}
    together = torch.cat(list(losses.values()))
    bins = edges(together.min().item(), together.max().item())
    for name, values in losses.items():
        axes.hist(values.tolist(), bins, histtype="step", label=name, **style(name, losses))
    axes.set(xlabel="test loss", ylabel="samples")
    axes.legend()
    return figure
