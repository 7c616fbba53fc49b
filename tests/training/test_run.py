import csv
import dataclasses
import json
import re
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
import torch

from sqloss.common import files
from sqloss.common.errors import UserError
from sqloss.common.files import create_atomically, write_atomically
from sqloss.common.flags import changed, flat
from sqloss.training.config import to_stored
from sqloss.training.run import Run
from sqloss.training.vae.config import VAEConfig


def test_a_run_is_never_overwritten(trainer, tmp_path):
    trainer.train(trainer.run(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds one; continue that one with --resume, "):
        trainer.run(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def start(trainer, run: Run) -> Run:
    return run.start(trainer.begin(run.config), trainer.data)


def test_the_default_directory_tells_the_data_set_and_the_time(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run.new(None, trainer.config)
    assert not (tmp_path / "runs").exists()
    directory = start(trainer, run).directory
    assert re.fullmatch(r"runs/vae-digits-\d{8}-\d{6}", directory.as_posix())
    assert (directory / "config.json").exists()


def test_runs_of_the_same_second_get_directories_of_their_own(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sqloss.training.run_directory.datetime", StoppedClock)
    runs = [Run.new(None, trainer.config) for _ in range(3)]
    directories = [start(trainer, run).directory.name for run in runs]
    first = "vae-digits-20260102-030405"
    assert directories == [first, f"{first}-2", f"{first}-3"]


class StoppedClock(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 2, 3, 4, 5)


def test_of_two_runs_that_want_one_directory_the_second_is_refused(trainer, tmp_path):
    first, second = trainer.run(tmp_path), trainer.run(tmp_path)
    start(trainer, first)
    with pytest.raises(UserError, match="expected a directory without a run"):
        start(trainer, second)


def test_of_many_that_make_a_file_at_once_one_does(tmp_path):
    path = tmp_path / "config.json"
    barrier = threading.Barrier(8)

    def attempt(number: int) -> bool:
        barrier.wait()
        try:
            create_atomically(path, bytes([number]) * 10_000)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(attempt, range(8)))
    assert made.count(True) == 1
    assert path.read_bytes() == bytes([made.index(True)]) * 10_000
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_not_made_over_another(tmp_path):
    create_atomically(tmp_path / "file", b"first")
    with pytest.raises(FileExistsError):
        create_atomically(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_directory_that_another_run_is_about_to_claim(trainer, tmp_path):
    run = trainer.run(tmp_path)
    rest = tmp_path / ".config.json.tmp"
    rest.touch()
    with pytest.raises(UserError, match=f"another run has just started; .* delete .*{rest}"):
        start(trainer, run)


def test_the_checkpoints_of_another_run_are_not_adopted(trainer, tmp_path):
    trainer.train(trainer.run(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds the checkpoint .*epoch-0004\.pt of one"):
        trainer.run(tmp_path)


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_directory_that_cannot_be_made(trainer, tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output-dir: cannot make a run in"):
        trainer.train(trainer.run(tmp_path / place))


def test_a_run_that_fails_before_its_first_checkpoint_gives_its_directory_back(trainer, tmp_path):
    run = trainer.run(tmp_path)
    with pytest.raises(MemoryError), start(trainer, run):
        raise MemoryError
    assert list(tmp_path.iterdir()) == []
    trainer.train(trainer.run(tmp_path))


def test_a_run_that_fails_after_a_checkpoint_can_be_resumed(trainer, tmp_path):
    training = trainer.begin(trainer.config)
    with pytest.raises(MemoryError), trainer.run(tmp_path).start(training, trainer.data) as new:
        new.save()
        raise MemoryError
    Run.resumed(VAEConfig, tmp_path, {})


def test_a_resumed_run_that_fails_can_be_resumed_again(trainer, tmp_path):
    start(trainer, trainer.run(tmp_path))
    with pytest.raises(MemoryError), start(trainer, Run.resumed(VAEConfig, tmp_path, {})):
        raise MemoryError
    Run.resumed(VAEConfig, tmp_path, {})


def test_the_configuration_comes_back_as_it_was(trainer, tmp_path):
    start(trainer, trainer.run(tmp_path))
    assert Run.resumed(VAEConfig, tmp_path, {}).config == stored(trainer.config)


def stored(config: VAEConfig) -> VAEConfig:
    return changed(config, data_dir=str(Path(config.data_dir).absolute()))


def test_the_data_are_found_from_every_working_directory(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer.config = changed(trainer.config, data_dir="here")
    start(trainer, trainer.run(tmp_path / "run"))
    assert Run.resumed(VAEConfig, tmp_path / "run", {}).config.root == tmp_path / "here"


def test_some_flags_may_change(trainer, tmp_path):
    trainer.train(trainer.run(tmp_path))
    changes = {"epochs": 6, "device": "cpu", "threads": 2, "data_dir": "there", "download": True}
    changes |= {"backward": "tail", "microbatch_size": 8}
    run = Run.resumed(VAEConfig, tmp_path, changes)
    assert run.config == changed(trainer.config, **changes)
    run.start(trainer.begin(run.config), trainer.data)
    assert Run.resumed(VAEConfig, tmp_path, {}).config == stored(run.config), "the change is kept"


@pytest.mark.parametrize(
    ("name", "value"), [("lr", 0.5), ("alpha", 0.9), ("seed", 3), ("dataset", "mnist")]
)
def test_other_flags_may_not(trainer, tmp_path, name, value):
    trainer.train(trainer.run(tmp_path))
    same = flat(trainer.config)[name]
    with pytest.raises(UserError) as raised:
        Run.resumed(VAEConfig, tmp_path, {name: value})
    assert f"--{name}: expected {same}, with which {tmp_path} was started, got {value}" in str(
        raised.value
    )
    Run.resumed(VAEConfig, tmp_path, {name: same})  # the same is no change


def test_fewer_epochs_than_done(trainer, tmp_path):
    trainer.train(trainer.run(tmp_path))
    with pytest.raises(UserError, match=r"--epochs: expected at least 4.*got 3"):
        trainer.train(Run.resumed(VAEConfig, tmp_path, {"epochs": 3}))


@pytest.mark.parametrize("part", ["images", "labels"])
def test_other_data(trainer, tmp_path, part):
    trainer.train(trainer.run(tmp_path))
    images, labels = trainer.data.train_images.flip(0), trainer.data.test_labels.flip(0)
    changes = {"train_images": images} if part == "images" else {"test_labels": labels}
    trainer.data = dataclasses.replace(trainer.data, **changes)
    with pytest.raises(UserError, match="--data-dir: expected the data that"):
        trainer.train(Run.resumed(VAEConfig, tmp_path, {"epochs": 5}))


@pytest.mark.parametrize(
    "edit",
    [
        lambda s: {"epoch": 4, "step": 0},
        lambda s: s | {"models": {"standard": s["models"]["standard"]}},
        lambda s: s | {"models": {name: {} for name in s["models"]}},
        lambda s: s | {"optimisers": 3},
        lambda s: s | {"history": s["history"][1:]},
        lambda s: s | {"history": [{"epoch": 1}] * len(s["history"])},
        lambda s: s | {"noise": torch.zeros(3)},
    ],
)
def test_a_checkpoint_that_is_not_of_this_run(trainer, tmp_path, edit):
    training, _ = trainer.train(trainer.run(tmp_path))
    state = training.state_dict() | {"data": trainer.data.fingerprint()}
    newest = tmp_path / "checkpoints" / "epoch-0004.pt"
    torch.save(edit(state), newest)
    with pytest.raises(UserError, match=f"--resume: expected the checkpoint {newest} to be one"):
        start(trainer, Run.resumed(VAEConfig, tmp_path, {}))


def test_a_checkpoint_of_another_size(trainer, tmp_path):
    trainer.train(trainer.run(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden": "9"}))
    with pytest.raises(UserError, match=r"does not fit .*size mismatch") as raised:
        start(trainer, Run.resumed(VAEConfig, tmp_path, {}))
    assert "\n" not in str(raised.value)


def test_a_directory_without_a_run(tmp_path):
    with pytest.raises(UserError, match="--resume: expected the directory of a run"):
        Run.resumed(VAEConfig, tmp_path, {})


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda c: c | {"learning_rate": 1}, "missing or unknown.*learning_rate"),
        (lambda c: {k: v for k, v in c.items() if k != "beta"}, "missing or unknown.*beta"),
        (lambda c: c | {"command": "gan"}, "expected a run of sqloss vae, got one of sqloss gan"),
        (lambda c: {k: v for k, v in c.items() if k != "command"}, "missing or unknown.*command"),
        (lambda c: c | {"alpha": 2}, "--alpha: expected a number in"),
        (lambda c: c | {"alpha": "much"}, "alpha: expected float, got 'much'"),
        (lambda c: c | {"download": "false"}, "download: expected bool, got 'false'"),
        (lambda c: c | {"epochs": 2.9}, r"epochs: expected int, got 2\.9"),
        (lambda c: c | {"seed": True}, "seed: expected int, got True"),
        (lambda c: [c], ""),
    ],
)
def test_a_configuration_that_was_edited_wrongly(trainer, tmp_path, edit, told):
    config = to_stored(trainer.config)
    (tmp_path / "config.json").write_text(json.dumps(edit(config)))
    with pytest.raises(UserError, match=f"--resume: cannot use.*{told}"):
        Run.resumed(VAEConfig, tmp_path, {})


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


@pytest.mark.parametrize("rest", [None, b"epoch,model\n1,standard\n"])
def test_lost_or_outdated_metrics_come_back(trainer, tmp_path, rest):
    trainer.train(trainer.run(tmp_path))
    path = tmp_path / "metrics.csv"
    before = path.read_bytes()
    path.unlink()
    if rest is not None:
        path.write_bytes(rest)
    trainer.train(Run.resumed(VAEConfig, tmp_path, {}))
    assert path.read_bytes() == before


def test_tensorboard_gets_every_row_once(trainer, tmp_path, monkeypatch):
    written, purged = [], []

    class SummaryWriter:
        def __init__(self, directory, purge_step):
            assert directory == tmp_path / "tensorboard"
            purged.append(purge_step)

        def add_scalar(self, tag, value, epoch):
            written.append((tag, value, epoch))

        def flush(self):
            pass

    stand_in = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    trainer.train(Run.new(tmp_path, changed(trainer.config, epochs=2)))
    training, _ = trainer.train(Run.resumed(VAEConfig, tmp_path, {"epochs": 3}))
    assert sorted(written) == sorted(
        (f"{metric}/{row['model']}", value, row["epoch"])
        for row in training.history
        for metric, value in row.items()
        if metric not in ("epoch", "model")
    )
    assert purged == [1, 3], "what an earlier process wrote of later epochs is not shown twice"


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
