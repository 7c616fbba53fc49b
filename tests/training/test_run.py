import csv
import dataclasses
import json
import re
import sys
import types

import pytest
import torch

from sqloss.training import files
from sqloss.training.config import Config
from sqloss.training.errors import UserError
from sqloss.training.files import write_atomically
from sqloss.training.run import Run

# configuration


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("alpha", 1.0, "a number in [0, 1)"),
        ("alpha", -0.1, "a number in [0, 1)"),
        ("alpha", float("nan"), "a number in [0, 1)"),
        ("epochs", 0, "a whole number from 1 up"),
        ("batch_size", 0, "a whole number from 1 up"),
        ("num_samples", 0, "a whole number from 1 up"),
        ("checkpoint_every", 0, "a whole number from 1 up"),
        ("hidden", -1, "a whole number from 1 up"),
        ("latent", 0, "a whole number from 1 up"),
        ("lr", 0.0, "a number above 0"),
        ("lr", float("inf"), "a number above 0"),
        ("beta", -1.0, "a number from 0 up"),
        ("limit", -1, "a whole number from 0 up"),
        ("image_size", -1, "a whole number from 0 up"),
        ("seed", -1, "a whole number from 0 up"),
        ("threads", -1, "a whole number from 0 up"),
        ("dataset", "imagenet", "one of digits, mnist, fashion, cifar10, celeba, folder"),
        ("tail", "kl", "one of elbo, reconstruction"),
    ],
)
def test_a_bad_value_names_its_flag_what_is_expected_and_what_came(name, value, expected):
    with pytest.raises(UserError) as raised:
        Config(**{name: value})
    assert str(raised.value) == f"--{name.replace('_', '-')}: expected {expected}, got {value}"


def test_the_device_is_one_that_is_there():
    best = "cuda" if torch.cuda.is_available() else "cpu"
    assert Config(device="auto").torch_device == torch.device(best)
    assert Config(device="cpu").torch_device == torch.device("cpu")
    for absent in ("tpu", "cuda:99"):
        with pytest.raises(UserError, match=f"--device: expected auto or.*got {absent}"):
            _ = Config(device=absent).torch_device


def test_the_measured_tail_is_the_trained_one_or_the_usual_one():
    assert Config(alpha=0.5).metric_alpha == 0.5
    assert Config(alpha=0.0).metric_alpha == 0.8


# directory


def test_a_run_is_never_overwritten(trainer, tmp_path):
    trainer.train(trainer.run(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"holds one; continue that one with --resume {tmp_path}"):
        trainer.run(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_default_directory_tells_the_data_set_and_the_time(trainer):
    directory = Run.new(None, trainer.config).directory
    assert re.fullmatch(r"runs/vae-digits-\d{8}-\d{6}", directory.as_posix())
    assert not directory.exists()


def test_a_directory_that_cannot_be_made(trainer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output-dir: cannot make"):
        trainer.train(trainer.run(tmp_path / "file" / "run"))


def test_the_configuration_comes_back_as_it_was(trainer, tmp_path):
    trainer.run(tmp_path).start(trainer.begin(trainer.config), trainer.data)
    assert Run.resumed(tmp_path, {}).config == trainer.config


def test_some_flags_may_change(trainer, tmp_path):
    trainer.train(trainer.run(tmp_path))
    changes = {"epochs": 6, "device": "cpu", "threads": 2, "data_dir": "there", "download": True}
    run = Run.resumed(tmp_path, changes)
    assert run.config == dataclasses.replace(trainer.config, **changes)
    run.start(trainer.begin(run.config), trainer.data)
    assert Run.resumed(tmp_path, {}).config == run.config, "the change is kept"


@pytest.mark.parametrize(
    ("name", "value"), [("lr", 0.5), ("alpha", 0.9), ("seed", 3), ("dataset", "mnist")]
)
def test_other_flags_may_not(trainer, tmp_path, name, value):
    trainer.train(trainer.run(tmp_path))
    stored = getattr(trainer.config, name)
    with pytest.raises(UserError) as raised:
        Run.resumed(tmp_path, {name: value})
    assert f"--{name}: expected {stored}, with which {tmp_path} was started, got {value}" in str(
        raised.value
    )
    assert Run.resumed(tmp_path, {name: stored}).config == trainer.config, "the same is no change"


def test_fewer_epochs_than_done(trainer, tmp_path):
    trainer.train(trainer.run(tmp_path))
    with pytest.raises(UserError, match=r"--epochs: expected at least 4.*got 3"):
        trainer.train(Run.resumed(tmp_path, {"epochs": 3}))


def test_other_data(trainer, tmp_path):
    trainer.train(trainer.run(tmp_path))
    images = trainer.data.train_images.flip(0)
    trainer.data = dataclasses.replace(trainer.data, train_images=images)
    with pytest.raises(UserError, match="--data-dir: expected the data that"):
        trainer.train(Run.resumed(tmp_path, {"epochs": 5}))


def test_a_directory_without_a_run(tmp_path):
    with pytest.raises(UserError, match="--resume: expected the directory of a run"):
        Run.resumed(tmp_path, {})


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda c: c | {"learning_rate": 1}, "missing or unknown.*learning_rate"),
        (lambda c: {k: v for k, v in c.items() if k != "beta"}, "missing or unknown.*beta"),
        (lambda c: c | {"alpha": 2}, "--alpha: expected a number in"),
        (lambda c: c | {"alpha": "much"}, "could not convert"),
        (lambda c: [c], "'list' object"),
    ],
)
def test_a_configuration_that_was_edited_wrongly(trainer, tmp_path, edit, told):
    config = dataclasses.asdict(trainer.config)
    (tmp_path / "config.json").write_text(json.dumps(edit(config)))
    with pytest.raises(UserError, match=f"--resume: cannot use.*{told}"):
        Run.resumed(tmp_path, {})


def test_metrics_are_tidy(trainer, tmp_path):
    training, _ = trainer.train(trainer.run(tmp_path))
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["model"]) for row in rows] == [
        (str(epoch), model) for epoch in (1, 2, 3, 4) for model in ("standard", "cvar")
    ]
    for row, known in zip(rows, training.history, strict=True):
        assert {k: float(v) for k, v in row.items() if k != "model"} == {
            k: v for k, v in known.items() if k != "model"
        }


def test_tensorboard_gets_every_row_once(trainer, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, directory):
            assert directory == tmp_path / "tensorboard"

        def add_scalar(self, tag, value, epoch):
            written.append((tag, value, epoch))

        def flush(self):
            pass

    stand_in = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    trainer.train(Run.new(tmp_path, dataclasses.replace(trainer.config, epochs=2)))
    training, _ = trainer.train(Run.resumed(tmp_path, {"epochs": 3}))
    assert sorted(written) == sorted(
        (f"{metric}/{row['model']}", value, row["epoch"])
        for row in training.history
        for metric, value in row.items()
        if metric not in ("epoch", "model")
    )


def test_training_does_without_tensorboard(trainer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    _, finished = trainer.train(trainer.run(tmp_path))
    assert finished
    assert not (tmp_path / "tensorboard").exists()


# files


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_keeps_the_old_content_and_leaves_no_rest(tmp_path, monkeypatch, failure):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(_descriptor):
        raise failure

    monkeypatch.setattr(files.os, "fsync", fail)
    expected = UserError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
