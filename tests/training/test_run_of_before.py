"""A run that was made, and stopped in its second epoch, before config.json had a format."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from sqloss import cli

BEFORE = Path(__file__).parent / "run_of_before"


@pytest.fixture
def run(tmp_path) -> Path:
    return Path(shutil.copytree(BEFORE, tmp_path / "run"))


def test_it_is_resumed_and_comes_to_what_it_came_to(run, quick_reports):
    for needed in ("matplotlib", "scipy", "sklearn", "tqdm"):
        pytest.importorskip(needed)
    assert cli.main(["vae", "--resume", str(run)]) == 0
    got, expected = (
        list(csv.DictReader((run / name).open())) for name in ("metrics.csv", BEFORE_METRICS)
    )
    assert [(r["epoch"], r["model"]) for r in got] == [(r["epoch"], r["model"]) for r in expected]
    for row, other in zip(got, expected, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - {"model"}:  # on another machine products are rounded otherwise
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-3)
    stored = json.loads((run / "config.json").read_text())
    assert stored["format"] >= 1 and (stored["risk"], stored["alpha"]) == ("cvar", 0.8)
    assert "data" in stored["data_dir"]


BEFORE_METRICS = "metrics_at_the_end.csv"


def test_one_of_a_later_format_is_refused(run, capsys):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"format": 99}))
    assert cli.main(["vae", "--resume", str(run)]) == 2
    assert "expected a run of a format up to" in capsys.readouterr().err
