"""Priors fitted to the posteriors of a model's training images, and kept in the run's directory."""

import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sqloss.common.errors import UserError, require
from sqloss.common.files import write_atomically
from sqloss.common.flags import as_flag, expect, expect_whole, flag
from sqloss.common.ranks import say
from sqloss.datasets import Dataset
from sqloss.groups import communities
from sqloss.groups.communities import library
from sqloss.models import VAE
from sqloss.models.latents import StudentT
from sqloss.models.mixture import Mixture
from sqloss.models.mixture_fit import aggregate_draws, check_posteriors, fit_mixture
from sqloss.models.pixels import in_blocks, pixels
from sqloss.models.seeding import stream
from sqloss.training.checkpoint import fingerprint, first_damaged
from sqloss.training.run import Run
from sqloss.training.saved_run import SavedRun
from sqloss.training.vae.evaluation import BATCH_SIZE

STANDARD, COMMUNITIES, MIXTURE = "standard", "communities", "mixture"
PRIORS = (STANDARD, COMMUNITIES, MIXTURE)
FOLDER = "priors"
FORMAT = 1
# The settings that each kind of prior is fitted with.
SETTINGS = {STANDARD: (), COMMUNITIES: ("neighbours", "resolution"), MIXTURE: ("components",)}
MOST_ITERATIONS = 200


@dataclass(frozen=True)
class PriorConfig:
    """A distribution of the latent variables to generate from, valid by construction."""

    prior: str = flag(
        STANDARD,
        "the distribution of the latent variables: the model's own, or a mixture fitted to the "
        "training images, with a component for each community of the neighbour graph of their "
        "latents, or without communities",
        choices=PRIORS,
    )
    power: float = flag(
        0.0,
        "a component of a fitted prior weighs SIZE^(1 - power): 0 fits the data, with 1 all weigh "
        "the same, above 1 the small ones weigh most",
    )
    neighbours: int = flag(
        10, "neighbours of each image in the graph of --prior communities", metavar="N"
    )
    resolution: float = flag(
        1.0, "resolution of --prior communities: the higher, the smaller are they"
    )
    components: int = flag(20, "components of --prior mixture", metavar="N")

    def __post_init__(self) -> None:
        expect(self, "prior", self.prior in PRIORS, f"one of {', '.join(PRIORS)}")
        expect(self, "power", 0 <= self.power < math.inf, "a number from 0 up")
        expect(self, "resolution", 0 < self.resolution < math.inf, "a number above 0")
        expect_whole(self, 1, "neighbours", "components")
        own = ("power", *SETTINGS[self.prior]) if self.prior != STANDARD else ()
        for name in ("power", "neighbours", "resolution", "components"):
            if name not in own and getattr(self, name) != getattr(PriorConfig, name):
                kinds = [k for k in PRIORS if name in SETTINGS[k]] or [COMMUNITIES, MIXTURE]
                raise UserError(
                    f"{as_flag(name)}: expected --prior {' or '.join(kinds)} with it, got --prior "
                    f"{self.prior}"
                )

    @property
    def is_fitted(self) -> bool:
        return self.prior != STANDARD

    @property
    def in_words(self) -> str:
        return f"{self.prior}, power {self.power:g}" if self.is_fitted else self.prior


@dataclass(frozen=True)
class TrainedModel:
    """A model of a run, and what its priors are fitted to."""

    directory: Path  # of the run
    name: str
    model: VAE
    data: Dataset  # of the training
    seed: int  # of the run
    trained_for: str

    @classmethod
    def of(cls, run: Run[Any], name: str) -> "TrainedModel":
        """A model of a run under way."""
        training, seed = run.training, run.config.seed
        return cls(run.directory, name, training.models[name], run.data, seed, training.done())

    def fitted_from(self, config: PriorConfig) -> dict[str, Any]:
        """All that a fitted prior depends on; its power is of no part in the fit."""
        found_by = {"library": library()} if config.prior == COMMUNITIES else {}
        return (
            found_by
            | {
                "model": self.name,
                "weights": fingerprint(self.model),
                "data": self.data.fingerprint(),
                "seed": self.seed,
                "trained_for": self.trained_for,
                "prior": config.prior,
            }
            | {name: getattr(config, name) for name in SETTINGS[config.prior]}
        )


class FittedPrior(NamedTuple):
    """A mixture with power 0, and which of its components each training image belongs to."""

    mixture: Mixture
    groups: Tensor  # int64 [N]


def prior_of(
    trained: SavedRun, run_dir: Path, name: str, config: PriorConfig
) -> FittedPrior | None:
    """The fitted prior of a model of a run, where it is not the model's own that is asked for."""
    if not config.is_fitted:
        return None
    of_model = TrainedModel(
        *(run_dir, name, trained.models[name], trained.data, trained.config.seed, trained.done)
    )
    return fitted_prior(of_model, config)


def fitted_prior(trained: TrainedModel, config: PriorConfig) -> FittedPrior:
    """The prior that the run's directory holds; fitted and written where it holds none like it.

    Where that was fitted to an earlier checkpoint it is replaced, and where another library found
    its communities: those are others.
    """
    path = path_of(trained, config)
    fitted_from = trained.fitted_from(config)
    if path.exists():
        stored_from, stored = read_prior(path)
        if stored_from == fitted_from:
            return stored
        if stored_from == fitted_from | {"library": stored_from.get("library")}:
            say(
                f"sqloss: fitting {path} again: its communities were found by "
                f"{stored_from['library']}, here it is {fitted_from['library']}"
            )
    fitted = fit(trained, config)
    content = io.BytesIO()
    state = {
        "format": FORMAT,
        "fitted_from": fitted_from,
        "mixture": dict(fitted.mixture.state_dict()),
        "groups": fitted.groups,
    }
    torch.save(state, content)
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    write_atomically(path, content.getbuffer())
    return fitted


def path_of(trained: TrainedModel, config: PriorConfig) -> Path:
    settings = (f"{name}-{getattr(config, name):g}" for name in SETTINGS[config.prior])
    return trained.directory / FOLDER / f"{'-'.join([config.prior, trained.name, *settings])}.pt"


def read_prior(path: Path) -> tuple[dict[str, Any], FittedPrior]:
    """What a prior in a run's directory was fitted from, and the prior; no code of it is run."""
    try:
        damaged = first_damaged(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if damaged or state["format"] != FORMAT:
            raise ValueError(damaged or f"of the format {state['format']}")
        return state["fitted_from"], FittedPrior(Mixture(**state["mixture"]), state["groups"])
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise UserError(
            f"cannot read the prior {path}: not one of this version, or damaged; delete it to have "
            "it fitted again"
        ) from error


@torch.no_grad()
def posteriors(model: VAE, data: Dataset) -> tuple[Tensor, Tensor, float]:
    """The locations and scales of the training images, [N, latent] on the CPU, and the df."""
    blocks = in_blocks(data.train_images, BATCH_SIZE)
    encoded = [model.encode(pixels(block)) for block in blocks]
    loc = torch.cat([posterior.loc for posterior in encoded]).cpu().double()
    logvar = torch.cat([posterior.logvar for posterior in encoded]).cpu().double()
    df = float(model.df) if isinstance(encoded[0], StudentT) else math.inf
    return loc, (logvar / 2).exp(), df


def fit(trained: TrainedModel, config: PriorConfig) -> FittedPrior:
    """The prior of these settings."""
    loc, scale, df = posteriors(trained.model, trained.data)
    try:
        check_posteriors(f"--prior {config.prior}", loc, scale)
        if config.prior == MIXTURE:
            return fit_without_communities(loc, scale, df, config.components, trained.seed)
        groups = communities(
            loc,
            neighbours=config.neighbours,
            resolution=config.resolution,
            seed=trained.seed,
        )
        return FittedPrior(fit_mixture(loc, scale, groups, df=df, seed=trained.seed), groups)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--prior {config.prior}: {error}") from error


def fit_without_communities(
    loc: Tensor, scale: Tensor, df: float, components: int, seed: int
) -> FittedPrior:
    """A normal mixture with full covariances, by expectation maximisation on a draw per image.

    This is scikit-learn's ``GaussianMixture``. A training image belongs to the component that its
    posterior's location most likely is of.
    """
    if df <= 2:
        raise UserError(
            f"--prior: expected {STANDARD} or {COMMUNITIES} for latent variables without a "
            f"variance, whose df is {df:g}, got {MIXTURE}"
        )
    if len(loc) <= components:
        raise UserError(
            f"--components: expected fewer than the {len(loc)} training images, got {components}"
        )
    mixtures = require("sklearn.mixture")
    model = mixtures.GaussianMixture(
        components, max_iter=MOST_ITERATIONS, random_state=stream(seed, "mixture") % 2**32
    )
    with warnings.catch_warnings():
        # Likelihoods that still rise by a little after so many iterations are near enough
        warnings.simplefilter("ignore", require("sklearn.exceptions").ConvergenceWarning)
        model.fit(aggregate_draws(loc, scale, df=df, seed=seed).numpy())
    covariances = torch.from_numpy(model.covariances_)
    mixture = Mixture(
        torch.from_numpy(model.weights_) * len(loc),
        torch.from_numpy(model.means_),
        torch.linalg.cholesky(covariances),
    )
    return FittedPrior(mixture, torch.from_numpy(model.predict(loc.numpy())).long())
