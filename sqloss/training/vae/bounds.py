"""How well the models of a run explain the test images, by bounds as tight as one has time for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sqloss.common.errors import require
from sqloss.common.files import write_json
from sqloss.common.flags import expect_whole, flag
from sqloss.common.tables import CONFIDENCE, nats, table
from sqloss.datasets import Dataset
from sqloss.models import VAE
from sqloss.models.latents import Prior
from sqloss.models.seeding import generator
from sqloss.training.progress import counted
from sqloss.training.saved_run import SavedRun
from sqloss.training.vae.evaluation import importance_weighted, learnt_df

IMAGES_SEED = 0  # not the run's: runs with different seeds are measured on the same images


@dataclass(frozen=True)
class BoundsConfig:
    """How closely the models are measured, valid by construction."""

    iwae_samples: int = flag(
        100, "draws per image: the more, the closer is the bound to log p(x)", metavar="K"
    )
    images: int = flag(0, "random test images, the same for every run; 0: all", metavar="N")

    def __post_init__(self) -> None:
        expect_whole(self, 1, "iwae_samples")
        expect_whole(self, 0, "images")


def measure_bounds(
    trained: SavedRun,
    config: BoundsConfig,
    priors: Mapping[str, Prior] = MappingProxyType({}),
    prior_name: str = "",
) -> dict[str, Any]:
    """The test -ELBO and importance-weighted bound of every model, in nats per image.

    Where there are ``priors``, one of each model and all by one name, also under these.
    """
    test_images = trained.data.test_images
    rows = evaluated_rows(trained.data, config.images)
    models: dict[str, dict[str, Any]] = {}
    total = len(rows) * (len(trained.models) + len(priors))
    with require("tqdm").tqdm(
        desc="evaluation", total=total, unit="image", disable=None, dynamic_ncols=True
    ) as bar:
        for name, model in trained.models.items():

            def bounds_under(prior: Prior | None, model: VAE = model) -> dict[str, Tensor]:
                return importance_weighted(
                    *(model, test_images, rows, trained.config.seed, config.iwae_samples),
                    done=bar.update,
                    prior=prior,
                )

            own = bounds_under(None)
            models[name] = {b: estimate(values) for b, values in own.items()} | learnt_df(model)
            if name in priors:
                under = bounds_under(priors[name])
                models[name]["under_prior"] = {b: estimate(v) for b, v in under.items()} | {
                    f"change_of_{b}": estimate(v - own[b]) for b, v in under.items()
                }
    return {
        "trained_for": trained.done,
        "images": len(rows),
        "iwae_samples": config.iwae_samples,
        **({"prior": prior_name} if priors else {}),
        "models": models,
    }


def evaluated_rows(data: Dataset, count: int) -> Tensor:
    """The numbers of so many random test images, the same for every run; 0: of all."""
    images = data.test_images
    chosen = torch.randperm(len(images), generator=generator(IMAGES_SEED, "evaluated images"))
    return chosen[: count or None].sort().values.to(images.device)


def estimate(values: Tensor) -> dict[str, float | None]:
    """The mean over images, its standard error and its interval; of one image the mean alone."""
    mean = values.mean().item()
    if len(values) == 1:
        return {"mean": mean, "standard_error": None, "low": None, "high": None}
    error = values.std().item() / len(values) ** 0.5
    width = error * float(require("scipy.stats").t.isf((1 - CONFIDENCE) / 2, len(values) - 1))
    return {
        "mean": mean,
        "standard_error": error,
        "low": mean - width,
        "high": mean + width,
    }


def write_bounds(directory: Path, bounds: dict[str, Any]) -> None:
    write_json(directory / "evaluation.json", bounds)


def bounds_table(bounds: dict[str, Any]) -> str:
    """The bounds as Markdown that a terminal shows well too."""
    return table(bounds_rows(bounds))


def bounds_rows(bounds: dict[str, Any]) -> Iterator[list[str]]:
    models = bounds["models"].values()
    yield [f"nats per image, {counted(bounds['images'], 'test image')}", *bounds["models"]]
    for label, bound in (
        ("-ELBO", "negative_elbo"),
        (f"-IW-{bounds['iwae_samples']} bound", "negative_iw_bound"),
    ):
        estimates = [model[bound] for model in models]
        yield [label, *(nats(of_model["mean"]) for of_model in estimates)]
        yield ["its standard error", *(nats(of_model["standard_error"]) for of_model in estimates)]
        yield [f"its {CONFIDENCE:.0%} interval", *map(interval, estimates)]
        if "prior" in bounds:
            under = [model["under_prior"] for model in models]
            yield [f"{label}, {bounds['prior']}", *(nats(u[bound]["mean"]) for u in under)]
            yield [f"its {CONFIDENCE:.0%} interval", *(interval(u[bound]) for u in under)]
            changes = [u[f"change_of_{bound}"] for u in under]
            yield ["change by the prior", *(nats(change["mean"]) for change in changes)]
            yield [f"its {CONFIDENCE:.0%} interval", *map(interval, changes)]
    if all("df" in model for model in models):
        yield ["learnt df", *(f"{model['df']:.3g}" for model in models)]


def interval(of_model: dict[str, float | None]) -> str:
    if of_model["low"] is None:
        return nats(None)
    return f"[{nats(of_model['low'])}, {nats(of_model['high'])}]"
