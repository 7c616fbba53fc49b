import csv
import json
import math
import os
import signal
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from sqloss import cli
from sqloss.common.errors import UserError
from sqloss.common.files import write_json
from sqloss.common.flags import configure, flat, settings_of
from sqloss.experiments.measurement import Key, Measurement, first_arm, series_of
from sqloss.experiments.sweep import (
    Sweep,
    SweepConfig,
    Task,
    configure_arms,
    make_arms,
    make_tasks,
    parse_grid,
    plan,
    swept,
)
from sqloss.experiments.sweep_report import (
    as_markdown,
    best_of,
    compared,
    draw_samples,
    outcome,
    present,
    refuse_other_tails,
    rows_of,
)
from sqloss.models import classifier
from sqloss.models.seeding import initialisation
from sqloss.training.config import RunConfig
from sqloss.training.gan.config import GANConfig
from sqloss.training.gan.trainer import failed_epochs
from sqloss.training.image_trainer import rare_share
from sqloss.training.loop import Training
from sqloss.training.progress import Silence
from sqloss.training.trainer import Metric, Trainer
from sqloss.training.trainers import TRAINERS
from sqloss.training.vae.config import VAEConfig

for needed in ("joblib", "matplotlib", "scipy", "sklearn", "tqdm"):
    pytest.importorskip(needed)

TINY = ["--train-limit", "100", "--num-samples", "20", "--epochs", "1"]
VAE = [*TINY, "--hidden", "8", "--latent", "3"]
GAN = [*TINY, "--width", "4", "--latent", "4"]


def arms_of(command, *grid, preset="", **given):
    return make_arms(command, SweepConfig(grid=grid, preset=preset), given)


# arms


def test_a_grid_is_of_all_combinations_by_names_that_tell_them():
    assert arms_of("gan", "lr-g=1e-4,2e-4", "conditional=true,false") == {
        "lr-g=0.0001, conditional=true": {"lr_g": 1e-4, "conditional": True},
        "lr-g=0.0001, conditional=false": {"lr_g": 1e-4, "conditional": False},
        "lr-g=0.0002, conditional=true": {"lr_g": 2e-4, "conditional": True},
        "lr-g=0.0002, conditional=false": {"lr_g": 2e-4, "conditional": False},
    }


@pytest.mark.parametrize(
    ("command", "text", "name", "values"),
    [
        ("gan", "d-steps=1,2", "d_steps", [1, 2]),
        ("gan", "--lr-d=1e-4", "lr_d", [1e-4]),
        ("gan", "loss=hinge,wgan-gp", "loss", ["hinge", "wgan-gp"]),
        ("vae", "hidden=400;512,256", "hidden", ["400", "512,256"]),
        ("vae", "imbalance=none;0:0.1,3:0.5", "imbalance", ["none", "0:0.1,3:0.5"]),
        ("vae", "learn-df=false", "learn_df", [False]),
        ("vae", "train-limit=100,200", "train_limit", [100, 200]),
    ],
)
def test_the_values_of_a_grid(command, text, name, values):
    parsed = parse_grid(command, text)
    assert parsed == (name, values)
    assert [type(value) for value in parsed[1]] == [type(value) for value in values]


def test_without_grid_and_preset_there_is_one_arm_that_changes_nothing():
    assert arms_of("vae") == {"baseline": {}}


def test_a_preset_and_a_grid_are_combined():
    arms = arms_of("gan", "alpha=0,0.5", preset="gan-schemes")
    assert len(arms) == 2 * 7
    assert arms["two-d-steps, alpha=0.5"] == {"d_steps": 2, "alpha": 0.5}
    assert arms["baseline, alpha=0.0"] == {"alpha": 0.0}


@pytest.mark.parametrize(
    ("command", "preset"),
    [(command, name) for command in TRAINERS for name in TRAINERS[command].presets],
)
def test_presets_are_of_valid_configurations_that_differ(command, preset):
    base = TRAINERS[command].presets[preset].base
    kind = TRAINERS[command].config
    configs = [
        configure(kind, **{**base, **flags}) for flags in arms_of(command, preset=preset).values()
    ]
    assert len({tuple(flat(config).items()) for config in configs}) == len(configs)
    assert not base.keys() & set(swept(TRAINERS[command].presets[preset].arms))


def test_what_the_presets_are_for():
    fashion = arms_of("vae", preset="fashion-vae")
    assert {"lr": 5e-4, "batch_size": 128, "epochs": 30} in fashion.values()
    assert TRAINERS["vae"].presets["fashion-vae"].base["dataset"] == "fashion"
    schemes = arms_of("gan", preset="gan-schemes")
    assert list(schemes) == [
        *("baseline", "lower-lr-g", "lower-both", "two-g-steps", "two-d-steps", "beta1-0"),
        "conditional",
    ]
    tails = arms_of("gan", preset="gan-tails")
    standard, oversampling, *others = (configure(GANConfig, **flags) for flags in tails.values())
    assert (standard.contenders, standard.sampling.name) == (("standard",), "shuffle")
    assert (oversampling.contenders, oversampling.sampling.name) == (("standard",), "balanced")
    assert {(config.tail_player, config.risk.alpha) for config in others} == {
        (players, alpha) for players in ("d", "g", "both") for alpha in (0.2, 0.5, 0.8)
    }
    assert all(config.contenders == ("cvar",) for config in others)


@pytest.mark.parametrize(
    ("command", "grid", "message"),
    [
        ("gan", ["lr=1e-4"], r"--grid: expected FLAG=VALUE,... with one of .*lr-d.*got lr=1e-4"),
        ("gan", ["lr-d"], r"--grid: expected FLAG=VALUE,.*got lr-d$"),
        ("gan", ["seed=1,2"], r"--grid: expected .*got seed=1,2"),
        ("gan", ["dataset=digits,mnist"], r"--grid: expected .*got dataset=digits,mnist"),
        ("vae", ["classifier=x"], r"--grid: expected .*got classifier=x"),
        ("gan", ["lr-d=1e-4,"], r"--grid: expected numbers for lr-d, got ''"),
        ("gan", ["d-steps=1.5"], r"--grid: expected whole numbers for d-steps, got '1.5'"),
        ("gan", ["augment=yes"], r"--grid: expected true or false for augment, got 'yes'"),
        ("gan", ["lr-d=1e-4,0.0001"], r"--grid: expected different values of lr-d"),
        ("gan", ["lr-d=1e-4", "lr-d=1"], r"--grid: expected every flag once, got lr-d twice"),
    ],
)
def test_grids_that_are_none(command, grid, message):
    with pytest.raises(UserError, match=f"^{message}"):
        arms_of(command, *grid)


def test_a_grid_over_what_the_preset_sweeps_over():
    with pytest.raises(UserError, match=r"^--grid: .*--preset gan-tails does not .*got alpha$"):
        arms_of("gan", "alpha=0.1,0.2", preset="gan-tails")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 0}, r"--seeds: expected a whole number from 1 to .*got 0"),
        ({"jobs": 0}, r"--jobs: expected a whole number from 1 to .*got 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=f"^{message}"):
        SweepConfig(**settings)


def test_what_is_wrong_with_an_arm_is_told_of_the_arm_and_of_all_of_all():
    arms = {"": {}, "lr=-1.0": {"lr": -1.0}}
    with pytest.raises(UserError, match=r"^--grid: lr=-1\.0: --lr: expected .*got -1"):
        configure_arms(VAEConfig, {}, {}, arms, "--grid")
    with pytest.raises(UserError, match=r"^--epochs: expected .*got 0"):
        configure_arms(VAEConfig, {}, {"epochs": 0}, arms, "--grid")


def test_an_arm_lacks_the_flags_of_what_it_has_not_chosen():
    assert arms_of("vae", "risk=mean,cvar", "alpha=0.5,0.9") == {
        "risk=mean": {"risk": "mean"},
        "risk=cvar, alpha=0.5": {"risk": "cvar", "alpha": 0.5},
        "risk=cvar, alpha=0.9": {"risk": "cvar", "alpha": 0.9},
    }
    for grid in (["risk=mean", "alpha=0.5,0.9"], ["alpha=0.5,0.9"]):
        with pytest.raises(UserError, match=r"^--grid: expected flags of what some .*got alpha$"):
            arms_of("vae", *grid, risk="mean")
    arms = {"": {}, **arms_of("vae", "risk=cvar,mean")}
    given = {"alpha": 0.5}  # of the arm that has a use for it
    _, cvar, mean = configure_arms(VAEConfig, {}, given, arms, "--grid").values()
    assert (cvar.risk.alpha, mean.risk.name) == (0.5, "mean")
    del arms["risk=cvar"]
    with pytest.raises(UserError, match=r"^--grid: risk=mean: --alpha: expected --risk cvar"):
        configure_arms(VAEConfig, {}, given, arms, "--grid")
    # A default is not what anyone has asked for.
    [config] = configure_arms(VAEConfig, {"alpha": 0.0}, {"risk": "mean"}, {"a": {}}, "").values()
    assert config.risk.name == "mean"


def test_every_arm_has_every_seed_and_a_folder_of_a_safe_name(tmp_path):
    configs = {
        "lr=0.1, hidden=9,8": configure(VAEConfig, seed=5),
        "imbalance=0:0.1": configure(VAEConfig, seed=5),
    }
    tasks = make_tasks(tmp_path, configs, 2)
    assert [(task.arm, task.config.seed) for task in tasks] == [
        (arm, seed) for seed in (5, 6) for arm in configs
    ]
    assert [task.directory.relative_to(tmp_path).as_posix() for task in tasks[:2]] == [
        "lr=0.1,hidden=9,8/seed-5",
        "imbalance=0_0.1/seed-5",
    ]
    with pytest.raises(UserError, match=r"^--grid: .*names of files, got a:b and a/b$"):
        make_tasks(tmp_path, {"a:b": VAEConfig(), "a/b": VAEConfig()}, 1)


def test_the_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = plan("gan", SweepConfig(preset="gan-tails", seeds=2), None, {"width": 4, "seed": 3})
    assert sweep.directory.as_posix() == "runs/sweep-gan-tails-digits"
    assert sweep.fields == ["alpha", "sampling", "tail_player", "no_baseline"]
    assert len(sweep.missing) == len(sweep.tasks) == 2 * 11
    for task in sweep.tasks:  # results depend neither on --jobs nor on the working directory
        assert (task.config.threads, task.config.width) == (1, 4)
        assert task.config.classifier == str(tmp_path / sweep.directory / "classifier.pt")
    given = {"threads": 2, "classifier": "mine.pt"}
    [task] = plan("gan", SweepConfig(), tmp_path / "other", given).tasks
    assert (task.config.threads, task.config.classifier) == (2, "mine.pt")
    schemes = SweepConfig(preset="gan-schemes")
    assert plan("gan", schemes, tmp_path / "a", {}).tasks[0].config.risk.alpha == 0
    assert plan("gan", schemes, tmp_path / "b", {"alpha": 0.5}).tasks[0].config.risk.alpha == 0.5


# results by hand


@pytest.fixture
def measured(tmp_path):
    """A sweep of two arms with two models each, of which these are the cFIDs by seed."""
    values = {
        ("a", "standard"): [3.0, 5.0, 4.0],
        ("a", "cvar"): [4.0, 7.0, 7.0],
        ("b", "standard"): [2.0, 3.5, 3.5],
        ("b", "cvar"): [1.0, None, 1.0],
    }
    rows = [
        {"arm": arm, "model": model, "seed": seed, "cfid": value}
        for (arm, model), by_seed in values.items()
        for seed, value in enumerate(by_seed)
    ]
    return series_of(rows, "cfid")


def test_the_best_row_has_a_value_for_every_seed(measured):
    assert best_of(measured, "lower", 3) == Key("b", "standard")
    assert best_of(measured, "higher", 3) == Key("a", "cvar")
    assert best_of(measured, "lower", 4) is None


def test_arms_are_compared_with_the_first_one(measured):
    differences = compared(measured, first_arm)
    assert {pair: (d.difference, d.seeds) for pair, d in differences.items()} == {
        (Key("a", "cvar"), Key("a", "standard")): (2.0, 3),
        (Key("b", "standard"), Key("a", "standard")): (-1.0, 3),
        (Key("b", "cvar"), Key("a", "cvar")): (-4.5, 2),
    }
    t = -1 / (math.sqrt(0.25) / math.sqrt(3))  # differences -1, -1.5, -0.5
    p = differences[Key("b", "standard"), Key("a", "standard")].p
    assert p == pytest.approx(1 - math.sqrt(t**2 / (t**2 + 2)))  # Student's with two df


def test_a_model_of_another_name_is_compared_with_the_first():
    rows = [
        {"arm": arm, "model": model, "seed": seed, "cfid": value + seed}
        for arm, model, value in (("standard", "standard", 1.0), ("tail", "cvar", 3.0))
        for seed in (0, 1)
    ]
    [pair] = compared(series_of(rows, "cfid"), first_arm)
    assert pair == (Key("tail", "cvar"), Key("standard", "standard"))


def test_the_own_models_of_arms_are_compared():
    """The own model of an arm is the last; those of different risks have different names."""
    models = {"cvar 0.8": ("standard", "cvar"), "other": ("standard", "chi"), "mean": ("standard",)}
    rows = [
        {"arm": arm, "model": model, "seed": seed, "cfid": 1.0 + seed}
        for arm, names in models.items()
        for model in names
        for seed in (0, 1)
    ]
    assert list(compared(series_of(rows, "cfid"), first_arm)) == [
        (Key("cvar 0.8", "cvar"), Key("cvar 0.8", "standard")),
        (Key("other", "standard"), Key("cvar 0.8", "standard")),
        (Key("other", "chi"), Key("cvar 0.8", "cvar")),
        (Key("mean", "standard"), Key("cvar 0.8", "standard")),
    ]


def test_a_value_that_is_not_finite_is_none():
    rows = [{"arm": "a", "model": "m", "seed": 0, "cfid": math.nan}]
    assert series_of(rows, "cfid") == {Key("a", "m"): {}}


def test_metrics_of_reports():
    shares = [{"share": share} for share in (0.25, 0.5, 0.125)]
    model = {"generated": shares, "failures": {"x": [1, 2], "y": [2, 3]}}
    for imbalance, share in (("0:0.1,2:0.5", 0.375), ("b:0.1,2:0.5", 0.625), ("none", None)):
        report = {"config": {"imbalance": imbalance}, "class_names": ["a", "b", "c"]}
        assert rare_share(report, model) == share
    assert failed_epochs({}, model) == 3


def written(tmp_path, cfids, error="", failures=None):
    """A sweep of arms with these cFIDs by seed, as its runs would leave it; None has failed."""
    tasks = []
    for arm, by_seed in cfids.items():
        for seed, cfid in enumerate(by_seed):
            task = Task(arm, configure(GANConfig, alpha=0.0, seed=seed), tmp_path / arm / str(seed))
            task.directory.mkdir(parents=True)
            if cfid is None:
                (task.directory / "failed.json").write_text(json.dumps({"error": error}))
            else:
                quality = dict.fromkeys(
                    ("ckid", "precision", "recall", "label_entropy", "modes"), 0.5
                )
                model = {
                    "quality": quality | {"cfid": cfid},
                    "generated": [{"share": 0.1}] * 10,
                    "losses": {"d_auc": 0.5},
                    "failures": failures or {},
                }
                report = {
                    "config": flat(task.config),
                    "class_names": list("0123456789"),
                    "classifier_test_accuracy": 0.9,
                    "real": {"cfid": 0.3},
                    "models": {"standard": model},
                }
                (task.directory / "report.json").write_text(json.dumps(report))
            tasks.append(task)
    return Sweep(Measurement("gan"), tmp_path, [], tasks)


def test_what_went_wrong_in_a_run_is_told_when_it_is_done(tmp_path):
    [well] = written(tmp_path / "well", {"a": [3.0]}).tasks
    sweep = written(tmp_path / "ill", {"b": [4.0]}, failures={"x": [1, 2], "y": [2]})
    [ill] = sweep.tasks
    assert outcome(sweep, well, "cfid") == "a, seed 0: cFID 3.00 (standard)"
    assert outcome(sweep, ill, "cfid") == (
        "b, seed 0: cFID 4.00 (standard); standard: something was wrong in 2 epochs, see "
        f"{ill.directory / 'report.md'}"
    )


def test_the_table_tells_means_intervals_and_the_best(tmp_path):
    sweep = written(tmp_path, {"a": [3.0, 5.0], "b": [2.0, 2.0], "c": [1.0, None]}, "it broke")
    text = as_markdown(sweep, "cfid")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    half = 12.706  # the quantile of Student's t with one df, times the standard error of a: 1
    assert ["a", "2", f"4.00 [{4 - half:.2f}, {4 + half:.2f}]", "0.5000 [0.5000, 0.5000]"] == next(
        line[:4] for line in lines if line[:1] == ["a"]
    )
    assert ["**b**", "2", "**2.00 [2.00, 2.00]**"] in [line[:3] for line in lines]
    assert ["c", "1 of 2", "1.00"] in [line[:3] for line in lines]
    assert "Best by cFID (lower is better): **b**, 2.00 [2.00, 2.00]." in text
    assert "- c, seed 1: it broke" in text
    assert "cFID: difference from a (lower is better)" in text
    differences = [line[0] for line in lines if len(line) == 6]
    assert "b" in differences, "of two seeds"
    assert "c" not in differences, "of one seed"


def test_one_seed_has_neither_intervals_nor_differences(tmp_path):
    text = as_markdown(written(tmp_path, {"a": [3.0], "b": [2.5]}), "cfid")
    assert "**2.50**" in text
    assert "difference from" not in text
    assert "[" not in text.partition("|")[2]


def test_where_nothing_is_whole_nothing_is_best(tmp_path):
    sweep = written(tmp_path, {"a": [None], "b": [None]}, "it broke")
    assert "No row is the best by cFID" in as_markdown(sweep, "cfid")
    assert [row["error"] for row in rows_of(sweep)] == ["it broke"] * 2


def test_a_report_that_is_none(tmp_path):
    sweep = written(tmp_path, {"a": [1.0]})
    (tmp_path / "a" / "0" / "report.json").write_text("{")
    with pytest.raises(UserError, match=r"^--output-dir: cannot use .*report\.json"):
        rows_of(sweep)


# whole sweeps


@pytest.fixture
def quick(monkeypatch):
    """No pictures of runs, and a classifier that knows little."""
    for trainer in ("vae", "gan"):
        monkeypatch.setattr(f"sqloss.training.{trainer}.plots.draw_pictures", lambda *_: None)
    monkeypatch.setattr(classifier, "STEPS", 5)


def sweep(command, directory, *arguments):
    return cli.main(["sweep", command, "--output-dir", str(directory), *arguments])


def rows_in(directory):
    with (directory / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


LR = ["--grid", "lr=1e-3,1e-2", "--seeds", "2"]


def test_a_sweep_and_that_it_is_not_done_again(quick, tmp_path, capsys, monkeypatch):
    assert sweep("vae", tmp_path, *VAE, *LR) == 0
    told = capsys.readouterr()
    rows = rows_in(tmp_path)
    assert [(row["arm"], row["lr"], row["seed"], row["model"]) for row in rows] == [
        (f"lr={lr}", lr, seed, model)
        for seed in ("0", "1")
        for lr in ("0.001", "0.01")
        for model in ("standard", "cvar")
    ]
    report = json.loads((tmp_path / "lr=0.01" / "seed-1" / "report.json").read_text())
    assert report["config"] == flat(
        configure(
            VAEConfig,
            **{"train_limit": 100, "hidden": "8", "latent": 3, "num_samples": 20, "epochs": 1},
            **{"lr": 0.01, "seed": 1, "threads": 1},
        )
    )
    test = report["models"]["cvar"]["test"]
    assert float(rows[-1]["test_negative_elbo"]) == test["negative_elbo"]
    assert "4 of 4 runs to do" in told.err
    assert "4/4: lr=0.01, seed 1: -ELBO" in told.err
    assert f"Best by -ELBO (lower is better): **{best_by_mean(rows)}**" in told.out
    assert told.out.rstrip() in (tmp_path / "sweep.md").read_text()

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr("sqloss.experiments.sweep.train_run", None)
    assert sweep("vae", tmp_path, *VAE, *LR) == 0
    again = capsys.readouterr()
    assert "0 of 4 runs to do" in again.err
    assert again.out == told.out
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def best_by_mean(rows):
    sums = {}
    for row in rows:
        name = f"{row['arm']}: {row['model']}"
        sums[name] = sums.get(name, 0) + float(row["test_negative_elbo"])
    return min(sums, key=sums.get)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_an_interrupted_sweep_is_taken_up_again(quick, tmp_path, capsys, monkeypatch):
    arguments = [*VAE, *LR, "--alpha", "0", "--batch-size", "10"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert sweep("vae", whole, *arguments) == 0
    steps = []

    def ctrl_c(_):
        steps.append(1)
        if len(steps) == 15:  # of the second run the fifth
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Silence, "step", ctrl_c)
        assert sweep("vae", stopped, *arguments) == 130
    assert (
        "stopped; what is done is kept: the same command does the rest" in capsys.readouterr().err
    )
    [first] = stopped.rglob("report.json")
    assert [row["arm"] for row in rows_in(stopped)] == ["lr=0.001"]
    checkpoints = stopped / "lr=0.01" / "seed-0" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["epoch-0000-step-000005.pt"]
    before = first.stat().st_mtime_ns

    steps.clear()
    monkeypatch.setattr(Silence, "step", lambda _: steps.append(1))
    assert sweep("vae", stopped, *arguments) == 0
    assert len(steps) == 5 + 10 + 10
    assert first.stat().st_mtime_ns == before
    for name in ("sweep.csv", "sweep.md"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()


def test_other_settings_are_refused(quick, tmp_path, capsys):
    assert sweep("vae", tmp_path, *VAE) == 0
    before = (tmp_path / "sweep.json").read_bytes()
    assert sweep("vae", tmp_path, *VAE, *LR, "--batch-size", "9", "--beta", "2") == 2
    assert "these differ: batch_size, beta" in capsys.readouterr().err
    assert sweep("gan", tmp_path, *GAN) == 2
    assert (tmp_path / "sweep.json").read_bytes() == before
    stored = json.loads(before)
    del stored["risk"]  # as a sweep from before there were these flags
    stored["limit"] = stored.pop("train_limit")
    (tmp_path / "sweep.json").write_text(json.dumps(stored))
    # More seeds and more arms, elsewhere: no other settings.
    assert sweep("vae", tmp_path, *VAE, "--seeds", "2", "--data-dir", "elsewhere") == 0
    assert "1 of 2 runs to do" in capsys.readouterr().err


def test_a_failed_run_is_told_and_the_others_are_done(quick, tmp_path, capsys, monkeypatch):
    arguments = [*VAE, "--alpha", "0", "--grid", "lr=1e30,1e-3"]
    assert sweep("vae", tmp_path, *arguments) == 0
    told = capsys.readouterr()
    assert "1/2: lr=1e+30, seed 0 has failed: the loss of the standard model" in told.err
    failed, done = rows_in(tmp_path)
    assert "no longer finite" in failed["error"]
    assert (failed["arm"], failed["model"], failed["test_negative_elbo"]) == (
        *("lr=1e+30", "standard"),
        "",
    )
    assert math.isfinite(float(done["test_negative_elbo"]))
    assert done["error"] == ""
    assert "| lr=1e+30 " in told.out
    assert "0 of 1" in told.out
    assert "**lr=0.001**" in told.out

    assert sweep("vae", tmp_path, *arguments) == 0
    assert "0 of 2 runs to do" in capsys.readouterr().err
    (tmp_path / "lr=1e+30" / "seed-0" / "failed.json").unlink()
    assert sweep("vae", tmp_path, *arguments) == 0
    assert "1/1: lr=1e+30, seed 0 has failed" in capsys.readouterr().err


def test_processes_come_to_the_same_and_one_classifier_judges(quick, tmp_path):
    pytest.importorskip("torchmetrics", exc_type=(ImportError, RuntimeError))
    # The second one fails at once: what a report takes, it need not take twice here.
    arguments = [*GAN, "--alpha", "0", "--grid", "lr-d=1e-3,1e30"]
    for jobs in ("1", "2"):
        assert sweep("gan", tmp_path / jobs, *arguments, "--jobs", jobs) == 0
    one, two = ((tmp_path / jobs / "sweep.csv").read_bytes() for jobs in ("1", "2"))
    # The classifier too is that of this process, of 5 steps: another would have taken all of them.
    assert one == two
    done, failed = rows_in(tmp_path / "2")
    assert math.isfinite(float(done["cfid"]))
    assert "no longer finite" in failed["error"]
    assert (tmp_path / "2" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "sweep.png" in (tmp_path / "2" / "sweep.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gan", "--preset", "fashion-vae"], "--preset: expected one of gan-schemes, gan-tails"),
        (
            ["vae", "--preset", "x"],
            "--preset: expected one of rare, fashion-vae",
        ),
        (["gan", "--best-by", "d_auc"], "--best-by: expected one of cfid, ckid, "),
        (["vae", "--best-by", "cfid"], "--best-by: expected one of test_negative_elbo, "),
        (
            ["vae", "--grid", "alpha=0.5,0.8", "--best-by", "test_negative_elbo_cvar"],
            "--best-by: expected a metric that is the same one in every arm",
        ),
        (["vae", "--device", "tpu", "--dataset", "mnist"], "--device: expected auto or"),
        (
            ["gan", "--preset", "gan-tails", "--no-baseline"],
            "--no-baseline: expected no such flag where the",
        ),
        (["gan", "--grid", "loss=hinge,x"], "--grid: loss=x: --loss: expected one of"),
        (
            ["gan", "--grid", "alpha=0,0.5", "--no-baseline"],
            "--grid: alpha=0.0: --no-baseline: expected",
        ),
        (["gan", "--preset", "gan-tails", "--width", "0"], "--width: expected a whole number"),
        (["gan", "--imbalance", "77:0.1"], "--imbalance: expected one of the classes 0, 1, 2"),
        (["gan", "--grid", "d-steps=1,999"], "--d-steps: expected at most"),
        (["gan", "--dataset", "mnist", "--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_errors_come_before_any_work(tmp_path, capsys, arguments, message):
    if "gan" in arguments:
        pytest.importorskip("torchmetrics", exc_type=(ImportError, RuntimeError))
    command, *rest = arguments
    assert sweep(command, tmp_path / "sweep", *rest) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "sweep").glob("*/seed-*"))


def test_what_is_compared_has_a_direction():
    for trainer in TRAINERS.values():
        assert all(
            trainer.metrics[name].better in ("lower", "higher") for name in trainer.main_metrics
        )


def test_no_metric_has_the_name_of_a_flag():
    for trainer in TRAINERS.values():
        flags = settings_of(trainer.config).keys()
        assert not flags & trainer.metrics.keys(), "both are columns of sweep.csv"


def test_tails_at_different_alphas_are_not_compared(tmp_path):
    cvar = "test_negative_elbo_cvar"
    row = {"arm": "a", "model": "cvar", "seed": 0, "test_negative_elbo": 1.0, cvar: 2.0}
    one, other = (
        plan("vae", SweepConfig(grid=[f"alpha={alphas}"]), tmp_path / alphas, {})
        for alphas in ("0,0.8", "0.5,0.8")  # 0.8 is what the tail of alpha 0 is measured at
    )
    assert present(one, [row]) == ["test_negative_elbo", cvar]
    assert present(other, [row]) == ["test_negative_elbo"]
    refuse_other_tails(one, cvar)
    refuse_other_tails(other, "test_negative_elbo")
    with pytest.raises(UserError, match=rf"^--best-by: expected .*, got {cvar}, which is of the t"):
        refuse_other_tails(other, cvar)


def test_a_picture_has_the_runs_whose_checkpoints_are_there(tmp_path):
    sweep = written(tmp_path, {"a": [3.0]})
    draw_samples(sweep)
    assert not (tmp_path / "sweep.png").exists()


# a trainer of which nothing is known but what every trainer must have


class Numbers:
    labels = None
    shape = (1,)

    def __len__(self):
        return 8

    def batches(self, rows, training):
        return (each.float()[:, None] for each in rows)

    def fingerprint(self):
        return "numbers"


class Lines(Training):
    columns = ("epoch", "model")

    def __init__(self, config):
        super().__init__(config)
        self.risks = config.risks
        with initialisation(config.seed, "model"):
            self.models = {name: nn.Linear(1, 1) for name in config.contenders}

    def train_step(self, batch):
        for name, model in self.models.items():
            loss = self.risks[name](model(batch).square().squeeze(1))
            for weight, step in zip(
                model.parameters(), torch.autograd.grad(loss, model.parameters()), strict=True
            ):
                weight.data -= 0.01 * step

    def measure(self, data):
        return [{"epoch": self.epoch, "model": name} for name in self.models]

    def describe(self, row):
        return row["model"]

    def sums(self, name):
        return []

    def advice(self):
        return "expected others, got these"

    def own_state(self):
        return {}

    def load_own_state(self, state):
        pass


@dataclass(frozen=True)
class ToyConfig(RunConfig):
    command = "toy"


class Toy(Trainer):
    name = "toy"
    about = "Train lines."
    config = ToyConfig

    def load(self, config):
        return Numbers()

    def training_data(self, whole, config):
        return whole

    def describe(self, whole, data):
        return "numbers"

    def begin(self, config, data):
        return Lines(config)

    def report(self, run):
        bias = {name: {"bias": m.bias.item()} for name, m in run.training.models.items()}
        write_json(run.directory / "report.json", {"models": bias} if self.metrics else {})

    def tables(self, report):
        return ""


def test_a_sweep_of_any_trainer_over_risks(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(TRAINERS._things, "toy", Toy())
    arguments = ["--epochs", "1", "--grid", "risk=cvar,mean", "--grid", "alpha=0.5"]
    assert sweep("toy", tmp_path / "bare", *arguments, "--seeds", "2") == 0
    told = capsys.readouterr()
    assert "4/4: risk=mean, seed 1 is done" in told.err
    cvar = "risk=cvar, alpha=0.5"
    models = [(cvar, "standard"), (cvar, "cvar"), ("risk=mean", "standard")]
    rows = rows_in(tmp_path / "bare")
    assert [(row["arm"], row["model"]) for row in rows] == 2 * models
    assert [(row["risk"], row["alpha"]) for row in rows[1:3]] == [("cvar", "0.5"), ("mean", "")]
    assert "Best" not in told.out
    assert (tmp_path / "bare" / "sweep.md").exists()
    assert sweep("toy", tmp_path / "other", "--best-by", "bias") == 2
    assert "--best-by: expected no such flag without metrics" in capsys.readouterr().err

    value = Metric("bias", 3, "lower", lambda _, model: model["bias"])
    monkeypatch.setattr(Toy, "metrics", {"bias": value})
    assert sweep("toy", tmp_path / "measured", *arguments, "--seeds", "2") == 0
    told = capsys.readouterr()
    assert "Best by bias (lower is better)" in told.out
    assert f"bias: difference from {cvar}: standard (lower is better)" in told.out
    [differences] = told.out.split("difference from")[1:]
    assert f"| {cvar}: cvar " in differences
    assert "| risk=mean " in differences
