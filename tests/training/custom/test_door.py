import contextlib
import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import ClassVar
from unittest import mock

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import sqloss.training
from sqloss.common import ranks
from sqloss.training import Callback, UserError, train

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("quick_reports")
EXAMPLES = Path(__file__).parents[3] / "examples"
PAGE = EXAMPLES.parent / "docs" / "your_own_model.md"


class Line(nn.Linear):
    def __init__(self):
        super().__init__(2, 1)
        with torch.no_grad():
            self.weight.fill_(0.1)
            self.bias.zero_()

    def losses(self, batch):
        x, y = batch
        return (self(x) - y).square().sum(1)


class Noisy(Line):
    """Its losses depend on torch's default generator."""

    def losses(self, batch):
        x, y = batch
        return (self(x + 0.1 * torch.randn_like(x)) - y).square().sum(1)


def points(count=50):
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    return x, x.sum(1, keepdim=True) + torch.arange(count)[:, None] % 3


def fit(directory, model=None, data=None, **settings):
    settings = {"epochs": 3, "batch_size": 16, "progress": False, **settings}
    data = points() if data is None else data
    model = Line() if model is None else model
    return train(model, data, **{"output_dir": directory, **settings})


def same(first, second):
    for name in first.models:
        for a, b in zip(
            first.models[name].parameters(), second.models[name].parameters(), strict=True
        ):
            assert torch.equal(a, b)
    assert first.metrics == second.metrics


def test_what_comes_back_and_what_is_written(tmp_path):
    model = Line()
    before = torch.get_rng_state()
    run = fit(tmp_path, model, test=points(20))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.weight.eq(0.1).all(), "a copy is trained"
    assert list(run.models) == ["standard", "cvar"] and run.model is run.models["cvar"]
    assert not run.model.training and run.finished and run.directory == tmp_path
    assert [(row["epoch"], row["model"]) for row in run.metrics] == [
        (epoch, name) for epoch in (1, 2, 3) for name in run.models
    ]
    last = run.metrics[-1]
    assert run.report["models"]["cvar"]["test"]["loss_cvar"] == last["test_loss_cvar"]
    assert last["test_objective_cvar"] == last["test_loss_cvar"] > last["test_loss"]
    assert {"config.json", "metrics.csv", "report.json", "report.md", "loss_curves.png"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_the_mean_is_that_of_a_plain_loop(tmp_path):
    run = fit(tmp_path, risk="mean", epochs=1, batch_size=50)
    model = Line()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss = model.losses(points()).mean()
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(run.model.weight, model.weight)
    assert run.metrics[0]["train_objective"] == pytest.approx(loss.item())
    assert list(run.models) == ["standard"]


def halving(model, batch):
    batch[0].mul_(0.5)
    return model.losses(batch)


OTHER = Line()


class Fewer:
    """Says that it has more batches than it has."""

    def __len__(self):
        return 2

    def __iter__(self):
        yield points()


class Streamed(IterableDataset):
    def __iter__(self):
        return iter([points()])


PERSISTENT = DataLoader(TensorDataset(*points()), 16, num_workers=1, persistent_workers=True)


class Dicts(Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, i):
        x, y = points()
        return {"x": x[i], "y": y[i]}


class Batches:
    """An iterable of its own."""

    def __len__(self):
        return 1

    def __iter__(self):
        yield points()


def of_dict(model, batch):
    return model.losses((batch["x"], batch["y"]))


def test_all_kinds_of_data_come_to_the_same(tmp_path):
    run = fit(tmp_path / "tuple")
    same(fit(tmp_path / "dataset", data=TensorDataset(*points())), run)
    same(fit(tmp_path / "dicts", data=Dicts(), losses_of=of_dict), run)
    x, _ = points()
    single = fit(tmp_path / "tensor", data=x, losses_of=lambda m, x: m.losses((x, x[:, :1])))
    assert len(single.metrics) == 6
    loader = DataLoader(TensorDataset(*points()), 50)
    same(fit(tmp_path / "loader", data=loader), fit(tmp_path / "batches", data=Batches()))


def test_classes_are_reported_one_by_one(tmp_path):
    x, _ = points()
    data = x, torch.arange(50) % 3

    def losses_of(model, batch):
        return (model(batch[0])[:, 0] - batch[1]).square()

    run = fit(tmp_path, data=data, losses_of=losses_of, test=data, sampling="balanced")
    rows = run.report["models"]["cvar"]["test_by_class"]
    assert [(row["class"], row["samples"]) for row in rows] == [(0, 17), (1, 17), (2, 16)]
    with torch.no_grad():
        losses = losses_of(run.model, data).double()
    assert rows[2]["loss"] == pytest.approx(losses[data[1] == 2].mean().item())
    assert "| class | test |" in (tmp_path / "report.md").read_text()


class Seeing(Line):
    def features(self, batch):
        return batch[0] + 0 * self.weight


def test_it_samples_by_what_a_model_of_ones_own_or_a_file_says(tmp_path):
    settings = {"sampling": "communities", "neighbours": 3, "sampling_from": 0.0}
    own = fit(tmp_path / "own", Seeing(), **settings)
    numpy.save(tmp_path / "x.npy", points()[0].numpy())
    of_file = fit(tmp_path / "file", features=str(tmp_path / "x.npy"), **settings)
    same(own, of_file)
    found = own.report["sampling"]
    assert sum(group["size"] for group in found["groups"]) == 50
    assert "classes_that_pay" not in found


def test_it_trains_on_groups_by_labels_a_file_or_what_a_model_sees(tmp_path):
    x, _ = points()
    data = x, torch.arange(50) % 3

    def losses_of(model, batch):
        return (model(batch[0])[:, 0] - batch[1]).square()

    settings = {"data": data, "losses_of": losses_of, "test": data, "risk": "group", "alpha": 0.5}
    by_labels = fit(tmp_path / "labels", groups="labels", **settings)
    numpy.save(tmp_path / "groups.npy", data[1].numpy())
    same(by_labels, fit(tmp_path / "file", groups=str(tmp_path / "groups.npy"), **settings))
    found = by_labels.report["groups"]["group"]["groups"]
    assert [(group["group"], group["size"]) for group in found] == [(0, 17), (1, 17), (2, 16)]
    assert found[2]["weight"] == pytest.approx(2 / 3)  # the largest targets, of losses far from 0
    losses = {name: model["test"]["loss"] for name, model in by_labels.report["models"].items()}
    assert losses["group"] > losses["standard"]
    seen = fit(tmp_path / "seen", Seeing(), risk="group", groups_from=0.0)
    assert sum(group["size"] for group in seen.report["groups"]["group"]["groups"]) == 50


class Stopping(Callback):
    def __init__(self, after):
        self.after = after

    def on_step(self, model, metrics):
        self.after -= 1
        if self.after == 0:
            signal.raise_signal(signal.SIGINT)


class Augmented(Dataset):
    """Its samples are other ones whenever they are read."""

    def __len__(self):
        return 50

    def __getitem__(self, i):
        x, y = points()
        return x[i] + 0.1 * torch.randn(2), y[i]


@pytest.mark.parametrize("kind", ["rows", "augmented", "loader", "augmented loader", "generator"])
def test_a_stopped_run_is_resumed_bit_for_bit(tmp_path, kind):
    def data():
        rows = Augmented() if "augmented" in kind else TensorDataset(*points())
        own = torch.Generator() if kind == "generator" else None
        shuffled = DataLoader(rows, 16, shuffle=True, generator=own)
        return rows if kind in ("rows", "augmented") else shuffled

    def scheduler(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: numpy.cos(e / 10))

    settings = {"model": Noisy(), "test": points(20), "scheduler": scheduler}
    whole = fit(tmp_path / "whole", data=data(), **settings)
    stopped = fit(tmp_path / "parts", data=data(), callbacks=[Stopping(11)], **settings)
    assert not stopped.finished and stopped.report == {}
    resumed = fit(tmp_path / "parts", data=data(), resume=True, **settings)
    same(resumed, whole)
    assert resumed.report["models"] == whole.report["models"]


def sgd(lr=0.01):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def halved(every=1):
    return lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, every, 0.5)


def test_a_resumed_run_keeps_its_settings_and_refuses_others(tmp_path):
    brought = {"test": points(20), "optimizer": sgd(), "scheduler": halved()}
    brought |= {"output_dir": tmp_path, "progress": False}
    settings = {"epochs": 2, "batch_size": 10, "seed": 3, "alpha": 0.6, "no_baseline": True}
    train(Line(), points(), **brought, **settings, scheduler_every="step")
    longer = train(Line(), points(), **brought, resume=True, epochs=3)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored.items() >= (settings | {"epochs": 3, "scheduler_every": "step"}).items()
    again = train(Line(), points(), **brought, resume=True)
    assert again.metrics == longer.metrics and len(longer.metrics) == 3

    for changes, message in [
        ({"batch_size": 8}, "batch_size: expected 10, with which .*, got 8; with resume only epo"),
        ({"risk": "mean"}, "risk: expected cvar, with which"),
        ({"no_baseline": False}, "no_baseline: expected True, with which"),
        ({"test": points(21)}, "test: expected data with the hash "),
        ({"test": None}, "test: expected data with the hash .*, got none"),
        ({"optimizer": None}, r"optimizer: expected SGD\(lr=0.01.*, got Adam\(lr=0.001"),
        ({"optimizer": sgd(0.02)}, r"optimizer: expected SGD\(lr=0.01.*, got SGD\(lr=0.02"),
        ({"scheduler": None}, r"scheduler: expected StepLR\(step_size=1.*, got none"),
        ({"scheduler": halved(2)}, r"scheduler: expected .*, got StepLR\(step_size=2"),
        ({"data": points(51)}, "data: expected the data that"),
        ({"resume": False}, "output_dir: expected a directory .* continue that one with resume, "),
        ({"epochs": 1}, "epochs: expected at least 3"),
    ]:
        with pytest.raises(UserError, match=f"^train: {message}"):
            train(**{"model": Line(), "data": points(), "resume": True} | brought | changes)


class Telling(torch.optim.lr_scheduler.ReduceLROnPlateau):
    told: ClassVar[list] = []

    def step(self, metrics):
        super().step(metrics)
        self.told.append(metrics)


def test_schedulers(tmp_path):
    rates = []

    class Noting(Callback):
        def on_step(self, model, metrics):
            rates.append(schedulers[-1].get_last_lr()[0])

    schedulers = []

    def one_cycle(optimizer):
        schedulers.append(torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=13))
        return schedulers[-1]

    settings = {"risk": "mean", "optimizer": sgd(), "callbacks": [Noting()]}
    fit(tmp_path / "steps", scheduler=one_cycle, scheduler_every="step", **settings)
    assert len(rates) == 12 and max(rates) > 0.09 and rates[-1] < 1e-5
    run = fit(tmp_path / "plateau", scheduler=Telling, test=points(20), no_baseline=True)
    assert Telling.told == [row["test_objective_cvar"] for row in run.metrics]


class Interrupted(Augmented):
    """A worker that reads it gets the Ctrl-C of a terminal, twice."""

    def __getitem__(self, i):
        if torch.utils.data.get_worker_info():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return super().__getitem__(i)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a test of what processes inherit")
def test_ctrl_c_ends_no_worker_of_a_loader(tmp_path):
    loader = DataLoader(Interrupted(), 16, num_workers=1, multiprocessing_context="fork")
    stopped = fit(tmp_path, data=loader, callbacks=[Stopping(3)])
    assert not stopped.finished and (tmp_path / "checkpoints").exists()


def test_a_checkpoint_that_could_not_be_read_is_not_written(tmp_path):
    class Holding(torch.optim.SGD):
        def state_dict(self):
            return super().state_dict() | {"mine": {"range": range(3)}}

    with pytest.raises(UserError, match=r"cannot save .*: expected .*, got builtins\.range, whi"):
        fit(tmp_path, optimizer=Holding)


def test_backward_through_the_tail_alone(tmp_path):
    dense, tail = (fit(tmp_path / of, backward=of, alpha=0.7) for of in ("dense", "tail"))
    for name in dense.models:
        torch.testing.assert_close(dense.models[name].weight, tail.models[name].weight)
    with pytest.raises(ValueError, match=r"tail_loss: fn: .*random"):
        fit(tmp_path / "noisy", Noisy(), backward="tail")


class Normed(nn.Sequential):
    """With batch norm of maps of so many pixels."""

    def __init__(self, pixels):
        super().__init__(nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2))
        self.pixels = pixels

    def losses(self, batch):
        return self(batch[0][:, None, : self.pixels]).square().mean((1, 2))


@pytest.mark.parametrize(
    ("data", "batch_size", "message"),
    [
        (
            points(50),
            7,
            "batch_size: expected .*2 samples.* got 7, which leaves a batch of 1 of 50",
        ),
        (points(3), 1, "batch_size: .* got 1, which leaves a batch of 1 of 3 samples"),
        (DataLoader(TensorDataset(*points(5)), 2), 9, "data: .* got one of 1; .*drop_last=True"),
    ],
)
def test_batch_norm_of_one_sample(tmp_path, data, batch_size, message):
    """It is refused, where torch refuses it: a map of two pixels has statistics."""
    one, two = Normed(1), Normed(2)
    settings = {"data": data, "batch_size": batch_size, "epochs": 1}
    before = torch.get_rng_state()
    with pytest.raises(UserError, match=f"train: {message}"):
        fit(tmp_path / "refused", one, **settings)
    assert not (tmp_path / "refused" / "config.json").exists()
    assert fit(tmp_path / "two", two, **settings).finished
    assert torch.equal(torch.get_rng_state(), before)


class Compiled(Noisy):
    """Its losses are what they are when they are compiled alone."""

    def losses(self, batch):
        return super().losses(batch) * (1.0 if torch.compiler.is_compiling() else torch.nan)


def test_the_losses_of_a_compiled_model_are_compiled(tmp_path):
    settings = {"model": torch.compile(Compiled(), backend="eager"), "test": points(20)}
    whole = fit(tmp_path / "whole", **settings)
    assert {name.partition(".")[0] for name in whole.model.state_dict()} == {"_orig_mod"}
    assert not fit(tmp_path / "parts", callbacks=[Stopping(11)], **settings).finished
    same(fit(tmp_path / "parts", resume=True, **settings), whole)


class Recording(Callback):
    def __init__(self):
        self.steps, self.epochs, self.pictures = [], [], []

    def on_step(self, model, metrics):
        self.steps.append((model, *metrics))

    def on_epoch(self, model, metrics):
        self.epochs.append((model, metrics["epoch"]))

    def on_picture(self, name, path):
        assert path.exists()
        self.pictures.append(name)


def test_callbacks(tmp_path):
    told = Recording()
    run = fit(tmp_path, callbacks=[told], test=points(20))
    assert told.steps == [("standard", "train_objective"), ("cvar", "train_objective")] * 4 * 3
    assert told.epochs == [(row["model"], row["epoch"]) for row in run.metrics]
    assert told.pictures == ["loss_curves", "loss_distribution"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": nn.Linear(2, 1)}, "train: model: expected a module with a method losses"),
        ({"data": 3}, "train: data: expected a tensor, a tuple of tensors"),
        ({"data": (torch.ones(3, 2), torch.ones(4, 1))}, "train: data: expected batches of tensor"),
        ({"data": (torch.ones(0, 2), torch.ones(0, 1))}, "train: data: expected"),
        ({"data": iter([points()])}, "train: data: expected an iterable that knows its number"),
        ({"losses_of": lambda m, b: m.losses(b).mean()}, r"train: losses: expected one per sample"),
        ({"sampling": "balanced"}, "train: sampling: expected data with labels"),
        ({"sampling": "density"}, "train: features: expected one of FILE.npy here, got auto"),
        ({"data": Batches(), "sampling": "balanced"}, "train: sampling: expected data with rows"),
        ({"data": Batches(), "risk": "group"}, "train: risk: expected data with rows for group"),
        ({"risk": "group"}, "train: groups: expected labels or FILE.npy, as the model has no feat"),
        ({"risk": "worst"}, "train: risk: expected one of cvar, mean"),
        ({"alpha": 1.0}, r"train: alpha: expected a number in \[0, 1\)"),
        ({"learning_rate": 1.0}, "train: settings: expected some of a"),
        ({"risk": "mean", "backward": "tail"}, "train: backward: expected dense with risk=mean"),
        ({"data": Fewer()}, "train: data: expected an iterable with as many batches as its length"),
        ({"data": dict(x=points()[0])}, "train: data: expected a tensor, .* got a dict"),
        ({"losses_of": halving}, "train: losses: expected a batch to stay as it is"),
        (
            {"losses_of": lambda _, b: OTHER.losses(b)},
            "train: losses: expected losses of the model",
        ),
        (
            {"optimizer": lambda _: torch.optim.SGD(OTHER.parameters())},
            "train: optimizer: expected",
        ),
        ({"optimizer": sgd()([OTHER.bias])}, "train: optimizer: expected a function, got SGD"),
        ({"optimizer": torch.optim.LBFGS}, "train: optimizer: expected one whose step needs no"),
        ({"scheduler": lambda _: 3}, "train: scheduler: expected a function .* to int"),
        ({"callbacks": [print]}, "train: callbacks: expected a list of objects of Callback"),
        ({"model": Line().requires_grad_(False)}, "train: model: expected one with parameters"),
        ({"model": Line}, "train: model: expected a module with a method losses.* got type"),
        ({"data": [points()]}, r"train: data: .* got list, .*DataLoader\(data, batch_size=None\)"),
        ({"data": Streamed()}, "train: data: .* got Streamed, which may hold samples or batches"),
        ({"test": [points()]}, r"train: test: .* DataLoader\(test, batch_size=None\)"),
        ({"data": PERSISTENT}, "train: data: expected .* got one with persistent_workers=True"),
        ({"losses_of": lambda m, b: None}, "train: losses: expected a tensor or .* got NoneType"),
        ({"losses_of": lambda m, b: {"a": 1.0}}, "train: losses: expected a tensor, got a, float"),
        ({"losses_of": lambda m, b: m.losses(b).long()}, "train: losses: .* got loss, torch.int64"),
        ({"losses_of": lambda m, b: m.losses(b).detach()}, "train: losses: expected losses of the"),
        ({"scheduler_every": "batch"}, "train: scheduler_every: expected one of epoch, step"),
        ({"risk": "mean", "no_baseline": True}, "train: no_baseline: expected .* got risk=mean"),
        ({"optimizer": lambda _: 3}, "train: optimizer: expected a function from parameters"),
        ({"epochs": 2.5}, "train: epochs: expected int, got 2.5"),
        ({"alpha": "0.9"}, "train: alpha: expected float, got '0.9'"),
        ({"epochs": 0}, "train: epochs: expected a whole number from 1"),
        ({"output_dir": ""}, "train: output_dir: expected a directory, got an empty name"),
    ],
)
def test_errors(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        fit(tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.skipif(not PAGE.exists(), reason="an sdist has no docs")
def test_the_page_of_docs(tmp_path, monkeypatch, capsys):
    """Its code runs in one piece, its callbacks with tools that note what they are told."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict = {}
    exec("\n".join(blocks), names)
    assert "loss_cvar" in capsys.readouterr().out
    for module in ("wandb", "mlflow", "aim"):
        monkeypatch.setitem(sys.modules, module, mock.MagicMock())
    callbacks = [names[name]() for name in ("WandB", "MLflow", "Aim")]
    fit(tmp_path / "run", callbacks=callbacks, epochs=1, test=points(20))
    assert callbacks[0].run.log.call_args_list[0].args[0]["train_objective/standard"] > 0
    assert sys.modules["mlflow"].log_metrics.call_args.kwargs == {"step": 1}
    assert sys.modules["mlflow"].log_artifact.call_count == 2
    assert callbacks[2].run.track.call_args.kwargs["context"] == {"model": "cvar"}


def run_example(name, directory):
    """What the script tells."""
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text().splitlines()) <= 45
    with (
        mock.patch.object(sys, "argv", [str(script), str(directory)]),
        contextlib.redirect_stdout(io.StringIO()) as told,
    ):
        runpy.run_path(str(script), run_name="__main__")
    assert "| test: loss_cvar " in told.getvalue()
    return told.getvalue()


def test_the_example_of_a_flow(tmp_path, monkeypatch):
    monkeypatch.setattr(sqloss.training, "train", partial(train, epochs=2))
    assert "| class | test |" not in run_example("flow", tmp_path)


def test_the_example_of_a_classifier_alone_and_on_ranks(tmp_path):
    assert "| class | test |" in run_example("classifier", tmp_path / "one")
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is not available")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    script = [sys.executable, str(EXAMPLES / "classifier.py"), str(tmp_path / "ranks")]
    processes = [
        subprocess.Popen(
            script,
            env=os.environ
            | dict.fromkeys(ranks.GIVEN, str(rank))
            | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", **address},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    assert [process.wait(300) for process in processes] == [0, 0]
    one, several = (
        (tmp_path / run / "metrics.csv").read_text().splitlines()[-1].split(",")
        for run in ("one", "ranks")
    )
    assert several[1] == "cvar"
    for a, b in zip(one[2:], several[2:], strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-3)
