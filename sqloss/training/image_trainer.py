"""The base of trainers on images with classes."""

from typing import Any, TypeVar

from sqloss.common import ranks
from sqloss.common.flags import settings_of
from sqloss.datasets import DATASETS, Dataset, Place
from sqloss.datasets.imbalance import in_text, thinned
from sqloss.training.config import ImageConfig
from sqloss.training.loop import Training
from sqloss.training.trainer import Metric, Report, Trainer

Config = TypeVar("Config", bound=ImageConfig)
State = TypeVar("State", bound=Training)


def rare_share(report: Report, model: Report) -> float | None:
    """The shares of the generated images that show what is rare in training, added up."""
    attributes = report.get("attributes", {"names": [], "parts": []})
    rare = thinned(report["config"]["imbalance"], report["class_names"], attributes["names"])
    shares = [
        model["generated"][part]
        if isinstance(part, int)
        else model["attributes"][attributes["parts"].index(in_text(part))]
        for part in rare
    ]
    return sum(each["share"] for each in shares) if shares else None


RARE_SHARE = Metric("share of rare classes", 4, "higher", rare_share)
ACCURACY = Metric(
    "classifier's accuracy", 4, "", lambda report, _: report["classifier_test_accuracy"]
)


def data_settings() -> set[str]:
    """The settings that choose the data: of all data sets, and those that each has of its own."""
    kinds: list[type] = [Place, *DATASETS.values()]
    return {"dataset"}.union(*map(settings_of, kinds))


class ImageTrainer(Trainer[Config, State]):
    """A trainer on a registered data set, with classes made rare by ``--imbalance``."""

    reporting = "now a small classifier judges, for the report"

    def load(self, config: Config) -> Dataset:
        """By one rank after the other where the data are to be fetched."""

        def of_config() -> Dataset:
            return config.dataset.read(config)

        return ranks.in_turns(of_config) if config.download else of_config()

    def data_settings(self) -> set[str]:
        return data_settings()

    def training_data(self, whole: Dataset, config: Config) -> Dataset:
        return whole.imbalanced(config.imbalance, config.seed).to(config.torch_device)

    def describe(self, whole: Dataset, data: Dataset) -> str:
        return data.in_words(whole)

    def closing_words(self, report: Report) -> list[str]:
        accuracy: Any = report["classifier_test_accuracy"]
        return [f"the classifier gets {accuracy:.1%} of the test images right"]
