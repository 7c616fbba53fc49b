"""Priors compared at imputation: a sweep that measures how well the missing pixels are filled in.

With one seed, all arms start from the same weights, see the same batches and the same missing
pixels. The baselines are an arm that trains nothing.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sqloss.common.errors import UserError
from sqloss.common.files import write_json
from sqloss.common.flags import as_flag, expect_whole, flag
from sqloss.experiments.imputation import (
    NO_MODEL,
    ONE_SHOT,
    PSEUDO_GIBBS,
    ImputeConfig,
    baseline_methods,
    first_test_images,
    make_masks,
    measure,
    vae_methods,
)
from sqloss.experiments.measurement import Control, Judged, Key, Series, first_arm, metrics_of_rows
from sqloss.experiments.sweep import Arms, Flags, Sweep, plan_arms
from sqloss.training.run import Run
from sqloss.training.trainer import Metric, Preset
from sqloss.training.vae.config import VAEConfig
from sqloss.training.vae.evaluation import evaluate, summary

# How priors are compared where nothing else is asked for.
PLAIN: dict[str, Any] = {"alpha": 0.0, "imbalance": "none", "threads": 1}
# What the arms set themselves, and what is of the report alone.
NOT_COMPARED = ("prior", "df", "learn_df", "num_samples")
ELBO = "test_negative_elbo"


@dataclass(frozen=True)
class CompareConfig:
    """Which arms are compared, valid by construction."""

    dfs: str = flag("3,5,21", "df of the t priors to compare, or none", metavar="DF,...")
    betas: str = flag(
        "0.5,2", "weights of the KL of the normal controls, or none", metavar="BETA,..."
    )
    seeds: int = flag(8, "seeds to train every arm with, from --seed on", metavar="N")
    jobs: int = flag(1, "processes that train at the same time", metavar="N")

    def __post_init__(self) -> None:
        expect_whole(self, 2, "seeds")
        expect_whole(self, 1, "jobs")
        parse_numbers("dfs", self.dfs)
        parse_numbers("betas", self.betas)

    @property
    def arms(self) -> Arms:
        """The control, Student-t priors of each df, the control with other weights of the KL, and
        the baselines.

        A t prior pulls less than the normal one does; those weights tell whether that is all.
        """
        normal: Flags = {"prior": "normal"}
        return {
            "normal": normal,
            **{f"t, df {df:g}": {"prior": "t", "df": df} for df in parse_numbers("dfs", self.dfs)},
            **{
                f"normal, beta {beta:g}": {**normal, "beta": beta}
                for beta in parse_numbers("betas", self.betas)
            },
            NO_MODEL: normal,
        }


def parse_numbers(name: str, text: str) -> tuple[float, ...]:
    """The numbers that a flag names: "0.5,2" is (0.5, 2), "none" is ()."""
    try:
        return () if text == "none" else tuple(map(float, text.split(",")))
    except ValueError as error:
        raise UserError(
            f"{as_flag(name)}: expected 'none' or numbers such as 3 or 0.5,2, got {text!r}"
        ) from error


def plan_comparison(
    compare_config: CompareConfig,
    impute_config: ImputeConfig,
    output_dir: Path | None,
    given: Flags,
) -> Sweep:
    """The sweep that flags ask for; ``given`` are those of the training."""
    return plan_arms(
        Imputation("vae", impute_config),
        Preset(PLAIN, compare_config.arms),
        compare_config.seeds,
        given,
        output_dir,
        name="impute",
        origin="--compare",
    )


def one_shot(key: Key, series: Series) -> Key | None:
    """Pseudo-Gibbs imputation is compared with one-shot imputation by the same models."""
    if PSEUDO_GIBBS not in key.rest:
        return None
    return key._replace(rest=(ONE_SHOT, *key.rest[1:]))


@dataclass(frozen=True)
class Imputation(Judged):
    """How well a run's VAEs, or the baselines, impute test images, by method and mask."""

    impute_config: ImputeConfig
    title: ClassVar[str] = "Priors compared at imputation"
    file: ClassVar[str] = "impute.json"
    parts: ClassVar[tuple[str, ...]] = ("model", "method", "mask")
    across: ClassVar[str] = "mask"
    untrained: ClassVar[tuple[str, ...]] = (NO_MODEL,)
    controls: ClassVar[Mapping[str, Control]] = {"": first_arm, ONE_SHOT: one_shot}
    metrics: ClassVar[Mapping[str, Metric]] = metrics_of_rows(
        (ELBO, "-ELBO", 2, "lower"),
        ("missing", "missing", 4, ""),
        ("rmse", "RMSE", 4, "lower"),
        ("mae", "MAE", 4, "lower"),
        ("ssim", "SSIM", 4, "higher"),
        ("accuracy", "Accuracy", 4, "higher"),
        ("accuracy_of_originals", "Accuracy of originals", 4, ""),
    )
    main_metrics: ClassVar[tuple[str, ...]] = ("rmse", "mae", "ssim", "accuracy", ELBO)
    how_to_read: ClassVar[str] = (
        "RMSE and\nMAE are over the missing pixels, SSIM is of whole images, and accuracy is the "
        "share of images whose\nclass one classifier gets right. The -ELBO is that of the same "
        "test images, with weight 1 whatever\nthe beta of the training."
    )

    @property
    def settings(self) -> Mapping[str, Any]:
        return dataclasses.asdict(self.impute_config)

    def parts_of(self, metric: str) -> tuple[str, ...]:
        return ("model",) if metric == ELBO else self.parts

    def measure(self, run: Run[VAEConfig], is_trained: bool) -> None:
        config, seed, models = run.config, run.config.seed, run.training.models
        data = first_test_images(run.data, self.impute_config.test_images)
        elbos = {}
        if is_trained:
            for name, model in models.items():
                losses = evaluate(model, data, seed, config.iwae_samples)
                elbos[name] = summary(losses, config.metric_alpha)["negative_elbo"]
            methods = vae_methods(models, data.train_images, self.impute_config, seed)
        else:
            methods = baseline_methods(data.train_images, self.impute_config, seed)
        classifier = self.classifier(run.directory.parents[1], config, run.whole)
        masks = make_masks(data.test_images, self.impute_config, seed)
        rows, _ = measure(methods, data.test_images, data.test_labels, masks, classifier)
        told = [{**row, ELBO: elbos.get(row["model"])} for row in rows]
        write_json(run.directory / self.file, {"rows": told})
