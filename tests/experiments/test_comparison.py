import csv
import json
import math

import pytest

from sqloss import cli
from sqloss.common.flags import configure
from sqloss.experiments.comparison import (
    CompareConfig,
    Imputation,
    one_shot,
    plan_comparison,
)
from sqloss.experiments.imputation import NO_MODEL, ImputeConfig
from sqloss.experiments.measurement import first_arm, series_of
from sqloss.experiments.sweep import Sweep, Task
from sqloss.experiments.sweep_report import as_markdown, compared
from sqloss.training import UserError
from sqloss.training.vae.config import VAEConfig

for needed in ("joblib", "matplotlib", "sklearn", "scipy", "tqdm"):
    pytest.importorskip(needed)
# So fails a torchvision built for another torch.
pytest.importorskip("torchmetrics", exc_type=(ImportError, RuntimeError))

PARTS = ("model", "method", "mask")


# arms


def test_arms_differ_from_the_control_in_one_thing():
    assert CompareConfig(dfs="3,21", betas="0.5").arms == {
        "normal": {"prior": "normal"},
        "t, df 3": {"prior": "t", "df": 3.0},
        "t, df 21": {"prior": "t", "df": 21.0},
        "normal, beta 0.5": {"prior": "normal", "beta": 0.5},
        NO_MODEL: {"prior": "normal"},
    }
    assert list(CompareConfig(dfs="none", betas="none").arms) == ["normal", NO_MODEL]


def test_every_arm_and_the_baselines_have_every_seed(tmp_path):
    given = {"seed": 5, "beta": 3.0}
    sweep = plan_comparison(CompareConfig(dfs="3", seeds=2), ImputeConfig(), tmp_path, given)
    arms = ("normal", "t, df 3", "normal, beta 0.5", "normal, beta 2", NO_MODEL)
    assert [(task.arm, task.config.seed) for task in sweep.missing] == [
        (arm, seed) for seed in (5, 6) for arm in arms
    ]
    assert [task.config.beta for task in sweep.tasks[:5]] == [3.0, 3.0, 0.5, 2.0, 3.0]
    for task in sweep.tasks:
        config = task.config
        assert (config.risk.alpha, config.imbalance, config.threads) == (0.0, "none", 1)


@pytest.mark.parametrize(
    ("name", "values"),
    [("seeds", [1, 2**31]), ("jobs", [0]), ("dfs", ["", "3;5"]), ("betas", ["x", "1,"])],
)
def test_wrong_settings(name, values):
    for value in values:
        with pytest.raises(UserError, match=rf"^--{name}: expected .*, got '?{value}"):
            CompareConfig(**{name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dfs": "0.1"}, r"--compare: t, df 0\.1: --df: .*got 0\.1"),
        ({"betas": "-1"}, r"--compare: normal, beta -1: --beta: .*got -1"),
    ],
)
def test_arms_that_cannot_be(tmp_path, values, message):
    with pytest.raises(UserError, match=f"^{message}"):
        plan_comparison(CompareConfig(**values), ImputeConfig(), tmp_path, {})


# results by hand


def rows_of(values):
    """Rows of every seed with these RMSEs by (arm, method)."""
    return [
        {"arm": arm, "model": "standard", "method": method, "mask": "m", "seed": seed}
        | dict.fromkeys(("missing", "mae", "ssim", "accuracy", "accuracy_of_originals"), 0.5)
        | {"rmse": value, "test_negative_elbo": 100.0 + value}
        for (arm, method), by_seed in values.items()
        for seed, value in enumerate(by_seed)
    ]


def test_each_arm_is_compared_with_its_like():
    rows = rows_of(
        {
            ("normal", "one-shot"): [1.0, 2.0],
            ("normal", "pseudo-Gibbs"): [0.5, 1.0],
            ("t", "one-shot"): [1.1, 2.3],
            ("t", "pseudo-Gibbs"): [0.6, 0.7],
            (NO_MODEL, "mean"): [3.0, 3.0],
        }
    )
    series = series_of(rows, "rmse", PARTS)
    found = compared(series, first_arm)
    assert {(key.arm, key.rest): d.difference for (key, _), d in found.items()} == pytest.approx(
        {("t", ("one-shot", "m")): 0.2, ("t", ("pseudo-Gibbs", "m")): -0.1}
    )
    found = compared(series, one_shot)
    iterating = {key.arm: d.difference for (key, _), d in found.items()}
    assert iterating == pytest.approx({"normal": -0.75, "t": -1.05})


def test_the_report_tells_means_differences_and_corrected_p(tmp_path):
    values = {
        ("normal", "one-shot"): [1.0, 2.0, 3.0],
        ("a", "one-shot"): [3.0, 5.0, 7.0],
        ("b", "one-shot"): [2.0, 2.5, 4.5],
    }
    tasks = []
    for row in rows_of(values):
        directory = tmp_path / row["arm"] / str(row["seed"])
        directory.mkdir(parents=True)
        (directory / "impute.json").write_text(json.dumps({"rows": [row]}))
        config = configure(VAEConfig, alpha=0.0, seed=row["seed"])
        tasks.append(Task(row["arm"], config, directory))
    (tasks[-1].directory.parent / "4").mkdir()
    failed = Task("b", configure(VAEConfig, alpha=0.0, seed=0), tasks[-1].directory.parent / "4")
    (failed.directory / "failed.json").write_text('{"error": "it broke"}')
    sweep = Sweep(Imputation("vae", ImputeConfig()), tmp_path, ["prior"], [*tasks, failed])
    report = as_markdown(sweep, "rmse")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines()]
    # a - normal: 2, 3, 4; b - normal: 1, 0.5, 1.5
    assert ["RMSE", "seeds", "m"] in lines
    assert ["**normal: one-shot**", "3", "**2.0000 [-0.4841, 4.4841]**"] in lines
    p_a, p_b = 1 - math.sqrt(27 / 29), 1 - math.sqrt(12 / 14)  # t^2 / (t^2 + 2)
    expected = ["a: one-shot: m", "+3.0000 [+0.5159, +5.4841]", "+150.0%", "0/3"]
    assert [*expected, f"{p_a:.2g}", f"{2 * p_a:.2g}"] in lines
    expected = ["b: one-shot: m", "+1.0000 [-0.2421, +2.2421]", "+50.0%", "0/3"]
    assert [*expected, f"{p_b:.2g}", f"{p_b:.2g}"] in lines
    assert ["a", "3", "105.00 [100.03, 109.97]"] in lines, "the -ELBO"
    assert "Best by RMSE, m (lower is better): **normal: one-shot**, 2.0000" in report
    assert "- b, seed 0: it broke" in report
    assert not any(line[:1] == ["b"] and "-" in line for line in lines), "b has other seeds"


# whole comparisons


def compare(directory, *arguments):
    flags = (
        *("--train-limit", "200", "--hidden", "8", "--latent", "3", "--epochs", "1"),
        *("--iterations", "3", "--burn-in", "1", "--neighbour-images", "50", "--test-images", "0"),
    )
    command = ("impute", "--compare", "--output-dir", str(directory))
    return cli.main([*command, *flags, *arguments])


def test_a_comparison_and_that_it_is_taken_up_again(tmp_path, capsys, quick_reports):
    few = ["--draws", "2", "--betas", "1", "--dfs"]
    assert compare(tmp_path, *few, "none", "--seeds", "2") == 0
    told = capsys.readouterr()
    assert "6 of 6 runs to do" in told.err
    assert "6/6: baseline, seed 1 is done" in told.err
    assert told.out.rstrip() in (tmp_path / "sweep.md").read_text()

    def rows_in(arm, seed):
        with (tmp_path / "sweep.csv").open(newline="") as file:
            rows = [r for r in csv.DictReader(file) if (r["arm"], r["seed"]) == (arm, seed)]
        return [row | {"arm": ""} for row in rows]

    control = rows_in("normal", "1")
    assert [tuple(row[part] for part in PARTS[1:]) for row in control] == [
        (method, mask)
        for mask in ("random pixels", "random squares", "bottom half")
        for method in ("one-shot", "pseudo-Gibbs")
    ]
    assert control == rows_in("normal, beta 1", "1"), "the control by another name"
    assert [row["method"] for row in rows_in(NO_MODEL, "1")] == ["mean", "PCA", "kNN"] * 3
    with (tmp_path / "normal" / "seed-1" / "metrics.csv").open(newline="") as file:
        *_, last = csv.DictReader(file)
    assert {row["test_negative_elbo"] for row in control} == {last["test_negative_elbo"]}
    assert not (tmp_path / NO_MODEL / "seed-1" / "checkpoints").exists()

    # More arms are no other comparison, but other settings are, of the runs and of imputation.
    assert compare(tmp_path, *few, "3", "--seeds", "2") == 0
    assert "2 of 8 runs to do" in capsys.readouterr().err
    others = rows_in("t, df 3", "1")
    assert all(a["rmse"] != b["rmse"] for a, b in zip(control, others, strict=True))
    assert [row["missing"] for row in control] == [row["missing"] for row in others]
    before = (tmp_path / "sweep.csv").read_bytes()
    other = ["--lr", "0.1", "--draws", "3", "--dfs", "none"]
    assert compare(tmp_path, *other, "--betas", "none", "--seeds", "3") == 2
    assert "these differ: draws, lr" in capsys.readouterr().err
    assert (tmp_path / "sweep.csv").read_bytes() == before
