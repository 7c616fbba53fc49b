"""``sqloss vae``."""

from collections.abc import Callable
from typing import ClassVar

from sqloss.training import sampling_report
from sqloss.training.datasets import Dataset
from sqloss.training.image_trainer import ACCURACY, RARE_SHARE, ImageTrainer
from sqloss.training.run import Run
from sqloss.training.trainer import TRAINERS, Metric, Preset, Report, product
from sqloss.training.vae import loop, plots, report
from sqloss.training.vae.config import VAEConfig
from sqloss.training.vae.evaluation import evaluate


def test_loss(loss: str) -> Callable[[Report, Report], float | None]:
    return lambda _, model: model["test"][loss]


def worst_class_loss(loss: str) -> Callable[[Report, Report], float | None]:
    return lambda _, model: report.worst_class(model["test_by_class"], loss)[loss]


class VAETrainer(ImageTrainer[VAEConfig, loop.VAETraining]):
    """VAEs, whose loss is the negative ELBO of an image or a bound tighter than that."""

    name = "vae"
    about = "Train VAEs on the mean and on the tail of the loss, side by side, and report on them."
    config = VAEConfig
    smaller = (
        "--microbatch-size, or a smaller --batch-size, --hidden, --channels, --latent, "
        "--iwae-samples, --image-size, --train-limit or --num-samples"
    )
    metrics: ClassVar = {
        "test_negative_elbo": Metric("-ELBO", 2, "lower", test_loss("negative_elbo")),
        "test_negative_elbo_cvar": Metric(
            "its CVaR", 2, "lower", test_loss("negative_elbo_cvar"), of_tail=True
        ),
        "test_reconstruction": Metric("reconstruction", 2, "lower", test_loss("reconstruction")),
        "test_kl": Metric("KL", 2, "", test_loss("kl")),
        "worst_class_negative_elbo": Metric(
            "worst class: -ELBO", 2, "lower", worst_class_loss("negative_elbo")
        ),
        "worst_class_negative_elbo_cvar": Metric(
            *("worst class: CVaR", 2, "lower", worst_class_loss("negative_elbo_cvar")),
            of_tail=True,
        ),
        "rare_share": RARE_SHARE,
        "learnt_df": Metric("learnt df", 2, "", lambda _, model: model.get("df")),
        "classifier_test_accuracy": ACCURACY,
    }
    main_metrics = (
        *("test_negative_elbo", "test_negative_elbo_cvar", "worst_class_negative_elbo"),
        "rare_share",
    )
    presets: ClassVar = {
        "fashion-vae": Preset(
            {"dataset": "fashion", "alpha": 0.0, "imbalance": "none"},
            product({"lr": (2e-4, 5e-4, 1e-3), "batch_size": (64, 128, 256), "epochs": (10, 30)}),
        ),
    }

    def begin(self, config: VAEConfig, data: Dataset) -> loop.VAETraining:
        return loop.begin(config, data)

    def report(self, run: Run[VAEConfig]) -> Report:
        training, data, config, directory = run.training, run.data, run.config, run.directory
        models = training.models
        losses = {
            name: evaluate(model, data, config.seed, config.iwae_samples)
            for name, model in models.items()
        }
        made = report.make_report(models, losses, run.whole, data, config)
        made |= sampling_report.section(training, data, data.class_names)
        plots.draw_pictures(directory, models, losses, training.history, data, config)
        report.write_report(directory, made)
        return made

    def tables(self, report_: Report) -> str:
        return report.tables(report_)


VAE = TRAINERS.register(VAETrainer())
