"""The training loop: all models of a run side by side, on the same batches and the same noise.

What training changes is one ``Training``, and a checkpoint is all of it: a run that was stopped
anywhere and resumed is, on the CPU, bit for bit the run that was not.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sqloss.common import ranks
from sqloss.common.errors import UserError
from sqloss.common.flags import as_given
from sqloss.models.seeding import generator
from sqloss.training.config import RunConfig
from sqloss.training.progress import Progress, counted
from sqloss.training.risks import Risk
from sqloss.training.stop import StopSignal

Row = dict[str, Any]  # the metrics of one model after one epoch
CHECKED_EVERY = 100  # steps: a broken model is reported after so many at the latest


class NonFiniteError(UserError):
    """A model that has lost its footing."""


class TrainingData(Protocol):
    """The data, as the loop needs them."""

    def __len__(self) -> int:
        """How many samples an epoch has."""

    @property
    def labels(self) -> Tensor | None:
        """The classes of the samples, int64 [N] on the CPU, where they have any."""

    def steps(self, batch_size: int) -> int:
        """How many batches an epoch has."""

    def batches(self, rows: Iterable[Tensor], training: "Training") -> Iterator[Any]:
        """A batch for each of these tensors of sample numbers, as the trainer takes it.

        They are the rest of the epoch that ``training`` is in.
        """

    def fingerprint(self) -> str:
        """Equal for equal data only."""


class Training(ABC):
    """Everything that training changes, and nothing else.

    A trainer says what a step is, what is measured after an epoch, and what it keeps beside.
    """

    models: Mapping[str, nn.Module]
    columns: tuple[str, ...]  # the names of the metrics
    round = 1  # steps after which every kind of step has been taken
    brought: Mapping[str, str] = {}  # by argument, what a resumed run is to be given again
    feature_names: tuple[str, ...] = ()  # those that ``features`` knows, the default first
    gives: tuple[str, ...] = ()
    """What ``needed`` has for risks: ``labels``, and ``rows``, the numbers of the samples."""

    def __init__(self, config: RunConfig) -> None:
        self.seed = config.seed
        self.epochs = config.epochs
        self.noise = generator(config.seed, "noise")
        self.epoch = 0  # whole epochs done
        self.step = 0  # steps done of the epoch under way
        self.rows = torch.empty(0, dtype=torch.int64)  # the samples of the batch under way
        self.risks = {name: risk.of_model() for name, risk in config.risks.items()}
        self.history: list[Row] = []
        # What the sampler keeps over epochs; None where it keeps nothing.
        self.of_sampler: dict[str, Any] | None = {} if config.sampling.keeps_state else None

    @abstractmethod
    def train_step(self, batch: Any) -> None:
        """One step of every model on the same batch and the same noise."""

    @abstractmethod
    def measure(self, data: Any) -> list[Row]:
        """The metrics of the epoch that has ended, one row per model; be ready for the next."""

    @abstractmethod
    def describe(self, row: Row) -> str:
        """The metrics of a row that are shown while training."""

    @abstractmethod
    def sums(self, name: str) -> Sequence[Tensor]:
        """The running sums of a model's epoch: not finite once a loss was not."""

    @abstractmethod
    def advice(self) -> str:
        """What may help where a model has lost its footing: "expected ..., got ..."."""

    @abstractmethod
    def own_state(self) -> dict[str, Any]:
        """The state that the trainer keeps beside the models, such as its optimisers'."""

    @abstractmethod
    def load_own_state(self, state: dict[str, Any]) -> None: ...

    def features(self, name: str, data: Any) -> Tensor:
        """What a sampler sees of the samples, [N, D], by one of ``feature_names``.

        Of a model they are those of the first, the standard one where it is trained: all models of
        a run see the same batches, and that one is trained as if there were no other.
        """
        raise NotImplementedError

    def needed(self, risk: Risk, part: slice, labels: Tensor | None) -> dict[str, Tensor]:
        """What a risk needs of a part of the batch under way, which has these labels if any."""
        known = {"rows": self.rows, "labels": labels}
        needed = {}
        for want in risk.needs:
            found = known[want]
            if found is None:
                of_risk = as_given("risk", risk.name)
                raise UserError(f"data: expected batches with {want} for {of_risk}")
            needed[want] = found[part]
        return needed

    def alarms(self) -> list[str]:
        """What is wrong since the epoch that has ended though all numbers are finite."""
        return []

    def state_dict(self) -> dict[str, Any]:
        of_sampler = {} if self.of_sampler is None else {"sampler": self.of_sampler}
        of_risks = {n: risk.state_dict() for n, risk in self.risks.items() if risk.keeps_state}
        return {
            "epoch": self.epoch,
            "step": self.step,
            "models": {name: model.state_dict() for name, model in self.models.items()},
            "noise": self.noise.get_state(),
            "history": self.history,
            **of_sampler,
            **({"risks": of_risks} if of_risks else {}),
        } | self.own_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; an exception of any kind tells that it is not one of this training."""
        self._check_state(state["models"].keys(), state["history"], state["epoch"])
        self.epoch = state["epoch"]
        self.step = state["step"]
        for name, model in self.models.items():
            model.load_state_dict(state["models"][name])
        self.load_own_state(state)
        self.noise.set_state(state["noise"])
        self.history = state["history"]
        if self.of_sampler is not None:
            self.of_sampler = state["sampler"]
        for name, risk in self.risks.items():
            if risk.keeps_state:
                risk.load_state_dict(state["risks"][name])

    def _check_state(self, models: Iterable[str], history: list[Row], epoch: int) -> None:
        if set(models) != self.models.keys():
            raise ValueError(f"models {', '.join(models)}")
        if len(history) != epoch * len(self.models):
            raise ValueError(f"{len(history)} rows of metrics after {epoch} epochs")
        if any(tuple(row) != self.columns for row in history):
            raise ValueError("metrics of other names")

    def done(self) -> str:
        """The epochs and steps done, in words."""
        return f"{counted(self.epoch, 'epoch')} and {counted(self.step, 'step')}"

    def latest_rows(self) -> list[Row]:
        """The metrics of the last whole epoch, one row per model."""
        return self.history[-len(self.models) :]


def fit(
    training: Training,
    data: TrainingData,
    config: RunConfig,
    save: Callable[[], None],
    progress: Progress,
) -> bool:
    """Train until ``config.epochs``, saving at epochs' ends; False on a request to stop."""
    saved = training.done() if training.epoch or training.step else ""
    with StopSignal() as stop:
        while training.epoch < config.epochs:
            ended = train_epoch(training, data, config, progress, stop)
            if ended:
                close_epoch(training, data)
                rows = training.latest_rows()
                progress.epoch(training.epoch, [training.describe(row) for row in rows])
            check_finite(training)
            stopping = stop.agreed()
            due = training.epoch % config.checkpoint_every == 0 or training.epoch == config.epochs
            if due or stopping:
                save()
                saved = training.done()
            if ended:
                kept = f"saved is what it was after {saved}" if saved else "nothing is saved yet"
                for alarm in training.alarms():
                    progress.tell(f"{alarm}; {kept}")
            if stopping:
                return False
    return True


def train_epoch(
    training: Training, data: TrainingData, config: RunConfig, progress: Progress, stop: StopSignal
) -> bool:
    """Run the epoch under way; False where a stop is requested before its end."""
    draws = generator(config.seed, "order", training.epoch)
    order = config.sampling.order(data, draws, training)
    for risk in training.risks.values():
        risk.start_epoch(order, data, training)
    rows = order.split(config.batch_size)[training.step :]
    for batch, numbers in batches(training, data, rows):
        if stop.agreed():
            return False
        take_step(training, batch, numbers)
        if training.step % CHECKED_EVERY == 0:
            check_finite(training)
        progress.step()
    return True


def batches(
    training: Training, data: TrainingData, rows: Sequence[Tensor]
) -> Iterator[tuple[Any, Tensor]]:
    """Each batch with the numbers of its samples.

    These say nothing where the data have an order of their own, and so other batches.
    """
    none = torch.empty(0, dtype=torch.int64)
    return itertools.zip_longest(data.batches(rows, training), rows, fillvalue=none)


def take_step(training: Training, batch: Any, rows: Tensor) -> None:
    training.rows = rows
    training.train_step(batch)
    training.step += 1


def close_epoch(training: Training, data: TrainingData) -> None:
    """Measure every model, and be ready for the next epoch."""
    training.epoch += 1
    training.step = 0
    training.history.extend(training.measure(data))


def check_finite(training: Training) -> None:
    """Stop before a model that has lost its footing is saved over one that has not."""
    measured = {row["model"]: row for row in training.latest_rows()}
    for name, model in training.models.items():
        finite = [parameter.isfinite().all() for parameter in model.parameters()]
        finite.extend(total.isfinite() for total in training.sums(name))
        metrics = [v for v in measured.get(name, {}).values() if isinstance(v, float)]
        broken = not torch.stack(finite).all() or not all(map(math.isfinite, metrics))
        if ranks.any_of(broken):
            raise NonFiniteError(
                f"the loss of the {name} model is no longer finite after {training.done()}; "
                f"{training.advice()}"
            )
