"""The trainers, and a run of any of them from its configuration to its report."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from sqloss.training import ranks
from sqloss.training.config import Config, RunConfig, as_flag
from sqloss.training.data import Dataset
from sqloss.training.errors import require
from sqloss.training.gan import loop as gan_loop
from sqloss.training.gan import plots as gan_plots
from sqloss.training.gan import report as gan_report
from sqloss.training.gan.config import GANConfig
from sqloss.training.gan.metrics import require_fid
from sqloss.training.loop import Training, fit, steps_per_epoch
from sqloss.training.progress import Progress
from sqloss.training.run import Recorder, Run
from sqloss.training.shares import classifier_of, kept_classifier
from sqloss.training.threads import set_threads
from sqloss.training.vae import loop as vae_loop
from sqloss.training.vae import plots as vae_plots
from sqloss.training.vae import report as vae_report
from sqloss.training.vae.config import VAEConfig
from sqloss.training.vae.evaluation import evaluate

State = TypeVar("State", bound=Training)
Report = dict[str, Any]


@dataclass(frozen=True)
class Trainer(Generic[Config, State]):
    """What a trainer has of its own."""

    config: type[Config]
    begin: Callable[[Config, Dataset], State]
    report: Callable[[State, Dataset, Dataset, Config, Path], Report]
    tables: Callable[[Report], str]


def report_on_vae(
    training: vae_loop.VAETraining,
    whole: Dataset,
    data: Dataset,
    config: VAEConfig,
    directory: Path,
) -> Report:
    """Measure and draw what the training has come to; ``whole`` is the data before the imbalance.

    As every such function it writes the report last: where there is one, there is all.
    """
    models = training.models
    losses = {
        name: evaluate(model, data, config.seed, config.iwae_samples)
        for name, model in models.items()
    }
    report = vae_report.make_report(models, losses, whole, data, config)
    vae_plots.draw_pictures(directory, models, losses, training.history, data, config)
    vae_report.write_report(directory, report)
    return report


def report_on_gan(
    training: gan_loop.GANTraining,
    whole: Dataset,
    data: Dataset,
    config: GANConfig,
    directory: Path,
) -> Report:
    device, path = config.torch_device, config.classifier_file
    classifier = (
        kept_classifier(path, whole, device, config.seed)
        if path
        else classifier_of(whole, device, config.seed)
    )
    generators, history = training.generators, training.history
    report = gan_report.make_report(generators, history, classifier, whole, data, config)
    gan_plots.draw_pictures(directory, training.models, generators, history, data, config)
    gan_report.write_report(directory, report)
    return report


TRAINERS: dict[str, Trainer[Any, Any]] = {
    "vae": Trainer(VAEConfig, vae_loop.begin, report_on_vae, vae_report.tables),
    "gan": Trainer(GANConfig, gan_loop.begin, report_on_gan, gan_report.tables),
}


def require_what_the_report_needs(config: RunConfig) -> None:
    """Fail before the training where the report would fail after it."""
    require("matplotlib.figure")
    require("scipy.stats")
    if isinstance(config, GANConfig):
        require("sklearn.neighbors")
        require("torchmetrics")
        if config.fid_weights_file:
            require_fid(config.fid_weights_file)


def refuse_what_cannot_be_reported(whole: Dataset, config: RunConfig) -> None:
    """As ``require_what_the_report_needs``, of the data."""
    if isinstance(config, GANConfig):
        gan_report.refuse_what_cannot_be_reported(whole, config)


def refuse_differing_ranks(config: RunConfig, data: Dataset) -> None:
    """Raise where a machine has other data or another kind of device, or was told other flags."""
    if ranks.count() > 1:
        of_machine = (*config.paths, "download", "threads")
        flags = {as_flag(k): v for k, v in asdict(config).items() if k not in of_machine}
        flags["--device"] = config.torch_device.type  # where it is auto
        flags["--data-dir"] = f"data with the hash {data.fingerprint()}"
        ranks.refuse_differing(flags)


class RunUnderWay:
    """A run that has its directory, with its training where that has it."""

    def __init__(self, trainer: Trainer[Config, State], run: Run[Config], whole: Dataset) -> None:
        self.trainer = trainer
        self.config = run.config
        self.whole = whole
        ranks.of_first(lambda: refuse_what_cannot_be_reported(whole, run.config))
        self.data = whole.imbalanced(run.config.imbalance, run.config.seed).to(
            run.config.torch_device
        )
        refuse_differing_ranks(run.config, self.data)
        set_threads(run.config, self.data)
        self.training = trainer.begin(run.config, self.data)
        self.recorder: Recorder = run.start(self.training, self.data)

    @property
    def directory(self) -> Path:
        return self.recorder.directory

    def steps(self) -> tuple[int, int]:
        """The steps of the whole training, and those of them done already."""
        per_epoch = steps_per_epoch(self.data, self.config)
        done = per_epoch * self.training.epoch + self.training.step
        return per_epoch * self.config.epochs, done

    def fit(self, progress: Progress) -> bool:
        """Train to the end; False where told to stop, and stopped and saved."""
        with self.recorder, progress:
            return fit(self.training, self.data, self.config, self.recorder.save, progress)

    def report(self) -> Report:
        return self.trainer.report(
            self.training, self.whole, self.data, self.config, self.directory
        )
