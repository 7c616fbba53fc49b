"""A toy trainer, which is registered as any other: it fits a number to the pixels of images."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from sqloss.common import ranks
from sqloss.common.files import write_json
from sqloss.common.flags import flag
from sqloss.common.tables import aligned
from sqloss.models.pixels import pixels
from sqloss.training.config import ImageConfig
from sqloss.training.image_trainer import ImageTrainer
from sqloss.training.loop import Training
from sqloss.training.trainer import TRAINERS, Metric


@dataclass(frozen=True)
class ToyConfig(ImageConfig):
    command: ClassVar[str] = "toy"

    rate: float = flag(0.5, "length of a step")


class Number(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))


class ToyTraining(Training):
    columns = ("epoch", "model", "value")

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.config = config
        self.models = {name: Number() for name in config.risks}

    def train_step(self, batch: Any) -> None:
        images, _ = batch
        mine = pixels(images[ranks.part(len(images))]).flatten(1).mean(1)
        for name, model in self.models.items():
            objective = self.config.risks[name].over_ranks((mine - model.value).square())
            (slope,) = torch.autograd.grad(objective, model.value)
            slope = ranks.summed(slope) / ranks.count()
            model.value.data -= self.config.rate * slope

    def measure(self, data: Any) -> list[dict[str, Any]]:
        return [
            {"epoch": self.epoch, "model": name, "value": model.value.item()}
            for name, model in self.models.items()
        ]

    def describe(self, row: dict[str, Any]) -> str:
        return f"{row['model']} {row['value']:.3f}"

    def sums(self, name: str) -> list[torch.Tensor]:
        return []

    def advice(self) -> str:
        return f"expected a smaller --rate, got {self.config.rate:g}"

    def own_state(self) -> dict[str, Any]:
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        pass


class ToyTrainer(ImageTrainer):
    name = "toy"
    about = "Fit a number."
    config = ToyConfig
    smaller = "a smaller --batch-size"
    metrics: ClassVar = {"value": Metric("value", 3, "lower", lambda _, model: model["value"])}
    main_metrics = ("value",)

    def begin(self, config, data):
        return ToyTraining(config)

    def report(self, run):
        latest = {row["model"]: {"value": row["value"]} for row in run.training.latest_rows()}
        report = {"models": latest}
        (run.directory / "report.md").write_text(self.tables(report))
        write_json(run.directory / "report.json", report)
        return report

    def tables(self, report):
        rows = [[name, f"{model['value']:.3f}"] for name, model in report["models"].items()]
        return "\n".join(aligned([["model", "value"], *rows]))

    def closing_words(self, report):
        return []


TOY = TRAINERS.register(ToyTrainer())
