import dataclasses
import math

import pytest
import torch

from sqloss.experiments.comparison import (
    CONTROL,
    CompareConfig,
    Key,
    Ledger,
    against_control,
    against_one_shot,
    as_markdown,
    make_arms,
    make_tasks,
    series_of,
    trial,
    trials,
)
from sqloss.experiments.imputation import NO_MODEL, ImputeConfig, first_test_images
from sqloss.models.classifier import Classifier
from sqloss.training import UserError
from sqloss.training.datasets import load_dataset
from sqloss.training.flags import configure
from sqloss.training.vae.config import VAEConfig

for needed in ("joblib", "sklearn", "scipy", "tqdm"):
    pytest.importorskip(needed)
# So fails a torchvision built for another torch.
pytest.importorskip("torchmetrics", exc_type=(ImportError, RuntimeError))

SMALL = ImputeConfig(draws=2, iterations=3, burn_in=1, components=3, neighbour_images=50)
CONFIG = configure(
    VAEConfig, alpha=0.0, imbalance="none", epochs=1, hidden="8", latent=3, train_limit=200
)
KEY = Key("t, df 3", "standard", "one-shot", "bottom half")


@pytest.fixture(scope="module")
def digits():
    return first_test_images(load_dataset("digits", train_limit=200), 20)


# arms


def test_arms_differ_from_the_control_in_one_thing():
    arms = make_arms(CONFIG, CompareConfig(dfs="3,21", betas="0.5"))
    assert arms == {
        "normal": CONFIG,
        "t, df 3": dataclasses.replace(CONFIG, prior="t", df=3.0),
        "t, df 21": dataclasses.replace(CONFIG, prior="t", df=21.0),
        "normal, beta 0.5": dataclasses.replace(CONFIG, beta=0.5),
    }
    assert list(make_arms(CONFIG, CompareConfig(dfs="none", betas="none"))) == ["normal"]


def test_every_arm_and_the_baselines_have_every_seed():
    arms = make_arms(dataclasses.replace(CONFIG, seed=5), CompareConfig(dfs="3", betas="none"))
    tasks = [(task.arm, task.config.seed) for task in make_tasks(arms, 2)]
    assert tasks == [(arm, seed) for seed in (5, 6) for arm in ("normal", "t, df 3", NO_MODEL)]


def test_arms_are_paired_and_trials_repeat(digits):
    """An arm that is the control by another name has the control's results."""
    arms = make_arms(CONFIG, CompareConfig(dfs="3", betas="1"))
    tasks = {task.arm: task for task in make_tasks(arms, 1)}
    torch.manual_seed(0)
    judge = Classifier(digits.shape, 10)
    control, same, other, again = (
        [row | {"arm": ""} for row in trial(tasks[arm], digits, judge, SMALL)]
        for arm in (CONTROL, "normal, beta 1", "t, df 3", CONTROL)
    )
    assert control == same == again
    assert all(a["rmse"] != b["rmse"] for a, b in zip(control, other, strict=True))
    assert [row["missing"] for row in control] == [row["missing"] for row in other]


def test_processes_come_to_the_same(digits):
    tasks = make_tasks(make_arms(CONFIG, CompareConfig(dfs="3", betas="none")), 1)
    torch.manual_seed(0)
    judge = Classifier(digits.shape, 10)
    alone, together = (
        {rows[0]["arm"]: rows for rows in trials(tasks, digits, judge, SMALL, jobs)}
        for jobs in (1, 2)
    )
    assert alone == together
    assert list(alone) == ["normal", "t, df 3", NO_MODEL]


# statistics


def rows_of(values):
    """Rows with these RMSE by (arm, method), a value per seed."""
    return [
        {"arm": arm, "model": "standard", "method": method, "mask": "m", "seed": seed}
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
    series = series_of(rows, "rmse")
    differences = {key[:3]: d.difference for key, d in against_control(series).items()}
    assert differences == pytest.approx(
        {("t", "standard", "one-shot"): 0.2, ("t", "standard", "pseudo-Gibbs"): -0.1}
    )
    iterating = {key.arm: d.difference for key, d in against_one_shot(series).items()}
    assert iterating == pytest.approx({"normal": -0.75, "t": -1.05})


def test_the_report_tells_means_differences_and_corrected_p():
    values = {
        ("normal", "one-shot"): [1.0, 2.0, 3.0],
        ("a", "one-shot"): [3.0, 5.0, 7.0],
        ("b", "one-shot"): [2.0, 2.5, 4.5],
    }
    report = as_markdown(rows_of(values), metrics=["rmse"])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines()]
    # a - normal: 2, 3, 4; b - normal: 1, 0.5, 1.5
    assert ["normal: one-shot", "2.0000 [-0.4841, 4.4841]"] in lines
    p_a, p_b = 1 - math.sqrt(27 / 29), 1 - math.sqrt(12 / 14)  # t^2 / (t^2 + 2)
    expected = ["a: one-shot: m", "+3.0000 [+0.5159, +5.4841]", "+150.0%", "0/3"]
    assert [*expected, f"{p_a:.2g}", f"{2 * p_a:.2g}"] in lines
    expected = ["b: one-shot: m", "+1.0000 [-0.2421, +2.2421]", "+50.0%", "0/3"]
    assert [*expected, f"{p_b:.2g}", f"{p_b:.2g}"] in lines
    assert ["a", "105.00 [100.03, 109.97]"] in lines, "the -ELBO"


# the directory


def some_rows(arm, seed):
    numbers = dict.fromkeys(("missing", "rmse", "mae", "ssim", "accuracy"), 0.1 + seed)
    row = {"model": "standard", "method": "one-shot", "mask": "bottom half", **numbers}
    return [
        {"arm": arm, "seed": seed, "test_negative_elbo": 1 / 3, **row, "accuracy_of_originals": 1.0}
    ]


def test_what_is_done_is_not_done_again(tmp_path):
    tasks = make_tasks(make_arms(CONFIG, CompareConfig(dfs="3", betas="none")), 2)
    ledger = Ledger(tmp_path, CONFIG, SMALL)
    assert all(ledger.lacks(task) for task in tasks)
    rows = some_rows("t, df 3", 1) + some_rows(NO_MODEL, 0)
    rows[1]["test_negative_elbo"] = ""
    ledger.add(rows[:1])
    ledger.add(rows[1:])
    # The seed, the place of the data and the arms are no other comparison.
    moved = dataclasses.replace(CONFIG, seed=1, data_dir="/elsewhere", threads=1)
    again = Ledger(tmp_path, moved, SMALL)
    assert again.rows == rows
    lacking = [(task.arm, task.config.seed) for task in tasks if again.lacks(task)]
    assert lacking == [("normal", 0), ("t, df 3", 0), ("normal", 1), (NO_MODEL, 1)]
    assert again.of([tasks[4]]) == rows[:1]


def test_another_comparison_is_refused(tmp_path):
    Ledger(tmp_path, dataclasses.replace(CONFIG, epochs=3), SMALL)  # of which nothing is measured
    Ledger(tmp_path, CONFIG, SMALL).add(some_rows("normal", 0))
    for config, impute_config, name in (
        (dataclasses.replace(CONFIG, epochs=2), SMALL, "epochs"),
        (CONFIG, dataclasses.replace(SMALL, draws=9), "draws"),
    ):
        with pytest.raises(UserError, match=rf"^--output-dir: .*these differ: {name}$"):
            Ledger(tmp_path, config, impute_config)


@pytest.mark.parametrize(
    ("old", "new"), [("0.1", "x"), (",0.1", ""), ("0.1", "0.1,2"), ("arm", "legs"), ("seed,", "")]
)
def test_a_file_that_is_no_comparison_is_refused(tmp_path, old, new):
    Ledger(tmp_path, CONFIG, SMALL).add(some_rows("normal", 0))
    whole = (tmp_path / "compare.csv").read_text()
    (tmp_path / "compare.csv").write_text(whole.replace(old, new, 1))
    with pytest.raises(UserError, match=r"^--output-dir: cannot use .*compare\.csv"):
        Ledger(tmp_path, CONFIG, SMALL)
    (tmp_path / "compare.json").write_text("{")
    with pytest.raises(UserError, match=r"^--output-dir: cannot use .*compare\.json"):
        Ledger(tmp_path, CONFIG, SMALL)


# settings


@pytest.mark.parametrize(
    ("name", "values"),
    [("seeds", [1, 2**31]), ("jobs", [0]), ("dfs", ["", "3;5"]), ("betas", ["x", "1,"])],
)
def test_wrong_settings(name, values):
    for value in values:
        with pytest.raises(UserError, match=rf"^--{name}: expected .*, got '?{value}"):
            CompareConfig(**{name: value})


def test_arms_that_cannot_be():
    with pytest.raises(UserError, match=r"^--dfs: .*got 0\.1"):
        make_arms(CONFIG, CompareConfig(dfs="0.1"))
    with pytest.raises(UserError, match=r"^--betas: .*got -1"):
        make_arms(CONFIG, CompareConfig(betas="-1"))
