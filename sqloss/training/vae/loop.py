"""The training of VAEs: every contender on its own objective."""

import copy
from typing import Any

import torch
from torch import Tensor

from sqloss.common import ranks
from sqloss.datasets import Dataset
from sqloss.datasets.features import AT_ONCE, IMAGE_FEATURES, image_features
from sqloss.models import VAE
from sqloss.models.pixels import in_blocks, pixels
from sqloss.models.seeding import initialisation
from sqloss.student_t import draw_seed
from sqloss.training.checkpoint import fingerprint
from sqloss.training.loop import Row, Training
from sqloss.training.vae.backends import BACKENDS, Batch
from sqloss.training.vae.config import VAEConfig
from sqloss.training.vae.evaluation import evaluate, learnt_df, objective_values, summary

COLUMNS = (
    "test_negative_elbo",
    "test_negative_elbo_cvar",
    "test_reconstruction",
    "test_kl",
)


class VAETraining(Training):
    """The training of copies of one initial model, one for every contender of the run."""

    feature_names = ("means", *IMAGE_FEATURES)
    gives = ("rows", "labels")

    def __init__(self, model: VAE, config: VAEConfig, reference: VAE | None = None) -> None:
        super().__init__(config)
        self.config = config
        self.reference = reference
        self._losses_of_reference: dict[str, Tensor] | None = None  # on the test images
        self.brought = (
            {"reference": f"a model with the hash {fingerprint(reference)}"} if reference else {}
        )
        device = next(model.parameters()).device
        self.models: dict[str, VAE] = {name: copy.deepcopy(model) for name in config.contenders}
        self.optimisers = {
            name: BACKENDS[config.backend](
                copied, risk, config, None if risk.is_mean else reference
            )
            for (name, copied), risk in zip(self.models.items(), self.risks.values(), strict=True)
        }
        objectives = (f"test_objective_{name}" for name in config.objectives)
        self.columns = (
            *("epoch", "model", "train_objective", *objectives, *COLUMNS),
            *learnt_df(model),
        )
        self.objective_sums = {  # over the samples of the epoch under way
            name: torch.zeros((), dtype=torch.float64, device=device) for name in self.models
        }

    def train_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        part, seed = ranks.part(len(images)), draw_seed(generator=self.noise)
        rows = torch.arange(len(images), device=images.device)[part]
        of_rank = Batch(pixels(images[part]), rows, len(images))
        for name, optimiser in self.optimisers.items():
            needed = self.needed(self.risks[name], part, labels)
            value = optimiser.step(of_rank._replace(needed=needed), seed)
            self.objective_sums[name] += value * len(images)

    def measure(self, data: Dataset) -> list[Row]:
        return [self._measure(name, data) for name in self.models]

    def _measure(self, name: str, data: Dataset) -> Row:
        config, model = self.config, self.models[name]
        objective = self.objective_sums[name].item() / len(data.train_images)
        self.objective_sums[name].zero_()
        losses = evaluate(model, data, config.seed, config.iwae_samples)
        objectives = objective_values(losses, config, self.losses_of_reference(data))
        test = objectives | summary(losses, config.metric_alpha)
        return (
            {"epoch": self.epoch, "model": name, "train_objective": objective}
            | {f"test_{metric}": value for metric, value in test.items()}
            | learnt_df(model)
        )

    def losses_of_reference(self, data: Dataset) -> dict[str, Tensor] | None:
        """Those on the test images, at the draws at which the models are measured, if there is a
        reference."""
        if self.reference is not None and self._losses_of_reference is None:
            config = self.config
            of_test = evaluate(self.reference, data, config.seed, config.iwae_samples)
            self._losses_of_reference = of_test
        return self._losses_of_reference

    @torch.no_grad()
    def features(self, name: str, data: Dataset) -> Tensor:
        if name in IMAGE_FEATURES:
            return image_features(name, data)
        model = next(iter(self.models.values()))
        device = next(model.parameters()).device
        blocks = in_blocks(data.train_images, AT_ONCE)
        # The mean of Student's t with a df of 1 or below is none: its location is the same place.
        return torch.cat([model.encode(pixels(block.to(device))).loc.cpu() for block in blocks])

    def describe(self, row: Row) -> str:
        return (
            f"{row['model']} -ELBO {row['test_negative_elbo']:.2f}, "
            f"CVaR {row['test_negative_elbo_cvar']:.2f}"
        )

    def sums(self, name: str) -> list[Tensor]:
        return [self.objective_sums[name]]

    def advice(self) -> str:
        return (
            f"expected a smaller --lr, got {self.config.learning_rate:g}, "
            f"or another --beta, got {self.config.beta:g}"
        )

    def own_state(self) -> dict[str, Any]:
        return {
            "optimisers": {name: each.state_dict() for name, each in self.optimisers.items()},
            "objective_sums": self.objective_sums,
            **({"brought": self.brought} if self.brought else {}),
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
            self.objective_sums[name].copy_(state["objective_sums"][name])


def build_model(config: VAEConfig, data_shape: tuple[int, ...]) -> VAE:
    """The model of a run with the weights that its seed gives it."""
    with initialisation(config.seed, "model"):
        return VAE(
            data_shape,
            config.hidden_sizes,
            config.latent,
            architecture=config.architecture,
            channels=config.channel_sizes,
            prior=config.prior,
            df=config.df,
            learn_df=config.learn_df,
        )


def begin(config: VAEConfig, data: Dataset, reference: VAE | None = None) -> VAETraining:
    """A training at its beginning, on the device of the data, as its reference is."""
    model = build_model(config, data.shape).to(data.train_images.device)
    return VAETraining(model, config, reference)
