"""The base of trainers on images with classes."""

from typing import Any, TypeVar

from sqloss.training import ranks
from sqloss.training.config import ImageConfig
from sqloss.training.data import Dataset, load_dataset, thinned
from sqloss.training.loop import Training
from sqloss.training.trainer import Metric, Report, Trainer

Config = TypeVar("Config", bound=ImageConfig)
State = TypeVar("State", bound=Training)


def rare_share(report: Report, model: Report) -> float | None:
    """The share of the generated images that show a class which is rare in training."""
    rare = thinned(report["config"]["imbalance"], report["class_names"])
    return sum(model["generated"][label]["share"] for label in rare) if rare else None


RARE_SHARE = Metric("share of rare classes", 4, "higher", rare_share)
ACCURACY = Metric(
    "classifier's accuracy", 4, "", lambda report, _: report["classifier_test_accuracy"]
)


class ImageTrainer(Trainer[Config, State]):
    """A trainer on a registered data set, with classes made rare by ``--imbalance``."""

    data_settings = (
        *("dataset", "data_dir", "download", "image_size", "train_limit", "celeba_attribute"),
    )

    def load(self, config: Config) -> Dataset:
        """By one rank after the other where the data are to be fetched."""

        def of_config() -> Dataset:
            return load_dataset(config.dataset, config.source)

        return ranks.in_turns(of_config) if config.download else of_config()

    def training_data(self, whole: Dataset, config: Config) -> Dataset:
        return whole.imbalanced(config.imbalance, config.seed).to(config.torch_device)

    def describe(self, whole: Dataset, data: Dataset) -> str:
        return data.in_words(whole)

    def closing_words(self, report: Report) -> list[str]:
        accuracy: Any = report["classifier_test_accuracy"]
        return [f"the classifier gets {accuracy:.1%} of the test images right"]
