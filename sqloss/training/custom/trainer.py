"""The training of a user's own model, side by side with a standard one on the mean."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import sqloss
from sqloss import distributed
from sqloss.common import ranks
from sqloss.common.errors import UserError
from sqloss.common.flags import flag
from sqloss.models.seeding import initialisation
from sqloss.student_t import draw_seed
from sqloss.tail import tail_loss
from sqloss.training import sampling_report
from sqloss.training.batch_norm import over_ranks
from sqloss.training.config import RunConfig
from sqloss.training.custom import report
from sqloss.training.custom.batches import Loader, Rows, labels_of, rows_of, size_of, tensors_of
from sqloss.training.custom.own import (
    Callback,
    Own,
    WithLosses,
    check_last_batch,
    copied,
    in_words,
    lone_sample_told,
    make_optimizer,
    make_scheduler,
)
from sqloss.training.loop import Row, Training
from sqloss.training.run import Run
from sqloss.training.trainer import Report, Trainer


@dataclass(frozen=True)
class CustomConfig(RunConfig):
    """The hyper-parameters that ``train`` keeps in ``config.json``."""

    command: ClassVar[str] = "train"
    more_may_change: ClassVar[tuple[str, ...]] = ("backward", "find_unused_parameters")

    epochs: int = flag(20, "passes over the training data", metavar="N")
    backward: str = flag(
        "dense",
        "tail: backward through the samples of the tail alone, for models that treat samples "
        "independently; dense: through all",
        choices=("dense", "tail"),
    )
    scheduler_every: str = flag(
        "epoch", "when the scheduler steps", choices=("epoch", "step"), since=2
    )
    find_unused_parameters: bool = flag(
        False, "with several processes: some parameters may have no part in a loss", since=2
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backward == "tail" and self.risk.tail_alpha is None:
            raise UserError(f"backward: expected dense with {self.risk.flags}, got tail")


class CustomTraining(Training):
    """Copies of a user's model, one for every risk of the run."""

    gives = ("rows", "labels")

    def __init__(self, own: Own, config: CustomConfig, device: torch.device) -> None:
        super().__init__(config)
        self.own, self.config, self.device = own, config, device
        self.models = {name: over_ranks(copied(own.model)).to(device) for name in config.risks}
        self.optimizers = {name: make_optimizer(own, m) for name, m in self.models.items()}
        self.with_losses = {
            name: ranks.parallel(WithLosses(model, own.losses_of), config.find_unused_parameters)
            for name, model in self.models.items()
        }
        optimizer = next(iter(self.optimizers.values()))
        self.brought = {
            "optimizer": in_words(optimizer, *optimizer.param_groups),
            "scheduler": "none",
            "test": f"data with the hash {own.test.fingerprint()}" if own.test else "none",
        }
        self.schedulers = {}
        if own.scheduler is not None:
            self.schedulers = {n: make_scheduler(own, each) for n, each in self.optimizers.items()}
            scheduler = next(iter(self.schedulers.values()))
            self.brought["scheduler"] = in_words(scheduler, scheduler.state_dict())
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
        if size < ranks.count():
            raise UserError(
                f"data: expected batches with a sample for each of {ranks.count()} processes, got "
                f"one of {size}"
            )
        part = ranks.part(size)
        mine = batch if ranks.count() == 1 else rows_of(batch, part)
        versions = [tensor._version for tensor in tensors_of(mine)]
        for name, optimizer in self.optimizers.items():
            self.models[name].train()
            optimizer.zero_grad()
            # The same noise for every model
            with (
                initialisation(seed, "step", ranks.number(), device=self.device),
                lone_sample_told("data: expected", "one of 1; give DataLoader(drop_last=True)"),
            ):
                needed = self.needed(self.risks[name], part, labels_of(batch))
                objective = self._objective(name, mine, needed)
                if objective.requires_grad:
                    objective.backward()
            self._check_gradients(self.models[name])
            optimizer.step()
            value = objective.detach().double()
            self._schedule("step", name, value)
            if versions != [tensor._version for tensor in tensors_of(mine)]:
                raise UserError(
                    "losses: expected a batch to stay as it is, got one changed in place, "
                    "which the next model would see"
                )
            self.objective_sums[name] += torch.stack([value * size, torch.full_like(value, size)])
            for callback in self.telling:
                callback.on_step(name, {"train_objective": value.item()})

    def _objective(self, name: str, batch: Any, needed: dict[str, Tensor]) -> Tensor:
        risk, model = self.risks[name], self.with_losses[name]
        if self.config.backward == "tail" and risk.tail_alpha is not None:

            def losses(rows: Tensor) -> Tensor:
                chosen: Tensor = model(rows_of(batch, rows))["loss"]
                return chosen

            of_tail = tail_loss if ranks.count() == 1 else distributed.tail_loss
            rows = torch.arange(size_of(batch), device=self.device)
            return of_tail(losses, rows, alpha=risk.tail_alpha)
        return risk.over_ranks(model(batch)["loss"], **needed)

    def _check_gradients(self, model: nn.Module) -> None:
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        unused = [n for n, p in parameters.items() if p.grad is None]
        if len(unused) == len(parameters):
            raise UserError(
                "losses: expected losses of the model that they are given, which is a copy, got "
                "none that depend on its parameters"
            )
        if unused and ranks.count() > 1 and not self.config.find_unused_parameters:
            raise UserError(
                "losses: expected losses that depend on all parameters with several processes, "
                f"got none of {', '.join(unused)}; give find_unused_parameters=True, or freeze "
                "these by requires_grad_(False)"
            )

    def _schedule(self, after: str, name: str, objective: Tensor | float) -> None:
        if self.schedulers and self.config.scheduler_every == after:
            scheduler = self.schedulers[name]
            is_told = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([float(objective)] if is_told else []))

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
            row = {"epoch": self.epoch, "model": name, "train_objective": total / size}
            row |= self._measured(name)
            self._schedule("epoch", name, row.get(f"test_objective_{name}", total / size))
            rows.append(row)
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
            "brought": self.brought,
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
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
                f"batch_size: expected a last batch with a sample for each of "
                f"{ranks.count()} processes, got one of {rest}"
            )
        if isinstance(whole, Loader) and config.sampling.name != "shuffle":
            raise UserError(
                f"sampling: expected data with rows for {config.sampling.name}, got batches"
            )
        if isinstance(whole, Loader) and config.risk.keeps_state:
            raise UserError(f"risk: expected data with rows for {config.risk.name}, got batches")

    def begin(self, config: CustomConfig, data: Rows | Loader) -> CustomTraining:
        training = CustomTraining(self.own, config, data.device)
        if isinstance(data, Rows):
            check_last_batch(self.own, data, config)
        return training

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
