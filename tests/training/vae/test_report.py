import dataclasses
import json
import math

import pytest
import torch

import sqloss
from sqloss.common.errors import UserError
from sqloss.common.files import write_report
from sqloss.common.flags import changed
from sqloss.common.tables import aligned
from sqloss.datasets import Dataset
from sqloss.models import classifier as classifier_module
from sqloss.models.seeding import generator
from sqloss.student_t import draw_seed
from sqloss.training.shares import class_shares, share, share_table
from sqloss.training.vae.evaluation import evaluate
from sqloss.training.vae.report import (
    as_markdown,
    by_class,
    generated,
    make_report,
    overall_table,
    tables,
    worst_class,
)

pytest.importorskip("scipy")


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(classifier_module, "STEPS", 5)


@pytest.fixture
def losses(trainer) -> dict[str, dict[str, torch.Tensor]]:
    models = trainer.begin(trainer.config).models
    return evaluated(models, trainer.data, trainer.config)


def evaluated(models, data, config) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: evaluate(model, data, config.seed, config.iwae_samples)
        for name, model in models.items()
    }


@pytest.fixture
def report(trainer, losses, few_steps) -> dict:
    models = trainer.begin(trainer.config).models
    rare = trainer.data.imbalanced("1:0.5", seed=0)
    return make_report(models, losses, trainer.data, rare, trainer.config)


def test_the_overall_numbers(report, losses):
    for name, of_model in losses.items():
        bound = of_model["reconstruction"] + of_model["kl"]
        test = report["models"][name]["test"]
        assert test["images"] == 20
        assert test["negative_elbo"] == pytest.approx(bound.mean().item())
        assert test["reconstruction"] == pytest.approx(of_model["reconstruction"].mean().item())
        assert test["kl"] == pytest.approx(of_model["kl"].mean().item())
        assert test["negative_elbo_cvar"] == pytest.approx(bound.topk(4).values.mean().item())
        deviation = math.sqrt(((bound - bound.mean()) ** 2).sum().item() / 19)
        assert test["negative_elbo_standard_error"] == pytest.approx(deviation / math.sqrt(20))


def test_a_model_that_was_trained_alone(trainer, few_steps):
    config = changed(trainer.config, no_baseline=True)
    models = trainer.begin(config).models
    report = make_report(
        models, evaluated(models, trainer.data, config), trainer.data, trainer.data, config
    )
    text = as_markdown(report)
    assert "`cvar` minimises the CVaR 0.8 of -ELBO\n" in text
    assert "`standard`" not in text and "from the same initial weights" not in text
    assert {len(row) for row in overall_table(report)} == {2}


def test_the_numbers_of_each_class(report, losses, trainer):
    labels = trainer.data.test_labels
    for name, of_model in losses.items():
        rows = report["models"][name]["test_by_class"]
        assert [(row["class"], row["images"]) for row in rows] == [("a", 7), ("b", 7), ("c", 6)]
        for label, row in enumerate(rows):
            bound = of_model["negative_elbo"][labels == label]
            assert row["negative_elbo"] == pytest.approx(bound.mean().item())
            assert row["negative_elbo_cvar"] == pytest.approx(sqloss.cvar(bound, 0.8).item())


def test_a_class_without_test_images_is_left_out(losses, trainer):
    data = dataclasses.replace(trainer.data, test_labels=torch.arange(20) % 2 * 2)
    assert [row["class"] for row in by_class(losses["cvar"], data, 0.8)] == ["a", "c"]


def test_the_worst_class_is_worst_by_its_metric():
    rows = [
        {"class": "a", "negative_elbo": 3.0, "reconstruction": 1.0},
        {"class": "b", "negative_elbo": 2.0, "reconstruction": 2.0},
    ]
    assert worst_class(rows, "negative_elbo")["class"] == "a"
    assert worst_class(rows, "reconstruction")["class"] == "b"


@pytest.mark.parametrize(("count", "total"), [(0, 50), (7, 50), (50, 50), (1234, 10_000)])
def test_a_share_has_wilsons_interval(count, total):
    z, p = 1.959963984540054, count / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + (z / (2 * total)) ** 2)
    found = share(count, total)
    assert (found["count"], found["share"]) == (count, p)
    assert found["low"] == pytest.approx(centre - half, abs=1e-12)
    assert found["high"] == pytest.approx(centre + half, abs=1e-12)


def test_generated_images_are_counted_by_class_from_the_same_seeds(trainer):
    asked = []

    class Counter:
        classes = 3

        def predict(self, x):
            return (x > 0).long()

    class Model:
        def sample(self, count, seed):
            asked.append((count, seed.item()))
            return torch.randn(count, generator=torch.Generator().manual_seed(seed.item()))

    config = changed(trainer.config, num_samples=1500)
    first, second = (class_shares(Counter(), generated(Model(), config)) for _ in range(2))
    draws = generator(0, "samples")
    seeds = [draw_seed(generator=draws).item() for _ in range(2)]
    assert asked == [(1000, seeds[0]), (500, seeds[1])] * 2
    images = [
        Model().sample(*each) for each in zip((1000, 500), map(torch.tensor, seeds), strict=True)
    ]
    positive = int((torch.cat(images) > 0).sum())
    assert [row["count"] for row in first] == [1500 - positive, positive, 0]
    assert first == second


def test_the_classifier_learns_from_the_data_before_the_imbalance(trainer, losses, monkeypatch):
    learnt_from = []

    def spy(images, labels, classes, seed):
        learnt_from.append(labels)
        return classifier_module.Classifier(tuple(images.shape[1:]), classes)

    monkeypatch.setattr("sqloss.training.shares.train_classifier", spy)
    models = trainer.begin(trainer.config).models
    rare = trainer.data.imbalanced("1:0", seed=0)
    report = make_report(models, losses, trainer.data, rare, trainer.config)
    assert torch.equal(learnt_from[0], trainer.data.train_labels)
    assert report["train_images"][1] == 0
    assert report["train_images_before_imbalance"] == trainer.data.class_counts()


def test_the_files(report, tmp_path):
    write_report(tmp_path, as_markdown(report), report)
    assert json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail) == report
    text = (tmp_path / "report.md").read_text()
    assert tables(report) in text
    assert "one run with one seed" in text
    assert "not evidence" in text
    assert f"{report['classifier_test_accuracy']:.1%} of the test images" in " ".join(text.split())


def test_report_json_tells_that_all_is_there(report, tmp_path):
    (tmp_path / "report.md").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*report\.md"):
        write_report(tmp_path, as_markdown(report), report)
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "`standard` minimises the mean of -ELBO, `cvar` minimises the CVaR 0.8 of -ELBO ("),
        ({"tail_term": "reconstruction"}, "CVaR 0.8 of reconstruction + mean of KL (--alpha 0.8"),
        (
            {"beta": 2.0},
            "`standard` minimises the mean of (reconstruction + 2 KL), `cvar`",
        ),
        ({"alpha": 0.0}, "On each batch, `standard` minimises the mean of -ELBO (--alpha 0,"),
        ({}, "for 4 epochs, from the same initial weights, on the same batches and noise."),
        ({"epochs": 1}, "for 1 epoch, from"),
        ({"alpha": 0.0, "epochs": 1}, "for 1 epoch."),
        ({}, "Prior and posterior of the latent variables are normal."),
        ({"prior": "t", "df": 3.0}, "latent variables are Student's t with df = 3."),
        (
            {"prior": "t", "learn_df": True},
            "latent variables are Student's t, with a df that is learnt from 5 on.",
        ),
        ({"iwae_samples": 2}, "`cvar` minimises the CVaR 0.8 of -IW-2 bound ("),
        ({"iwae_samples": 2}, "- The IW-2 bound is the importance-weighted one on log p(x)"),
    ],
)
def test_the_text_says_what_each_model_was_trained_on(trainer, few_steps, tmp_path, changes, words):
    config = changed(trainer.config, **changes)
    models = trainer.begin(config).models
    losses = evaluated(models, trainer.data, config)
    report = make_report(models, losses, trainer.data, trainer.data, config)
    assert words in " ".join(as_markdown(report).split())


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({}, {}),
        ({"tail_term": "reconstruction"}, {"cvar": "CVaR 0.8 of reconstruction + mean of KL"}),
        (
            {"beta": 2.0},
            {
                "standard": "mean of (reconstruction + 2 KL)",
                "cvar": "CVaR 0.8 of (reconstruction + 2 KL)",
            },
        ),
        (
            {"iwae_samples": 2},
            {"standard": "mean of -IW-2 bound", "cvar": "CVaR 0.8 of -IW-2 bound"},
        ),
    ],
)
def test_objectives_of_their_own_have_rows_of_their_own(trainer, few_steps, changes, labels):
    config = changed(trainer.config, **changes)
    models = trainer.begin(config).models
    losses = evaluated(models, trainer.data, config)
    report = make_report(models, losses, trainer.data, trainer.data, config)
    rows = {row[0]: row[1:] for row in overall_table(report)}
    assert len(rows) == 9 + len(labels)
    for objective, label in labels.items():
        values = [config.objectives[objective](losses[name]).item() for name in models]
        assert rows[label] == [f"{value:.2f}" for value in values]


def test_a_learnt_df_is_told_of_every_model(trainer, few_steps):
    config = changed(trainer.config, prior="t", learn_df=True, df=2.5)
    models = trainer.begin(config).models
    losses = evaluated(models, trainer.data, config)
    report = make_report(models, losses, trainer.data, trainer.data, config)
    assert [model["df"] for model in report["models"].values()] == pytest.approx([2.5, 2.5])
    assert ["learnt df", "2.5", "2.5"] in list(overall_table(report))


def test_every_row_of_the_table_is_the_metric_of_its_label(report):
    rows = {row[0]: row[1:] for row in overall_table(report)}
    labels = {
        "mean -ELBO": "negative_elbo",
        "its standard error": "negative_elbo_standard_error",
        "CVaR 0.8 of -ELBO": "negative_elbo_cvar",
        "mean reconstruction": "reconstruction",
        "mean KL": "kl",
    }
    tests = [model["test"] for model in report["models"].values()]
    for label, metric in labels.items():
        assert rows[label] == [f"{test[metric]:.2f}" for test in tests]


def test_a_bar_in_a_name_is_no_column():
    text = "\n".join(aligned([["class", "n"], ["a|b", "1"]]))
    assert r"| a\|b " in text


def test_shares_and_intervals_have_two_decimals(report):
    first = list(share_table(report))[1]
    generated = report["models"]["standard"]["generated"][0]
    low, high = generated["low"], generated["high"]
    assert first[2] == f"{generated['share']:.2%} [{low:.2%}, {high:.2%}]"


def test_the_bias_of_the_tail_is_told(report):
    assert "biases the CVaR slightly" in as_markdown(report)


@pytest.mark.parametrize("prior", ["normal", "t"])
def test_a_kl_below_zero_is_explained(report, prior):
    text = as_markdown(report | {"config": report["config"] | {"prior": prior}})
    assert ("may come out below 0" in text) == (prior == "t")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"prior": "t", "df": 1.0}, "no finite mean"),
        ({"prior": "t", "df": 2.0}, "no finite variance"),
        ({"prior": "t", "df": 2.1}, None),
        ({"prior": "normal", "df": 1.0}, None),
    ],
)
def test_moments_that_do_not_exist_are_told(report, values, told):
    text = as_markdown(report | {"config": report["config"] | values})
    assert "no finite" not in text if told is None else told in text


def test_the_tables_tell_both_models_and_are_aligned(report):
    text = tables(report)
    for name, model in report["models"].items():
        assert name in text
        assert f"{model['test']['negative_elbo']:.2f}" in text
    for table in text.split("\n\n"):
        assert len({len(line) for line in table.splitlines()}) == 1


def test_a_single_model_and_a_single_test_image(trainer, few_steps, tmp_path):
    whole = trainer.data
    data = Dataset(
        "one", ("a",), whole.train_images, torch.zeros(50, dtype=torch.int64),
        whole.test_images[:1], torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip
    config = changed(trainer.config, alpha=0.0)
    models = trainer.begin(config).models
    losses = evaluated(models, data, config)
    report = make_report(models, losses, data, data, config)
    assert report["alpha_of_cvar"] == 0.8
    assert report["models"]["standard"]["test"]["negative_elbo_standard_error"] is None
    write_report(tmp_path, as_markdown(report), report)
    text = (tmp_path / "report.md").read_text()
    assert "alpha = 0.8 (the usual one, as --alpha 0 has no tail)" in text
    assert "same initial weights" not in text
    assert "CVaR 0.8 of -ELBO" in text
