"""What classes generated images show, and which components of a prior they are from."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sqloss.common.tables import table
from sqloss.common.text import in_markdown
from sqloss.models.classifier import Classifier
from sqloss.models.mixture import Mixture
from sqloss.training.progress import counted
from sqloss.training.shares import share, shares_of, with_interval
from sqloss.training.trainer import Drawn

CONFIDENT = 0.8  # the least probability of a class that a confident classifier gives


@dataclass(frozen=True)
class Samples:
    """Generated images and what a classifier sees in them, on the CPU."""

    images: Tensor  # uint8 [N, C, H, W]
    made_of: dict[str, Tensor]  # int64 [N] each
    classes: Tensor  # the likeliest class, int64 [N]
    probabilities: Tensor  # of that, [N]

    @classmethod
    def of(cls, drawn: Iterable[Drawn], classifier: Classifier) -> "Samples":
        """Those of batches of pixels, which are never all in memory as floats."""
        images, made_of, probabilities, classes = [], [], [], []
        for batch in drawn:
            _, seen = classifier.see(batch.images)
            most = seen.max(1)
            images.append((255 * batch.images).round().to(torch.uint8).cpu())
            made_of.append(batch.made_of)
            probabilities.append(most.values.cpu())
            classes.append(most.indices.cpu())
        return cls(
            torch.cat(images),
            {name: torch.cat([each[name] for each in made_of]).cpu() for name in made_of[0]},
            torch.cat(classes),
            torch.cat(probabilities),
        )

    @property
    def are_clear(self) -> Tensor:
        """Those that the classifier is confident of, bool [N]."""
        return self.probabilities >= CONFIDENT


def measure(samples: Samples, classes: int, mixture: Mixture | None) -> dict[str, Any]:
    """The shares of the classes among all samples and among the clear ones, and the components."""
    clear = samples.are_clear
    measured: dict[str, Any] = {
        "generated": shares_of(samples.classes, classes),
        "clear": share(int(clear.sum()), len(clear)),
        "generated_clear": shares_of(samples.classes[clear], classes) if clear.any() else None,
    }
    if mixture is not None:
        measured["effective_share"] = mixture.effective_share
        measured["component_df"] = mixture.df.item() if mixture.df.isfinite() else None
        measured["by_component"] = [
            {"size": size, "weight": weight, "drawn": int(chosen.sum())}
            | seen_as(samples.classes[chosen])
            for number, (size, weight) in enumerate(
                zip(mixture.sizes.tolist(), mixture.weights.tolist(), strict=True)
            )
            for chosen in [samples.made_of["component"] == number]
        ]
    return measured


def seen_as(classes: Tensor) -> dict[str, Any]:
    """The commonest class of some samples, and its share."""
    if not len(classes):
        return {"class": None, "class_share": None}
    counts = torch.bincount(classes)
    return {"class": int(counts.argmax()), "class_share": counts.max().item() / len(classes)}


def tables(report: dict[str, Any]) -> str:
    """The numbers of a report on samples, as Markdown that a terminal shows well too."""
    parts = [table(class_table(report))]
    if "by_component" in report:
        parts += [table(component_table(report)), weights_note(report)]
    return "\n\n".join(parts)


def class_table(report: dict[str, Any]) -> Iterator[list[str]]:
    clear, total = report["clear"], sum(report["train_images"])
    yield [
        *("share of class", "in training", f"of {counted(report['count'], 'sample')}"),
        f"of the {clear['count']} clear ones",
    ]
    clear_shares = report["generated_clear"] or [None] * len(report["class_names"])
    for name, count, every, of_clear in zip(
        *(report["class_names"], report["train_images"], report["generated"], clear_shares),
        strict=True,
    ):
        yield [
            in_markdown(name),
            f"{count / total:.2%}",
            with_interval(every),
            with_interval(of_clear) if of_clear else "-",
        ]
    yield [f"clear (probability {CONFIDENT:g} or more)", "", with_interval(clear), ""]


def component_table(report: dict[str, Any]) -> Iterator[list[str]]:
    yield ["component", "training images", "weight", "samples", "most look like"]
    names = report["class_names"]
    for number, each in enumerate(report["by_component"]):
        look = "-"
        if each["drawn"]:
            look = f"{in_markdown(names[each['class']])} ({each['class_share']:.0%})"
        drawn = [f"{each['size']:.0f}", f"{each['weight']:.2%}", str(each["drawn"]), look]
        yield [str(number), *drawn]


def weights_note(report: dict[str, Any]) -> str:
    kind = "normal" if report["component_df"] is None else f"t with df {report['component_df']:.3g}"
    most = max(each["weight"] for each in report["by_component"])
    return (
        f"The components are {kind}; the heaviest weighs {most:.1%}. By these weights the "
        f"effective sample size is {report['effective_share']:.0%} of the training images."
    )
