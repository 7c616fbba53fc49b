"""What a trainer, a risk and a sampler get by being registered, and nothing else."""

import csv
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from sqloss import cli
from sqloss.common.flags import flag
from sqloss.common.registry import Registry
from sqloss.training.risks import RISKS, Risk
from sqloss.training.samplers import SAMPLERS, Sampler
from sqloss.training.trainer import TRAINERS

for needed in ("matplotlib", "scipy", "sklearn", "tqdm", "joblib"):
    pytest.importorskip(needed)
FEW = ["--train-limit", "100", "--epochs", "2"]


@pytest.fixture
def toy():
    place = Path(__file__).with_name("toy.py")
    spec = importlib.util.spec_from_file_location("toy", place)
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy"] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        TRAINERS.unregister("toy")
        del sys.modules["toy"]


def values(directory):
    rows = csv.DictReader((directory / "metrics.csv").open())
    return [(row["epoch"], row["model"], float(row["value"])) for row in rows]


def test_a_trainer_has_a_command_and_is_resumed(toy, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main(["toy", *FEW, "--output-dir", str(whole)]) == 0
    assert "| standard |" in capsys.readouterr().out
    assert cli.main(["toy", *FEW, "--epochs", "1", "--output-dir", str(parts)]) == 0
    assert cli.main(["toy", "--resume", str(parts), "--epochs", "2"]) == 0
    assert values(parts) == values(whole) and len(values(whole)) == 4
    assert cli.main(["toy", *FEW, "--rate", "1e38", "--output-dir", str(tmp_path / "far")]) == 2
    assert "expected a smaller --rate, got 1e+38" in capsys.readouterr().err


def test_a_trainer_is_swept(toy, tmp_path, capsys):
    line = ["sweep", "toy", *FEW, "--grid", "rate=0.1,0.5", "--seeds", "2"]
    assert cli.main([*line, "--output-dir", str(tmp_path)]) == 0
    assert "Best by value (lower is better): **rate=0.1: standard**" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert len(rows) == 8 and {"arm", "seed", "model", "rate", "value"} <= rows[0].keys()


@pytest.fixture
def entropic():
    @RISKS.register
    @dataclass(frozen=True)
    class Entropic(Risk):
        name: ClassVar[str] = "entropic"

        tilt: float = flag(0.01, "how much the large losses count")

        @property
        def words(self) -> str:
            return f"entropic risk {self.tilt:g}"

        def __call__(self, losses, **needed):
            size = torch.tensor(len(losses), dtype=losses.dtype)
            return ((self.tilt * losses).logsumexp(0) - size.log()) / self.tilt

    yield Entropic
    RISKS.unregister("entropic")


@pytest.fixture
def last_half():
    @SAMPLERS.register
    @dataclass(frozen=True)
    class LastHalf(Sampler):
        name: ClassVar[str] = "last-half"
        about: ClassVar[str] = "the last samples only"

        def order(self, data, draws, training):
            return torch.arange(len(data) // 2, len(data))

    yield LastHalf
    SAMPLERS.unregister("last-half")


@pytest.mark.parametrize("command", ["vae", "gan"])
def test_a_risk_and_a_sampler_serve_every_trainer(
    entropic, last_half, command, tmp_path, capsys, quick_reports
):
    if command == "gan":
        pytest.importorskip("torchmetrics", exc_type=(ImportError, RuntimeError))
    sizes = {"vae": ["--hidden", "8", "--latent", "2"], "gan": ["--width", "2", "--latent", "2"]}
    line = [command, *FEW, *sizes[command], "--num-samples", "20", "--risk", "entropic"]
    line += ["--tilt", "0.02", "--sampling", "last-half", "--output-dir", str(tmp_path / "run")]
    assert cli.main(line) == 0
    assert "entropic" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [row["model"] for row in rows] == ["standard", "entropic"] * 2
    assert "entropic risk 0.02 of" in (tmp_path / "run" / "report.md").read_text()
    assert cli.main([command, "--resume", str(tmp_path / "run"), "--epochs", "3"]) == 0
    assert cli.main([*line[:-1], str(tmp_path / "other"), "--alpha", "0.5"]) == 2
    assert (
        "--alpha: expected --risk cvar or group with it, got --risk entropic"
        in capsys.readouterr().err
    )


def test_names_are_free_once():
    registry = Registry("thing")

    @registry.register
    class First:
        name = "one"

    with pytest.raises(ValueError, match="thing: expected a name that is free, got 'one'"):
        registry.register(First)
    assert list(registry) == ["one"] and registry["one"] is First
