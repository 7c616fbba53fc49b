"""The training loop: all models of a run side by side, on the same batches and the same noise.

What training changes is one ``Training``, and a checkpoint is all of it: a run that was stopped
anywhere and resumed is, on the CPU, bit for bit the run that was not.
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sqloss.models import VAE
from sqloss.models.pixels import pixels
from sqloss.models.seeding import generator, initialisation
from sqloss.student_t import draw_seed
from sqloss.training.backends import BACKENDS, Backend
from sqloss.training.config import Config
from sqloss.training.data import Dataset
from sqloss.training.errors import UserError
from sqloss.training.evaluation import evaluate, learnt_df, objective_values, summary
from sqloss.training.progress import Progress, counted
from sqloss.training.stop import StopSignal

Row = dict[str, Any]  # the metrics of one model after one epoch, by these columns and learnt_df's
COLUMNS = (
    "epoch",
    "model",
    "train_objective",
    "test_objective_standard",
    "test_objective_cvar",
    "test_negative_elbo",
    "test_negative_elbo_cvar",
    "test_reconstruction",
    "test_kl",
)


class NonFiniteError(UserError):
    """A model that has lost its footing."""


@dataclass
class Training:
    """Everything that training changes, and nothing else."""

    models: dict[str, VAE]
    optimisers: dict[str, Backend]
    noise: torch.Generator
    epoch: int = 0  # whole epochs done
    step: int = 0  # steps done of the epoch under way
    objective_sums: dict[str, Tensor] = field(default_factory=dict)  # over this epoch's samples
    history: list[Row] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "models": {name: model.state_dict() for name, model in self.models.items()},
            "optimisers": {name: each.state_dict() for name, each in self.optimisers.items()},
            "noise": self.noise.get_state(),
            "objective_sums": self.objective_sums,
            "history": self.history,
        }

    def done(self) -> str:
        """How far it is, in words."""
        return f"{counted(self.epoch, 'epoch')} and {counted(self.step, 'step')}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the metrics."""
        return (*COLUMNS, *learnt_df(next(iter(self.models.values()))))

    def latest_rows(self) -> list[Row]:
        """The metrics of the last whole epoch, one row per model."""
        return self.history[-len(self.models) :]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; an exception of any kind tells that it is not one of this training."""
        self._refuse_other(state["models"].keys(), state["history"], state["epoch"])
        self.epoch = state["epoch"]
        self.step = state["step"]
        for name, model in self.models.items():
            model.load_state_dict(state["models"][name])
            self.optimisers[name].load_state_dict(state["optimisers"][name])
        self.noise.set_state(state["noise"])
        for name, total in self.objective_sums.items():
            total.copy_(state["objective_sums"][name])
        self.history = state["history"]

    def _refuse_other(self, models: Iterable[str], history: list[Row], epoch: int) -> None:
        if set(models) != self.models.keys():
            raise ValueError(f"models {', '.join(models)}")
        if len(history) != epoch * len(self.models):
            raise ValueError(f"{len(history)} rows of metrics after {epoch} epochs")
        if any(tuple(row) != self.columns for row in history):
            raise ValueError("metrics of other names")


def build_model(config: Config, data_shape: tuple[int, ...]) -> VAE:
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


def begin(model: VAE, config: Config) -> Training:
    """Give every contender of the run its own copy of one initial model."""
    models = {name: copy.deepcopy(model) for name in config.contenders}
    device = next(model.parameters()).device
    return Training(
        models=models,
        optimisers={
            name: BACKENDS[config.backend](copied, name, config) for name, copied in models.items()
        },
        noise=generator(config.seed, "noise"),
        objective_sums={
            name: torch.zeros((), dtype=torch.float64, device=device) for name in models
        },
    )


def fit(
    training: Training,
    data: Dataset,
    config: Config,
    save: Callable[[Training], None],
    progress: Progress,
) -> bool:
    """Train until ``config.epochs``, saving at epochs' ends; False where told to stop."""
    with StopSignal() as stop:
        while training.epoch < config.epochs:
            if train_epoch(training, data, config, progress, stop):
                close_epoch(training, data, config)
                progress.epoch(training.latest_rows())
            refuse_non_finite(training, config)
            due = training.epoch % config.checkpoint_every == 0 or training.epoch == config.epochs
            if due or stop.requested:
                save(training)
            if stop.requested:
                return False
    return True


def train_epoch(
    training: Training, data: Dataset, config: Config, progress: Progress, stop: StopSignal
) -> bool:
    """Run the epoch under way; False where a stop is requested before its end."""
    images = data.train_images
    order = torch.randperm(len(images), generator=generator(config.seed, "order", training.epoch))
    for batch in order.to(images.device).split(config.batch_size)[training.step :]:
        if stop.requested:
            return False
        train_step(training, pixels(images[batch]))
        progress.step()
    return True


def train_step(training: Training, x: Tensor) -> None:
    """One step of every model on the same pixels and the same noise."""
    seed = draw_seed(generator=training.noise)
    for name, optimiser in training.optimisers.items():
        training.objective_sums[name] += optimiser.step(x, seed) * len(x)
    training.step += 1


def close_epoch(training: Training, data: Dataset, config: Config) -> None:
    """Measure every model, and be ready for the next epoch."""
    training.epoch += 1
    training.step = 0
    for name, model in training.models.items():
        objective = training.objective_sums[name].item() / len(data.train_images)
        losses = evaluate(model, data, config.seed, config.iwae_samples)
        test = objective_values(losses, config) | summary(losses, config.metric_alpha)
        training.history.append(
            {"epoch": training.epoch, "model": name, "train_objective": objective}
            | {f"test_{metric}": value for metric, value in test.items()}
            | learnt_df(model)
        )
        training.objective_sums[name].zero_()


def refuse_non_finite(training: Training, config: Config) -> None:
    """Stop before a model that has lost its footing is saved over one that has not."""
    measured = {row["model"]: row for row in training.latest_rows()}
    for name, model in training.models.items():
        finite = [parameter.isfinite().all() for parameter in model.parameters()]
        finite.append(training.objective_sums[name].isfinite())
        metrics = [v for v in measured.get(name, {}).values() if isinstance(v, float)]
        if not torch.stack(finite).all() or not all(map(math.isfinite, metrics)):
            raise NonFiniteError(
                f"the loss of the {name} model is no longer finite after "
                f"{training.done()}; expected a smaller --lr, got {config.learning_rate:g}, "
                f"or another --beta, got {config.beta:g}"
            )
