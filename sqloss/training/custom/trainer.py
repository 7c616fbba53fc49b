"""The training of a user's own model, side by side with a standard one on the mean."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import sqloss
from sqloss import distributed
from sqloss.models.seeding import initialisation
from sqloss.student_t import draw_seed
from sqloss.tail import tail_loss
from sqloss.training import ranks, sampling_report
from sqloss.training.config import RunConfig
from sqloss.training.custom import report
from sqloss.training.custom.batches import Loader, Rows, labels_of, rows_of, size_of, tensors_of
from sqloss.training.errors import UserError
from sqloss.training.flags import flag
from sqloss.training.loop import Row, Training
from sqloss.training.run import Run
from sqloss.training.trainer import Report, Trainer

LossesOf = Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]]


class Callback:
    """What a training tells while it runs; every method does nothing unless it is overridden."""

    def on_step(self, model: str, metrics: dict[str, float]) -> None:
        """After each step of each model: its objective. Told only to those who override it."""

    def on_epoch(self, model: str, metrics: dict[str, float]) -> None:
        """After each epoch, for each model."""

    def on_picture(self, name: str, path: Path) -> None:
        """After the training, for each picture that was drawn."""


@dataclass(frozen=True)
class CustomConfig(RunConfig):
    """The hyper-parameters that ``train`` keeps in ``config.json``."""

    command: ClassVar[str] = "train"
    more_may_change: ClassVar[tuple[str, ...]] = ("backward",)

    epochs: int = flag(20, "passes over the training data", metavar="N")
    backward: str = flag(
        "dense",
        "tail: backward through the samples of the tail alone, for models that treat samples "
        "independently; dense: through all",
        choices=("dense", "tail"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backward == "tail" and self.risk.tail_alpha is None:
            raise UserError(f"train: backward: expected dense with {self.risk.flags}, got tail")


@dataclass(frozen=True)
class Own:
    """What a user brings."""

    model: nn.Module
    losses_of: LossesOf
    optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer], Any] | None
    callbacks: Sequence[Callback]
    test: Rows | Loader | None


class WithLosses(nn.Module):
    """A model whose forward pass is its losses, so that ranks may share its gradients."""

    def __init__(self, model: nn.Module, losses_of: LossesOf) -> None:
        super().__init__()
        self.model = model
        self.losses_of = losses_of

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """By name, [B] each; ``loss`` is what the risk is of."""
        losses = self.losses_of(self.model, batch)
        terms = {"loss": losses} if isinstance(losses, Tensor) else dict(losses)
        if "loss" not in terms:
            terms["loss"] = torch.stack(list(terms.values())).sum(0)
        size = size_of(batch)
        for name, term in terms.items():
            if term.shape != (size,):
                raise UserError(
                    f"train: losses: expected one per sample, [{size}], got {name} of shape "
                    f"{list(term.shape)}"
                )
        return terms


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(
            "train: optimizer: expected a function from parameters to an optimizer, got "
            f"{type(optimizer).__name__}"
        )
    own = {id(parameter) for parameter in model.parameters()}
    moved = [p for group in optimizer.param_groups for p in group["params"]]
    if not all(id(parameter) in own for parameter in moved):
        raise UserError(
            "train: optimizer: expected one of the parameters that the function is given, which "
            "are those of a copy of the model, got others"
        )


class CustomTraining(Training):
    """Copies of a user's model, one for every risk of the run."""

    def __init__(self, own: Own, config: CustomConfig, device: torch.device) -> None:
        super().__init__(config)
        self.own, self.config, self.device = own, config, device
        self.models = {name: copy.deepcopy(own.model).to(device) for name in config.risks}
        self.with_losses = {
            name: ranks.parallel(WithLosses(model, own.losses_of))
            for name, model in self.models.items()
        }
        self.optimizers = {n: own.optimizer(list(m.parameters())) for n, m in self.models.items()}
        for name, optimizer in self.optimizers.items():
            check_optimizer(optimizer, self.models[name])
        self.schedulers = {
            name: own.scheduler(optimizer)
            for name, optimizer in self.optimizers.items()
            if own.scheduler is not None
        }
        self.objective_sums = {  # and samples, of the epoch under way
            n: torch.zeros(2, dtype=torch.float64, device=device) for n in self.models
        }
        self.columns = ("epoch", "model", "train_objective", *self._test_columns())
        if callable(getattr(own.model, "features", None)):
            self.feature_names = ("model",)
        self.telling = [c for c in own.callbacks if type(c).on_step is not Callback.on_step]

    def _test_columns(self) -> tuple[str, ...]:
        if self.own.test is None:
            return ()
        risks = self.config.measured_risks
        objectives = (f"test_objective_{name}" for name, risk in risks.items() if not risk.needs)
        return (*objectives, "test_loss", "test_loss_cvar")

    def train_step(self, batch: Any) -> None:
        size, seed = size_of(batch), int(draw_seed(generator=self.noise))
        part = ranks.part(size)
        mine = rows_of(batch, part)
        versions = [tensor._version for tensor in tensors_of(mine)]
        for name, optimizer in self.optimizers.items():
            self.models[name].train()
            optimizer.zero_grad()
            # The same noise for every model
            with initialisation(seed, "step", ranks.number(), device=self.device):
                objective = self._objective(name, mine)
                objective.backward()
            if all(parameter.grad is None for parameter in self.models[name].parameters()):
                raise UserError(
                    "train: losses: expected losses of the model that they are given, which is a "
                    "copy, got none that depend on its parameters"
                )
            optimizer.step()
            if versions != [tensor._version for tensor in tensors_of(mine)]:
                raise UserError(
                    "train: losses: expected a batch to stay as it is, got one changed in place, "
                    "which the next model would see"
                )
            value = objective.detach().double()
            self.objective_sums[name] += torch.stack([value * size, torch.full_like(value, size)])
            for callback in self.telling:
                callback.on_step(name, {"train_objective": value.item()})

    def _objective(self, name: str, batch: Any) -> Tensor:
        risk, model = self.config.risks[name], self.with_losses[name]
        if self.config.backward == "tail" and risk.tail_alpha is not None:

            def losses(rows: Tensor) -> Tensor:
                chosen: Tensor = model(rows_of(batch, rows))["loss"]
                return chosen

            of_tail = tail_loss if ranks.count() == 1 else distributed.tail_loss
            rows = torch.arange(size_of(batch), device=self.device)
            return of_tail(losses, rows, alpha=risk.tail_alpha)
        return risk.over_ranks(model(batch)["loss"], **self._needed(name, batch))

    def _needed(self, name: str, batch: Any) -> dict[str, Tensor]:
        needed = {}
        for want in self.config.risks[name].needs:
            found = labels_of(batch) if want == "labels" else None
            if found is None:
                raise UserError(f"train: data: expected batches with {want} for --risk {name}")
            needed[want] = found
        return needed

    @torch.no_grad()
    def features(self, name: str, data: Any) -> Tensor:
        """What the model's own method ``features(batch)`` returns, in evaluation mode."""
        model: Any = next(iter(self.models.values()))
        was_training = model.training
        model.eval()
        with initialisation(self.config.seed, "features", device=self.device):
            found = [model.features(batch) for batch in data.in_order(self.config.batch_size)]
        model.train(was_training)
        return torch.cat([each.detach().flatten(1).cpu() for each in found])

    def measure(self, data: Any) -> list[Row]:
        rows = []
        for name in self.models:
            total, size = self.objective_sums[name].tolist()
            self.objective_sums[name].zero_()
            if self.schedulers:
                self.schedulers[name].step()
            row = {"epoch": self.epoch, "model": name, "train_objective": total / size}
            rows.append(row | self._measured(name))
        for callback in self.own.callbacks:
            for row in rows:
                numbers = {k: v for k, v in row.items() if k != "model"}
                callback.on_epoch(row["model"], numbers)
        return rows

    def _measured(self, name: str) -> dict[str, float]:
        if self.own.test is None:
            return {}
        losses, _ = self.test_losses(name)
        loss = losses["loss"]
        objectives = {
            f"test_objective_{of}": risk(loss).item()
            for of, risk in self.config.measured_risks.items()
            if not risk.needs
        }
        return objectives | {
            "test_loss": loss.mean().item(),
            "test_loss_cvar": sqloss.cvar(loss, self.config.metric_alpha).item(),
        }

    @torch.no_grad()
    def test_losses(self, name: str) -> tuple[dict[str, Tensor], Tensor | None]:
        """All test losses of a model by name, float64 on the CPU, and the classes if any.

        The noise is the same for every model and in every epoch.
        """
        model = self.models[name]
        with_losses = WithLosses(model, self.own.losses_of)
        was_training = model.training
        model.eval()
        parts: list[dict[str, Tensor]] = []
        labels: list[Tensor | None] = []
        assert self.own.test is not None
        with initialisation(self.config.seed, "test", device=self.device):
            for batch in self.own.test.in_order(self.config.batch_size):
                terms = with_losses(batch)
                parts.append({term: values.double().cpu() for term, values in terms.items()})
                labels.append(labels_of(batch))
        model.train(was_training)
        losses = {term: torch.cat([part[term] for part in parts]) for term in parts[0]}
        known = [each.cpu() for each in labels if each is not None]
        return losses, torch.cat(known) if len(known) == len(labels) else None

    def describe(self, row: Row) -> str:
        shown = "test_loss" if "test_loss" in row else "train_objective"
        tail = f", CVaR {row['test_loss_cvar']:.4g}" if "test_loss_cvar" in row else ""
        return f"{row['model']} {shown.replace('_', ' ')} {row[shown]:.4g}{tail}"

    def sums(self, name: str) -> list[Tensor]:
        return [self.objective_sums[name].sum()]

    def advice(self) -> str:
        return "expected a model and an optimizer whose losses stay finite, got others"

    def own_state(self) -> dict[str, Any]:
        return {
            "optimizers": {name: each.state_dict() for name, each in self.optimizers.items()},
            "schedulers": {n: each.state_dict() for n, each in self.schedulers.items()},
            "objective_sums": self.objective_sums,
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        if self.schedulers.keys() != state["schedulers"].keys():
            raise ValueError("another scheduler")
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
            self.objective_sums[name].copy_(state["objective_sums"][name])
        for name, scheduler in self.schedulers.items():
            scheduler.load_state_dict(state["schedulers"][name])


class CustomTrainer(Trainer[CustomConfig, CustomTraining]):
    """What ``train`` does of its own."""

    name = "train"
    about = "Train a model of one's own."
    config = CustomConfig
    modules = ()

    def __init__(self, own: Own, data: Rows | Loader) -> None:
        self.own = own
        self.data = data

    def load(self, config: CustomConfig) -> Rows | Loader:
        return self.data

    def training_data(self, whole: Rows | Loader, config: CustomConfig) -> Rows | Loader:
        return whole

    def describe(self, whole: Rows | Loader, data: Rows | Loader) -> str:
        things = "samples" if isinstance(data, Rows) else "batches an epoch"
        return f"data: {len(data)} {things}"

    def check_data(self, whole: Rows | Loader, config: CustomConfig) -> None:
        rest = len(whole) % config.batch_size if isinstance(whole, Rows) else 0
        if 0 < rest < ranks.count():
            raise UserError(
                f"train: batch_size: expected a last batch with a sample for each of "
                f"{ranks.count()} processes, got one of {rest}"
            )
        batch_norm = nn.modules.batchnorm._BatchNorm
        if ranks.count() > 1 and any(isinstance(m, batch_norm) for m in self.own.model.modules()):
            raise UserError(
                "train: model: expected no batch norm with several processes, whose statistics "
                "would be those of each one's part, got a model with it"
            )
        if isinstance(whole, Loader) and config.sampling.name != "shuffle":
            raise UserError(
                f"train: sampling: expected data with rows for {config.sampling.name}, got batches"
            )

    def begin(self, config: CustomConfig, data: Rows | Loader) -> CustomTraining:
        return CustomTraining(self.own, config, data.device)

    def report(self, run: Run[CustomConfig]) -> Report:
        training: CustomTraining = run.training
        names = training.models if self.own.test is not None else ()
        tested = {name: training.test_losses(name) for name in names}
        made = report.make_report(training, tested, run.config)
        labels = run.data.labels if isinstance(run.data, Rows) else None
        classes = 0 if labels is None else int(labels.max()) + 1
        made |= sampling_report.section(training, run.data, tuple(map(str, range(classes))))
        for path in report.write(run.directory, made, training, tested):
            for callback in self.own.callbacks:
                callback.on_picture(path.stem, path)
        return made

    def tables(self, made: Report) -> str:
        return report.tables(made)
