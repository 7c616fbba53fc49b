"""``sqloss vae``."""

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

from torch import Generator

from sqloss.common.errors import UserError
from sqloss.common.files import expanded, write_report
from sqloss.common.flags import as_flag
from sqloss.datasets import Dataset
from sqloss.models import VAE as VAEModel
from sqloss.student_t import draw_seed
from sqloss.training import sampling_report
from sqloss.training.config import STANDARD
from sqloss.training.image_trainer import ACCURACY, RARE_SHARE, ImageTrainer
from sqloss.training.run import Run
from sqloss.training.saved_run import load_saved_run
from sqloss.training.shares import batch_sizes
from sqloss.training.trainer import (
    TRAINERS,
    Drawn,
    Latents,
    Metric,
    Preset,
    Report,
    Settings,
    product,
)
from sqloss.training.vae import loop, plots, report
from sqloss.training.vae.config import VAEConfig
from sqloss.training.vae.evaluation import evaluate
from sqloss.training.vae.priors import (
    COMMUNITIES,
    PRIORS,
    FittedPrior,
    PriorConfig,
    TrainedModel,
    fitted_prior,
)

# Of all models together, for which the report fits a prior of communities: a few seconds' work
MOST_IMAGES_OF_PRIORS = 10_000

IN_COMMUNITIES: Settings = {"risk": "mean", "sampling": "communities"}
RARE_ARMS: Mapping[str, Settings] = {
    "mean": {"risk": "mean"},
    "balanced": {"risk": "mean", "sampling": "balanced"},
    "communities": {**IN_COMMUNITIES, "min_stability": 0.0},
    "communities, power 1.5": {**IN_COMMUNITIES, "min_stability": 0.0, "sampling_power": 1.5},
    "communities, stable": IN_COMMUNITIES,
    "leverage": {"risk": "mean", "sampling": "leverage"},
    "clusters": {"risk": "mean", "sampling": "clusters"},
    "cvar": {"risk": "cvar", "alpha": 0.5, "no_baseline": True},
}


def test_loss(loss: str) -> Callable[[Report, Report], float | None]:
    return lambda _, model: model["test"][loss]


def worst_class_loss(loss: str) -> Callable[[Report, Report], float | None]:
    return lambda _, model: report.worst_class(model["test_by_class"], loss)[loss]


class VAETrainer(ImageTrainer[VAEConfig, loop.VAETraining]):
    """VAEs, whose loss is the negative ELBO of an image or a bound tighter than that."""

    name = "vae"
    about = "Train VAEs on the mean and on the tail of the loss, side by side, and report on them."
    config = VAEConfig
    modules = (*ImageTrainer.modules, "networkx", "sklearn.neighbors")
    priors = PRIORS
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
        "rare": Preset(
            {"dataset": "mnist", "train_limit": 20_000, "epochs": 20},
            RARE_ARMS,
        ),
        "fashion-vae": Preset(
            {"dataset": "fashion", "alpha": 0.0, "imbalance": "none"},
            product({"lr": (2e-4, 5e-4, 1e-3), "batch_size": (64, 128, 256), "epochs": (10, 30)}),
        ),
    }

    def begin(self, config: VAEConfig, data: Dataset) -> loop.VAETraining:
        return loop.begin(config, data, self._reference(config, data))

    def _reference(self, config: VAEConfig, data: Dataset) -> VAEModel | None:
        """The model that a run's regrets are against: the standard one of another run, or its only
        one."""
        if not config.reference:
            return None
        argument, directory = as_flag("reference"), expanded(config.reference)
        run = load_saved_run(self, directory, {"device": "cpu"}, argument)
        if run.data.shape != data.shape:
            wanted, got = (" x ".join(map(str, each.shape)) for each in (data, run.data))
            raise UserError(f"{argument}: expected a run on images of {wanted}, got {got}")
        only: VAEModel = next(iter(run.models.values()))
        reference: VAEModel = run.models.get(STANDARD, only)
        return reference.to(data.train_images.device).requires_grad_(False)

    def report(self, run: Run[VAEConfig]) -> Report:
        training, data, config, directory = run.training, run.data, run.config, run.directory
        models = training.models
        losses = {
            name: evaluate(model, data, config.seed, config.iwae_samples)
            for name, model in models.items()
        }
        priors = self._priors(run)
        under_priors = {
            name: evaluate(models[name], data, config.seed, prior=prior.mixture)
            for name, prior in priors.items()
        }
        against = training.losses_of_reference(data)
        made = report.make_report(models, losses, run.whole, data, config, under_priors, against)
        for name, prior in priors.items():
            made["models"][name]["communities_prior"]["communities"] = len(prior.mixture)
        made |= sampling_report.section(training, data, data.class_names)
        plots.draw_pictures(directory, models, losses, training.history, data, config)
        write_report(directory, report.as_markdown(made), made)
        return made

    def _priors(self, run: Run[VAEConfig]) -> dict[str, FittedPrior]:
        """A prior of communities for each model, where that takes seconds."""
        models, images, settings = run.training.models, len(run.data), PriorConfig(COMMUNITIES)
        if not settings.neighbours < images <= MOST_IMAGES_OF_PRIORS // len(models):
            return {}
        return {name: fitted_prior(TrainedModel.of(run, name), settings) for name in models}

    def draw(
        self,
        training: loop.VAETraining,
        name: str,
        count: int,
        draws: Generator,
        latents: Latents,
    ) -> Iterator[Drawn]:
        model, (prior, temperature) = training.models[name], latents
        for size in batch_sizes(count):
            seed = draw_seed(generator=draws)
            images = model.sample(size, seed, prior=prior, temperature=temperature)
            yield Drawn(images, {"component": prior.components(size, seed)} if prior else {})

    def tables(self, report_: Report) -> str:
        return report.tables(report_)


VAE = TRAINERS.register(VAETrainer())
