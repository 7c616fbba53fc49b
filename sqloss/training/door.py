"""``train``: the Python door to training a model of one's own on a risk."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from sqloss.common import ranks
from sqloss.common.errors import UserError
from sqloss.common.files import expanded
from sqloss.common.flags import called, configure, settings_of
from sqloss.training.custom.batches import as_data
from sqloss.training.custom.own import Callback, Own
from sqloss.training.custom.trainer import CustomConfig, CustomTrainer
from sqloss.training.loop import Row
from sqloss.training.progress import Progress, Silence
from sqloss.training.run import Run


@dataclass(frozen=True)
class TrainedRun:
    """What ``train`` returns, on every rank."""

    model: nn.Module
    """The one trained on the risk, in evaluation mode."""
    models: Mapping[str, nn.Module]
    """By the names of their risks; ``standard`` is trained on the mean."""
    report: dict[str, Any]
    directory: Path
    metrics: list[Row]
    """A row for each epoch and model."""
    finished: bool
    """False where Ctrl-C or SIGTERM has stopped and saved it: ``resume=True`` goes on."""


def typed(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are given, as their flags would have them.

    Numbers of NumPy and torch become Python's.
    """
    settings = settings_of(CustomConfig)
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in settings:
            known = ", ".join(sorted(settings))
            raise UserError(f"settings: expected some of {known}, got {name}")
        if value is None:
            continue
        is_number = hasattr(value, "item") and getattr(value, "ndim", 1) == 0
        plain = value.item() if is_number else value
        plain = str(plain) if isinstance(plain, torch.device) else plain
        kind = settings[name].type
        if not settings[name].takes(plain):
            raise UserError(f"{name}: expected {kind.__name__}, got {value!r}")
        values[name] = kind(plain)
    return values


@called("train", data_dir="data")
def train(
    model: nn.Module,
    data: Any,
    *,
    losses_of: Callable[[Any, Any], Tensor | Mapping[str, Tensor]] | None = None,
    test: Any = None,
    risk: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    callbacks: Sequence[Callback] = (),
    collate_fn: Callable[[list[Any]], Any] = default_collate,
    progress: bool = True,
    **settings: Any,
) -> TrainedRun:
    r"""Train a model of your own on a risk of its losses, and beside it a standard one on the mean.

    Each step minimises :math:`\rho(l_1, \dots, l_B)`, where :math:`l_i` is the loss of sample i of
    the batch and :math:`\rho` the risk: by default the superquantile at ``alpha=0.8``.

    Args:
        model: any module with ``losses(batch)``, which returns a loss per sample, ``[B]``, or a
            dict of such; of a dict the entry ``loss`` is minimised, or else the sum. It is copied,
            and not changed.
        data: a tensor or a tuple of tensors with a row per sample, a TensorDataset, any map-style
            Dataset, or an iterable of batches that has a length, such as a DataLoader. A batch is a
            tensor, or a tuple, list or dict of tensors, and of lists and arrays with an item per
            sample; ``losses`` leaves it as it is. Lists and IterableDatasets, which may hold
            samples or batches, are given in a DataLoader.
        losses_of: ``losses_of(model, batch)`` instead of the method.
        test: data of the same kinds, which are measured after every epoch; where they have classes
            (int64, the second part of a pair or ``labels`` of a dict), also by class in the report.
        risk: its name, with its settings among ``settings`` (``alpha=0.9``); ``None``: cvar.
        epochs, batch_size, seed: of the training; ``None``: 20, 128 and 0. A DataLoader's own
            batches are taken as they are.
        output_dir: where the run goes; ``None``: runs/train-TIME.
        resume: go on with the run in ``output_dir``, if there is one: bit for bit as if it had
            not stopped, on one machine. Settings that are left out are those of the run. Of those
            that are given only ``epochs``, ``backward``, ``find_unused_parameters``, ``device`` and
            ``threads`` may be others; other data, test data, optimizers and schedulers are refused.
        optimizer: from the parameters of the copy to an optimizer; ``None``: Adam at 1e-3.
        scheduler: from an optimizer to a scheduler, which steps once an epoch, or after every step
            with ``scheduler_every="step"``. A ReduceLROnPlateau is told the model's own objective,
            of the test data where there are some.
        callbacks: see :class:`Callback`.
        collate_fn: from a list of a Dataset's samples to a batch.
        progress: whether to show it on stderr; this needs tqdm.
        settings: ``alpha``, ``groups`` (of ``risk="group"``), ``backward="tail"`` (through the
            samples of the tail alone, where the model treats samples independently),
            ``no_baseline=True`` (no standard model; otherwise both see the same batches and noise),
            ``scheduler_every``, ``sampling``, ``device``, ``threads``, ``checkpoint_every``,
            ``find_unused_parameters=True`` (under torchrun, of a model with parameters that a loss
            may leave out).

    Returns:
        TrainedRun: the models, the report, the directory and the metrics. The directory has
        ``config.json``, checkpoints (never half-written), ``metrics.csv``, ``report.md`` and
        ``report.json``.

    Under torchrun every rank calls this alike, with the same data; each takes its part of every
    batch, and the risk and batch norm are those of the whole batch. Noise comes from torch's
    default generators, which every step seeds, as does every batch that is read: what draws from
    ``random`` or NumPy in the main process is not repeated by ``resume``.

    Raises:
        UserError: a ValueError whose message names the argument, what was expected and what came.

    Example::

        >>> import tempfile, torch
        >>> from sqloss.training import train
        >>> class Line(torch.nn.Linear):
        ...     def losses(self, batch):
        ...         x, y = batch
        ...         return (self(x) - y).square().sum(1)
        >>> x = torch.randn(200, 2)
        >>> data = x, x.sum(1, keepdim=True)
        >>> directory = tempfile.mkdtemp()
        >>> run = train(Line(2, 1), data, alpha=0.9, epochs=2, output_dir=directory, progress=False)
        >>> sorted(run.models)
        ['cvar', 'standard']
    """
    own_settings = {"risk": risk, "epochs": epochs, "batch_size": batch_size, "seed": seed}
    given = typed(own_settings | settings)
    if output_dir == "":
        raise UserError("output_dir: expected a directory, got an empty name")
    place = None if output_dir is None else expanded(str(output_dir))
    if resume and place is None:
        raise UserError("resume: expected an output_dir with it, got none")
    has_losses = losses_of is not None or callable(getattr(model, "losses", None))
    if not isinstance(model, nn.Module) or not has_losses:
        raise UserError(
            "model: expected a module with a method losses(batch), or losses_of, got "
            f"{type(model).__name__}"
        )
    listed = callbacks if isinstance(callbacks, list | tuple) else [None]
    if not all(isinstance(each, Callback) for each in listed):
        raise UserError(f"callbacks: expected a list of objects of Callback, got {callbacks!r}")
    with ranks.joined(ends=False):
        if resume and place is not None and ranks.of_first((place / "config.json").exists):
            run = Run.resumed(CustomConfig, place, given)
        else:
            run = Run.new(place, configure(CustomConfig, **given))
        config, device = run.config, run.config.torch_device
        own = Own(
            model=model,
            losses_of=losses_of,
            optimizer=optimizer or partial(torch.optim.Adam, lr=1e-3),
            scheduler=scheduler,
            callbacks=callbacks if ranks.is_first() else (),
            test=None if test is None else as_data(test, device, collate_fn, "test"),
        )
        loaded = as_data(data, device, collate_fn, "data")
        run.set_up(CustomTrainer(own, loaded))
        shows = progress and ranks.is_first()
        bar = Progress(*run.steps(), config.epochs) if shows else Silence()
        finished = run.fit(bar)
        report = ranks.of_first(run.report) if finished else {}
    models = {name: each.eval() for name, each in run.training.models.items()}
    return TrainedRun(
        model=models[list(models)[-1]],
        models=models,
        report=report,
        directory=run.directory,
        metrics=run.training.history,
        finished=finished,
    )
