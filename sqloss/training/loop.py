"""The training loop: all models of a run side by side, on the same batches and the same noise.

What training changes is one ``Training``, and a checkpoint is all of it: a run that was stopped
anywhere and resumed is, on the CPU, bit for bit the run that was not.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sqloss.models import VAE
from sqloss.models.pixels import pixels
from sqloss.models.seeding import generator
from sqloss.training.config import Config
from sqloss.training.data import Dataset
from sqloss.training.errors import UserError
from sqloss.training.evaluation import evaluate, summary
from sqloss.training.progress import Progress
from sqloss.training.risk import Objective, vae_objective
from sqloss.training.stop import StopSignal

Row = dict[str, Any]  # epoch, model and its metrics


@dataclass
class Training:
    """Everything that training changes, and nothing else."""

    models: dict[str, VAE]
    optimisers: dict[str, torch.optim.Optimizer]
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
            "optimisers": {name: adam.state_dict() for name, adam in self.optimisers.items()},
            "noise": self.noise.get_state(),
            "objective_sums": self.objective_sums,
            "history": self.history,
        }

    def latest_rows(self) -> list[Row]:
        """The metrics of the last whole epoch, one row per model."""
        return self.history[-len(self.models) :]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.step = state["step"]
        for name, model in self.models.items():
            model.load_state_dict(state["models"][name])
            self.optimisers[name].load_state_dict(state["optimisers"][name])
        self.noise.set_state(state["noise"])
        for name, total in self.objective_sums.items():
            total.copy_(state["objective_sums"][name])
        self.history = state["history"]


def begin(model: VAE, config: Config) -> Training:
    """Give every contender of the run its own copy of one initial model."""
    models = {name: copy.deepcopy(model) for name in config.contenders}
    device = next(model.parameters()).device
    return Training(
        models=models,
        optimisers={
            name: torch.optim.Adam(copied.parameters(), config.lr, fused=True)
            for name, copied in models.items()
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
    objectives = {
        name: vae_objective(alpha, config.tail, config.beta)
        for name, alpha in config.contenders.items()
    }
    order = torch.randperm(len(images), generator=generator(config.seed, "order", training.epoch))
    for batch in order.to(images.device).split(config.batch_size)[training.step :]:
        if stop.requested:
            return False
        train_step(training, objectives, pixels(images[batch]))
        progress.step()
    return True


def train_step(training: Training, objectives: dict[str, Objective], x: Tensor) -> None:
    """One step of every model on the same pixels and the same noise."""
    latent = next(iter(training.models.values())).latent
    noise = torch.randn(len(x), latent, generator=training.noise).to(x.device)
    for name, model in training.models.items():
        loss = objectives[name](model.losses(x, noise))
        training.optimisers[name].zero_grad()
        loss.backward()
        training.optimisers[name].step()
        training.objective_sums[name] += loss.detach() * len(x)
    training.step += 1


def close_epoch(training: Training, data: Dataset, config: Config) -> None:
    """Measure every model, and be ready for the next epoch."""
    training.epoch += 1
    training.step = 0
    for name, model in training.models.items():
        objective = training.objective_sums[name].item() / len(data.train_images)
        test = summary(evaluate(model, data, config.seed), config.metric_alpha)
        training.history.append(
            {"epoch": training.epoch, "model": name, "train_objective": objective}
            | {f"test_{metric}": value for metric, value in test.items()}
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
            raise UserError(
                f"the loss of the {name} model is no longer finite after {training.epoch} epochs "
                f"and {training.step} steps; the checkpoints from before are intact; "
                f"start a new run with a smaller --lr, got {config.lr}"
            )
