"""``sqloss gan``."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Generator, Tensor

from sqloss.common.files import write_report
from sqloss.datasets import Dataset
from sqloss.training import sampling_report
from sqloss.training.gan import loop, plots, report
from sqloss.training.gan.config import GANConfig
from sqloss.training.gan.generation import first_samples, generate_many
from sqloss.training.gan.metrics import require_fid
from sqloss.training.image_trainer import ACCURACY, RARE_SHARE, ImageTrainer, data_settings
from sqloss.training.progress import counted
from sqloss.training.run import Run
from sqloss.training.run_directory import restore
from sqloss.training.shares import classifier_of, kept_classifier
from sqloss.training.threads import set_threads
from sqloss.training.trainer import TRAINERS, Drawn, Latents, Metric, Preset, Report, Settings


def quality(metric: str) -> Callable[[Report, Report], float | None]:
    return lambda _, model: model["quality"][metric]


def label_agreement(_: Report, model: Report) -> float | None:
    agreeing = model.get("label_agreement")
    return agreeing["share"] if agreeing else None


def failed_epochs(_: Report, model: Report) -> float:
    """In how many epochs something was wrong with the model."""
    return len(set(itertools.chain.from_iterable(model["failures"].values())))


class GANTrainer(ImageTrainer[GANConfig, loop.GANTraining]):
    """GANs, whose players each have a loss per image."""

    name = "gan"
    about = (
        "Train GANs on the mean and on the tail of their losses, side by side, and report on them."
    )
    config = GANConfig
    has_samples = True
    priors = ("standard",)
    modules = (*ImageTrainer.modules, "sklearn.neighbors", "torchmetrics")
    smaller = (
        "a smaller --batch-size, --width, --latent, --image-size, --train-limit or --num-samples"
    )
    metrics: ClassVar = {
        "cfid": Metric("cFID", 2, "lower", quality("cfid")),
        "cfid_of_real": Metric("cFID of real", 2, "", lambda report, _: report["real"]["cfid"]),
        "ckid": Metric("cKID", 5, "lower", quality("ckid")),
        "precision": Metric("precision", 4, "higher", quality("precision")),
        "recall": Metric("recall", 4, "higher", quality("recall")),
        "label_entropy": Metric("label entropy", 3, "higher", quality("label_entropy")),
        "modes": Metric("modes", 1, "higher", quality("modes")),
        "rare_share": RARE_SHARE,
        "label_agreement": Metric("of the class asked for", 4, "higher", label_agreement),
        "fid": Metric("FID", 2, "lower", lambda _, model: model.get("fid")),
        "d_auc": Metric("AUC of D", 4, "", lambda _, model: model["losses"]["d_auc"]),
        "failed_epochs": Metric("epochs of failure", 1, "lower", failed_epochs),
        "classifier_test_accuracy": ACCURACY,
    }
    main_metrics = (
        *("cfid", "fid", "precision", "recall", "label_entropy", "modes", "rare_share"),
        "label_agreement",
    )
    presets: ClassVar = {
        "gan-schemes": Preset(
            {"alpha": 0.0, "imbalance": "none"},
            {
                "baseline": {},
                "lower-lr-g": {"lr_g": 1e-4},
                "lower-both": {"lr_d": 1e-4, "lr_g": 1e-4},
                "two-g-steps": {"g_steps": 2},
                "two-d-steps": {"d_steps": 2},
                "beta1-0": {"beta1": 0.0},
                "conditional": {"conditional": True},
            },
        ),
        "gan-tails": Preset(
            {},
            {
                "standard": {"alpha": 0.0},
                "oversampling": {"alpha": 0.0, "sampling": "balanced"},
                **{
                    f"tail-of-{players}-{alpha:g}": {
                        "tail_player": players,
                        "alpha": alpha,
                        "no_baseline": True,
                    }
                    for players in ("d", "g", "both")
                    for alpha in (0.2, 0.5, 0.8)
                },
            },
        ),
    }
    # Images that one classifier has not judged, or that are not held against the same test images,
    # have no distances to compare.
    not_swept = (
        *("seed", "num_samples", "classifier", "fid_weights"),
        *sorted(data_settings()),
    )

    def check(self, config: GANConfig) -> None:
        super().check(config)
        if config.fid_weights_file:
            require_fid(config.fid_weights_file)

    def check_data(self, whole: Dataset, config: GANConfig) -> None:
        report.check_data(whole, config)

    def begin(self, config: GANConfig, data: Dataset) -> loop.GANTraining:
        return loop.begin(config, data)

    def report(self, run: Run[GANConfig]) -> Report:
        training, data, config, directory = run.training, run.data, run.config, run.directory
        device, path = config.torch_device, config.classifier_file
        classifier = (
            kept_classifier(path, run.whole, device, config.seed)
            if path
            else classifier_of(run.whole, device, config.seed)
        )
        generators, history = training.generators, training.history
        made = report.make_report(generators, history, classifier, run.whole, data, config)
        made |= sampling_report.section(training, data, data.class_names)
        plots.draw_pictures(directory, training.models, generators, history, data, config)
        write_report(directory, report.as_markdown(made), made)
        return made

    def tables(self, report_: Report) -> str:
        return report.tables(report_)

    def shared_settings(self, directory: Path, settings: Settings) -> Settings:
        """One classifier judges all runs."""
        if settings["classifier"]:
            return {}
        return {"classifier": str(directory.absolute() / "classifier.pt")}

    def prepare(self, config: GANConfig, whole: Dataset, seed: int) -> None:
        set_threads(config, whole)
        if config.classifier_file:
            kept_classifier(config.classifier_file, whole, config.torch_device, seed)

    def samples(self, config: GANConfig, whole: Dataset, directory: Path) -> Mapping[str, Tensor]:
        data = self.training_data(whole, config)
        training = loop.begin(config, data)
        if not restore(training, directory, data.fingerprint(), "--output-dir"):
            return {}
        return first_samples(training.generators, config.seed)

    def draw(
        self,
        training: loop.GANTraining,
        name: str,
        count: int,
        draws: Generator,
        latents: Latents,
    ) -> Iterator[Drawn]:
        model = training.generators[name]
        for images, noise in generate_many(model, count, draws, latents.temperature):
            yield Drawn(images, {} if noise.labels is None else {"label": noise.labels})

    def warning(self, row: Mapping[str, Any]) -> str:
        epochs = row.get("failed_epochs")
        return f"something was wrong in {counted(epochs, 'epoch')}" if epochs else ""

    def caption(self, row: Mapping[str, Any]) -> str:
        """How much of the data the model covers."""
        entropy, cfid = f"{row['label_entropy']:.2f}", f"{row['cfid']:.1f}"
        return f"{row['modes']} modes, entropy {entropy}, cFID {cfid}"


GAN = TRAINERS.register(GANTrainer())
