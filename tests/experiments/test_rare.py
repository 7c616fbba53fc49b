"""What models make of rare classes."""

import csv
import json
import math

import pytest
import torch

from sqloss import cli
from sqloss.common.errors import UserError
from sqloss.datasets import load_dataset
from sqloss.experiments import rare
from sqloss.experiments.measurement import Key
from sqloss.experiments.rare import PRIORS, Known, RareClasses, first_row
from sqloss.generation.measures import Samples
from sqloss.models import classifier
from sqloss.training.trainers import TRAINERS

for needed in ("joblib", "matplotlib", "scipy", "sklearn", "tqdm"):
    pytest.importorskip(needed)

TINY = ["--train-limit", "120", "--num-samples", "60", "--epochs", "1"]
VAE = [*TINY, "--hidden", "8", "--latent", "3", "--risk", "mean", "--imbalance", "3:0.5"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for trainer in ("vae", "gan"):
        monkeypatch.setattr(f"sqloss.training.{trainer}.plots.draw_pictures", lambda *_: None)
    monkeypatch.setattr(classifier, "STEPS", 30)
    monkeypatch.setattr(rare, "BOUND_IMAGES", 20)


def sweep(command, directory, *arguments):
    return cli.main(["sweep", command, "--output-dir", str(directory), *arguments])


def rows_in(directory):
    with (directory / "rare.csv").open(newline="") as file:
        return {(row["arm"], row["prior"]): row for row in csv.DictReader(file)}


ARMS = ["--grid", "sampling=shuffle,communities", "--seeds", "2"]


def test_a_sweep_that_is_there_is_measured_anew_and_not_trained(tmp_path):
    run = tmp_path / "sampling=shuffle" / "seed-0"
    assert sweep("vae", tmp_path, *VAE, *ARMS) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pt")}
    assert sweep("vae", tmp_path, *VAE, *ARMS, "--measure", "rare") == 0
    assert {path: path.read_bytes() for path in before} == before
    assert (tmp_path / "sweep.csv").exists() and (tmp_path / "rare.csv").exists()

    rows = rows_in(tmp_path)
    arms = ("sampling=shuffle", "sampling=communities")
    assert list(rows) == [(arm, prior.in_words) for arm in arms for prior in PRIORS]
    # As the report has them: the classifier of seed 0 judges both
    report = json.loads((run / "report.json").read_text())["models"]["standard"]
    measured = json.loads((run / "rare.json").read_text())["rows"]
    own, fitted = measured[:2]
    assert own["negative_elbo"] == report["test"]["negative_elbo"]
    assert own["rare_negative_elbo"] == report["test_by_class"][3]["negative_elbo"]
    assert own["rare_share"] == report["generated"][3]["share"]
    assert own["least_share"] == min(
        each["share"] for number, each in enumerate(report["generated"]) if number != 3
    )
    assert own["worst_class_negative_elbo"] == max(
        each["negative_elbo"] for each in report["test_by_class"]
    )
    assert fitted["negative_elbo"] == report["communities_prior"]["negative_elbo"]

    told = (tmp_path / "rare.md").read_text()
    assert "rare share: difference from the first arm from its own prior (higher is better)" in told
    assert "sampling=communities: communities, power 1.5" in told
    for arm in arms:
        check_weights(tmp_path / arm / "seed-1")


def check_weights(directory):
    """Those of rare classes are of their training images in the prior, or in the batches."""
    rows = {row["prior"]: row for row in json.loads((directory / "rare.json").read_text())["rows"]}
    is_rare = load_dataset("digits", train_limit=120).imbalanced("3:0.5", 1).train_labels == 3
    share = is_rare.double().mean().item()
    assert rows["communities, power 0"]["weight_of_rare"] == pytest.approx(share)
    newest = max((directory / "checkpoints").iterdir())
    sampler = torch.load(newest, weights_only=True).get("sampler")
    expected = sampler and pytest.approx(sampler["p"][is_rare].sum().item())
    assert rows["standard"]["weight_of_rare"] == expected
    assert (sampler is None) == ("shuffle" in str(directory))


def test_a_generator_has_its_own_prior_alone_and_no_losses(tmp_path):
    pytest.importorskip("torchmetrics", exc_type=(ImportError, RuntimeError))
    gan = [*TINY, "--width", "4", "--latent", "4", "--risk", "mean"]
    assert sweep("gan", tmp_path, *gan, "--measure", "rare") == 0
    ((_, row),) = rows_in(tmp_path).items()
    assert row["prior"] == "standard" and row["negative_elbo"] == "" and row["clear"] != ""


def test_without_rare_classes_the_others_are_measured(tmp_path):
    arguments = [*VAE[:-1], "none", "--measure", "rare"]
    assert sweep("vae", tmp_path, *arguments) == 0
    for row in rows_in(tmp_path).values():
        assert row["rare_share"] == row["rare_negative_elbo"] == row["rare_nearest"] == ""
        assert 0 <= float(row["least_share"]) <= 0.1
    told = (tmp_path / "rare.md").read_text()
    assert "least common" in told and "among clear" not in told


def test_a_trainer_without_images_is_refused(monkeypatch):
    monkeypatch.setattr(type(TRAINERS["vae"]), "priors", ())
    with pytest.raises(UserError, match="--measure: expected report for sqloss vae"):
        RareClasses("vae")


def test_all_is_compared_with_the_first_arm_from_its_own_prior():
    first = Key("mean", "standard", ("standard",))
    others = [Key("mean", "standard", ("mixture",)), Key("cvar", "cvar", ("standard",))]
    series = {key: {0: 1.0} for key in [first, *others]}
    assert [first_row(key, series) for key in series] == [None, first, first]


@pytest.mark.parametrize(("split", "ratio"), [("train", 0.0), ("test", 1.0)])
def test_copies_are_near(split, ratio):
    data = load_dataset("digits")
    classes = torch.arange(10) == 3
    images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
    samples = Samples(images, {}, labels, torch.ones(len(labels)))
    assert Known.of(data, classes).ratio(samples) == pytest.approx(ratio, abs=1e-3)


def test_where_none_is_clear_there_is_no_distance():
    data = load_dataset("digits")
    known = Known.of(data, torch.arange(10) == 3)
    unsure = Samples(data.test_images, {}, data.test_labels, torch.zeros(len(data.test_labels)))
    assert known.ratio(unsure) is None
    nothing = Known.of(data, torch.zeros(10, dtype=torch.bool))
    assert math.isnan(nothing.held_out) and nothing.ratio(unsure) is None
