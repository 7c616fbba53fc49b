"""How long a training will take."""

import time
from types import SimpleNamespace

import pytest
import torch

from sqloss import cli
from sqloss.training import command
from sqloss.training.estimate import estimate
from sqloss.training.progress import duration
from sqloss.training.run import Run

for needed in ("matplotlib", "scipy", "sklearn", "tqdm", "joblib"):
    pytest.importorskip(needed)


class Trial:
    """A training whose first steps take ten seconds, and later ones one or, every third, seven."""

    round = 3
    epoch = step = 0

    def __init__(self, clock):
        self.clock = clock
        self.history = []

    def train_step(self, rows):
        self.clock.now += 10 if self.step < 3 else 7 if self.step % 3 == 2 else 1

    def measure(self, data):
        self.clock.now += 4
        return []


class Data:
    def __len__(self):
        return 10

    def batches(self, rows, training):
        return iter(rows)


@pytest.fixture
def run(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    config = SimpleNamespace(epochs=12, batch_size=4, seed=0, torch_device=torch.device("cpu"))
    return SimpleNamespace(
        config=config,
        data=Data(),
        steps=lambda: (360, 60),
        training=SimpleNamespace(epoch=2, round=Trial.round),
        trainer=SimpleNamespace(begin=lambda *_: Trial(clock)),
    )


def test_whole_rounds_after_the_first_and_the_ends_of_epochs_are_counted(run):
    # 300 steps of three seconds in the mean, and ten ends of four
    expected = "training: 10 epochs of about 94 s each, 16 min in all, and then the report"
    assert estimate(run) == expected


def test_a_short_training_is_not_timed(run):
    run.steps = lambda: (65, 6)
    assert estimate(run) is None
    run.steps = lambda: (66, 6)
    assert estimate(run) is not None


def stopped(run):
    raise KeyboardInterrupt


@pytest.mark.parametrize("line", [["vae"], ["gan", "--width", "4", "--d-steps", "2"]])
def test_the_run_is_the_same_bit_for_bit(line, tmp_path, monkeypatch, capsys):
    line = [*line, "--train-limit", "100", "--batch-size", "10", "--epochs", "5"]
    line += ["--output-dir"]
    monkeypatch.setattr(Run, "report", stopped)
    assert cli.main([*line, str(tmp_path / "with")]) == command.INTERRUPTED
    assert "training: 5 epochs of about " in capsys.readouterr().err
    monkeypatch.setattr(command, "estimate", lambda run: None)
    assert cli.main([*line, str(tmp_path / "without")]) == command.INTERRUPTED
    assert "training: " not in capsys.readouterr().err
    one, other = (tmp_path / name / "metrics.csv" for name in ("with", "without"))
    assert one.read_bytes() == other.read_bytes()


def test_a_run_that_is_too_large_gives_its_directory_back(tmp_path, monkeypatch):
    def large(run):
        raise MemoryError

    monkeypatch.setattr(command, "estimate", large)
    assert cli.main(["vae", "--epochs", "2", "--output-dir", str(tmp_path)]) == 2
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0312, "0.031 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (99.4, "99 s"),
        (99.6, "2 min"),
        (5969, "99 min"),
        (6000, "1 h 40 min"),
        (35940, "9 h 59 min"),
        (400000, "111 h"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words
