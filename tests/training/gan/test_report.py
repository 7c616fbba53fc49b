import dataclasses
import json
import math

import pytest
import torch

from sqloss.common.errors import UserError
from sqloss.common.files import write_report
from sqloss.common.flags import changed
from sqloss.models import classifier as classifiers
from sqloss.models.classifier import Classifier, accuracy, train_classifier
from sqloss.models.seeding import generator as stream
from sqloss.training.gan import report as reports
from sqloss.training.gan.generation import generate_many
from sqloss.training.gan.metrics import floor, measure_images
from sqloss.training.gan.report import (
    QUALITY,
    as_markdown,
    check_data,
    generated,
    make_report,
    quality_table,
    tables,
)
from sqloss.training.run import Run
from sqloss.training.shares import share, share_table

for needed in ("scipy", "sklearn"):
    pytest.importorskip(needed)
# So fails a torchvision built for another torch.
pytest.importorskip("torchmetrics", exc_type=(ImportError, RuntimeError))

RARE = "1:0.5"


@pytest.fixture
def classifier(trainer) -> Classifier:
    with pytest.MonkeyPatch.context() as few:
        few.setattr(classifiers, "STEPS", 20)
        return train_classifier(trainer.data.train_images, trainer.data.train_labels, 3, seed=0)


@pytest.fixture
def reported(trainer, classifier, tmp_path_factory):
    """What a run of one epoch with these changes to its settings has come to."""

    def run(**changes):
        config = changed(trainer.config, epochs=1, **changes)
        whole = trainer.data
        trainer.data = whole.imbalanced(RARE, seed=0)
        training, _ = trainer.train(Run.new(tmp_path_factory.mktemp("run"), config))
        data, trainer.data = trainer.data, whole
        return training, make_report(
            training.generators, training.history, classifier, whole, data, config
        )

    return run


VARIANTS = {
    "two models": {},
    "one model": {"alpha": 0.0},
    "alone": {"no_baseline": True},
    "conditional": {"conditional": True},
    "codes": {"info_codes": 2},
    "both": {"conditional": True, "info_codes": 1, "loss": "wgan-gp", "ema": 0.5},
}


def images_of(training, name, config):
    batches = generate_many(
        training.generators[name], config.num_samples, stream(config.seed, "samples")
    )
    images, noises = zip(*batches, strict=True)
    return torch.cat(images), noises


# the numbers


@pytest.mark.parametrize("changes", [{}, {"ema": 0.5, "conditional": True}])
def test_the_numbers_of_each_model(trainer, classifier, reported, changes):
    training, report = reported(**changes)
    data, config = trainer.data.imbalanced(RARE, seed=0), training.config
    assert report["train_images"] == data.class_counts()
    assert report["train_images_before_imbalance"] == trainer.data.class_counts()
    assert report["classifier_test_accuracy"] == accuracy(
        classifier, data.test_images, data.test_labels
    )
    assert list(report["models"]) == ["standard", "cvar"]
    for name, model in report["models"].items():
        images, noises = images_of(training, name, config)
        predicted = classifier.predict(images)
        counts = torch.bincount(predicted, minlength=3).tolist()
        assert model["generated"] == [share(count, 40) for count in counts]
        assert sum(row["count"] for row in model["generated"]) == config.num_samples
        assert model["quality"] == measure_images(
            images, data.train_images, data.test_images, classifier, config.seed
        )
        if "conditional" in changes:
            labels = torch.cat([noise.labels for noise in noises])
            agreeing = sum(a == b for a, b in zip(predicted.tolist(), labels.tolist(), strict=True))
            assert model["label_agreement"] == share(agreeing, 40)
        else:
            assert "label_agreement" not in model
        row = next(row for row in training.history if row["model"] == name)
        expected = {key: value for key, value in row.items() if key not in ("epoch", "model")}
        assert model["losses"] == expected


def test_no_more_images_are_judged_than_there_are_real_ones(trainer, classifier, reported):
    training, report = reported(num_samples=1200)
    data = trainer.data.imbalanced(RARE, seed=0)
    assert report["real"] == floor(
        50, trainer.data.train_images, data.test_images, classifier, seed=0
    )
    assert report["real"]["images"] == 50
    for name, model in report["models"].items():
        images, _ = images_of(training, name, training.config)
        assert sum(row["count"] for row in model["generated"]) == len(images) == 1200
        assert model["quality"] == measure_images(
            images[:50], data.train_images, data.test_images, classifier, 0
        )


def test_every_model_gets_the_same_noise(trainer):
    model = trainer.begin(changed(trainer.config, conditional=True)).models["cvar"]
    first, second = (generated(model.generator, trainer.config) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = generated(model.generator, changed(trainer.config, seed=1))
    assert not torch.equal(first[0], other[0])


def test_failures_are_listed_by_epoch(trainer, classifier):
    well = dict.fromkeys((*reports.D_METRICS, *reports.G_METRICS), 0.5)
    collapsed = well | {"g_spread": 0.01}
    history = [
        {"epoch": epoch, "model": name} | values
        for epoch in (1, 2, 3)
        for name, values in (("standard", well), ("cvar", collapsed if epoch > 1 else well))
    ]
    generators = trainer.begin(trainer.config).generators
    report = make_report(
        generators, history, classifier, trainer.data, trainer.data, trainer.config
    )
    assert report["models"]["standard"]["failures"] == {}
    [(words, epochs)] = report["models"]["cvar"]["failures"].items()
    assert epochs == [2, 3]
    text = as_markdown(report)
    assert f"## What went wrong\n\n- cvar: {words}: in 2 epochs, first in epoch 2.\n" in text
    assert report["models"]["cvar"]["losses"]["g_spread"] == 0.01


def test_the_fid_is_of_the_judged_images(trainer, classifier, monkeypatch):
    given = []

    def spy(images, test_images, weights):
        given.append((len(images), len(test_images), weights.name))
        return 12.25

    monkeypatch.setattr(reports, "true_fid", spy)
    config = changed(trainer.config, num_samples=60, alpha=0.0, fid_weights="weights.pth")
    training = trainer.begin(config)
    history = [
        {"epoch": 1, "model": "standard"}
        | dict.fromkeys((*reports.D_METRICS, *reports.G_METRICS), 0.5)
    ]
    report = make_report(
        training.generators, history, classifier, trainer.data, trainer.data, config
    )
    assert given == [(50, 20, "weights.pth")]
    assert report["models"]["standard"]["fid"] == 12.25
    assert ["FID", "", "12.25"] in list(quality_table(report))


# the words


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_files(reported, tmp_path, variant):
    changes = VARIANTS[variant]
    _, report = reported(**changes)
    (tmp_path / "report.md").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*report\.md"):
        write_report(tmp_path, as_markdown(report), report)
    assert not (tmp_path / "report.json").exists(), "it tells that all is there"
    (tmp_path / "report.md").rmdir()
    write_report(tmp_path, as_markdown(report), report)
    assert json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail) == report

    text = (tmp_path / "report.md").read_text()
    assert tables(report) in text
    words = " ".join(text.split())
    assert f"{report['classifier_test_accuracy']:.1%} of the test images right" in words
    assert "This is one run with one seed" in words
    assert f"at most {math.log(3):.3f} nats" in words
    assert ("both players told the class" in words) == ("conditional" in changes)
    assert ("asked for with equal probability" in words) == ("conditional" in changes)
    assert ("gan_codes.png" in words) == ("info_codes" in changes)
    both = len(report["models"]) == 2
    assert ("from the same initial weights, on the same batches and noise" in words) == both
    assert ("Those of two models are of two discriminators" in words) == both
    assert f"With the {report['config']['loss']} loss" in words
    assert "for 1 epoch" in words

    parts = [part.splitlines() for part in tables(report).split("\n\n")]
    assert [lines[0].split("|")[1].strip() for lines in parts] == [
        "40 images",
        "share of class",
        "losses, last epoch",
        "nearest training image",
    ]
    for lines, columns in zip(parts, (2, 2, 1, 2), strict=True):
        assert len({len(line) for line in lines}) == 1
        assert {line.count("|") for line in lines} == {columns + len(report["models"]) + 1}
        assert set(lines[1]) <= set("|-:")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {},
            "`standard` on the mean of the discriminator's and the mean of the generator's losses; "
            "`cvar` on the CVaR 0.8 of the discriminator's and the CVaR 0.8 of the generator's",
        ),
        (
            {"tail_player": "g", "alpha": 0.5},
            "`cvar` on the mean of the discriminator's and the CVaR 0.5 of the generator's losses.",
        ),
    ],
)
def test_the_text_says_what_each_model_was_trained_on(reported, changes, words):
    _, report = reported(**changes)
    assert words in " ".join(as_markdown(report).split())


def test_every_cell_is_the_number_of_its_label(reported):
    _, report = reported(conditional=True)
    rows = {row[0]: row[1:] for row in quality_table(report)}
    qualities = [report["real"], *(m["quality"] for m in report["models"].values())]
    assert rows.pop("40 images") == ["real", "standard", "cvar"]
    agreements = [m["label_agreement"]["share"] for m in report["models"].values()]
    assert rows.pop("of the class asked for, of 40") == ["", *(f"{a:.1%}" for a in agreements)]
    assert list(rows) == list(QUALITY.values())
    for metric, label in QUALITY.items():
        for cell, quality in zip(rows[label], qualities, strict=True):
            digits = "3g" if metric == "ckid" else f"{len(cell.partition('.')[2])}f"
            assert cell == f"{quality[metric]:.{digits}}"

    first = list(share_table(report))[1]
    for cell, model in zip(first[2:], report["models"].values(), strict=True):
        row = model["generated"][0]
        assert cell == f"{row['share']:.2%} [{row['low']:.2%}, {row['high']:.2%}]"
    losses = {row[0]: row[1:] for row in reports.loss_table(report)}
    for label, metric in (
        ("discriminator: mean", "d_loss_mean"),
        ("discriminator: CVaR 0.8", "d_loss_cvar"),
        ("generator: mean", "g_loss_mean"),
        ("generator: CVaR 0.8", "g_loss_cvar"),
    ):
        values = [model["losses"][metric] for model in report["models"].values()]
        assert losses[label] == [f"{value:.3f}" for value in values]
    areas = [model["losses"]["d_auc"] for model in report["models"].values()]
    assert losses["discriminator: AUC"] == [f"{area:.3f}" for area in areas]

    nearest = list(reports.nearest_table(report))
    of_models = [model["quality"]["nearest"] for model in report["models"].values()]
    assert len(nearest) == 1 + len(of_models[0])
    for row, standard, cvar in zip(nearest[1:], *of_models, strict=True):
        assert row[0] == f"distance, quantile {standard['quantile']:g}"
        numbers = (standard["held_out"], standard["generated"], cvar["generated"])
        assert row[1:] == [f"{number:.3f}" for number in numbers]


# what cannot be reported


@pytest.mark.parametrize("kind", ["training", "test"])
def test_too_few_images(trainer, kind):
    part = {"training": "train_images", "test": "test_images"}[kind]
    data = dataclasses.replace(trainer.data, **{part: getattr(trainer.data, part)[:1]})
    with pytest.raises(UserError) as raised:
        check_data(data, trainer.config)
    assert str(raised.value) == f"--dataset: expected at least 2 {kind} images, got 1"
    check_data(trainer.data, trainer.config)


def test_two_images_of_each_kind_are_enough(trainer, classifier):
    data = dataclasses.replace(
        trainer.data,
        train_images=trainer.data.train_images[:2],
        train_labels=trainer.data.train_labels[:2],
        test_images=trainer.data.test_images[:2],
        test_labels=trainer.data.test_labels[:2],
    )
    config = changed(trainer.config, num_samples=2, alpha=0.0)
    check_data(data, config)
    training = trainer.begin(trainer.config)
    training.train_step((data.train_images, data.train_labels))
    history = training.measure(data)
    generators = {"standard": training.generators["standard"]}
    report = make_report(generators, history, classifier, data, data, config)
    assert report["real"]["images"] == 2
    assert math.isfinite(report["real"]["cfid"])
    as_markdown(report)


def test_a_file_that_is_no_classifier_is_refused_before_the_training(trainer, tmp_path):
    (tmp_path / "file.pt").write_text("nothing")
    for file, told in (
        (tmp_path / "file.pt", "--classifier: expected a file with the classifier of this data"),
        (tmp_path / "none" / "file.pt", "--classifier: expected a file in a folder that is there"),
    ):
        config = changed(trainer.config, classifier=str(file))
        with pytest.raises(UserError, match=f"{told}.*got {file}"):
            check_data(trainer.data, config)
    config = changed(trainer.config, classifier=str(tmp_path / "new.pt"))
    check_data(trainer.data, config)
    assert not (tmp_path / "new.pt").exists()
