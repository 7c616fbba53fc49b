import itertools
import json

import pytest
import torch
from PIL import Image, ImageDraw

from sqloss import cli
from sqloss.common.flags import configure
from sqloss.datasets import load_dataset
from sqloss.models import classifier
from sqloss.models.pixels import pixels
from sqloss.training.attributes import AttributeJudge
from sqloss.training.progress import Silence
from sqloss.training.run import Run
from sqloss.training.trainer import TRAINERS
from sqloss.training.vae.config import VAEConfig

NAMES = ("Eyeglasses", "Male", "Smiling")
RARE = "Eyeglasses=1,Male=0"
FACES, TRAIN = 500, 400


@pytest.fixture
def faces(tmp_path, write_celeba, monkeypatch):
    """Drawn faces of every combination of the attributes, as often as any other."""
    monkeypatch.setattr(classifier, "STEPS", 3)
    combinations = itertools.cycle(itertools.product((False, True), repeat=3))
    drawn = [next(combinations) for _ in range(FACES)]
    attributes = dict(zip(NAMES, zip(*drawn, strict=True), strict=True))
    parts = [0] * TRAIN + [2] * (FACES - TRAIN)
    write_celeba(
        tmp_path, [face(number, *has) for number, has in enumerate(drawn)], attributes, parts
    )
    return tmp_path


def face(number: int, eyeglasses: bool, male: bool, smiling: bool) -> Image.Image:
    image = Image.new("RGB", (36, 44), (40, 40 + number % 50, 60))
    draw = ImageDraw.Draw(image)
    draw.ellipse((6, 8, 30, 38), fill=(220, 180 - number % 30, 150))
    for x in (12, 20):
        draw.rectangle((x, 18, x + 4, 22), fill=(0, 0, 0) if eyeglasses else (200, 220, 255))
    if male:
        draw.rectangle((4, 4, 32, 12), fill=(20, 20, 220))
    draw.rectangle((12, 30, 24, 33), fill=(255, 0, 0) if smiling else (220, 180, 150))
    return image


def load(faces, **flags):
    return load_dataset("celeba", data_dir=faces, image_size=12, **flags)


def test_a_small_classifier_sees_the_attributes(faces, monkeypatch):
    monkeypatch.setattr(classifier, "STEPS", 200)
    whole = load(faces)
    data = whole.imbalanced(f"{RARE}:0.1", 0)
    judge = AttributeJudge.learn(whole, f"{RARE}:0.1", torch.device("cpu"), seed=0)
    told = judge.describe(whole, data)
    assert told["parts"] == ["Eyeglasses=1", "Male=1", "Smiling=1", RARE]
    assert told["train_before_imbalance"] == pytest.approx([0.5, 0.5, 0.5, 0.25], abs=0.01)
    assert told["train"][3] == pytest.approx(10 / 310, abs=0.001)
    assert min(told["classifier_test_accuracy"].values()) > 0.95
    seen = judge.shares(pixels(part) for part in whole.test_images.split(30))
    for part, of_part in zip((0.5, 0.5, 0.5, 0.25), seen, strict=True):
        assert of_part["low"] <= part <= of_part["high"]
        assert of_part["share"] == pytest.approx(part, abs=0.05)


@pytest.mark.parametrize("trainer", ["vae", "gan"])
def test_a_report_has_a_row_for_each_attribute_and_each_rare_combination(faces, tmp_path, trainer):
    size = {"vae": ["--hidden", "8", "--latent", "3"], "gan": ["--width", "2"]}[trainer]
    flags = ["--dataset", "celeba", "--data-dir", str(faces), "--imbalance", f"{RARE}:0.1"]
    flags += ["--image-size", "12", "--epochs", "1", "--num-samples", "60", *size]
    run = tmp_path / "run"
    assert cli.main([trainer, *flags, "--workers", "1", "--output-dir", str(run)]) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["attributes"]["parts"] == [*(f"{name}=1" for name in NAMES), RARE]
    text = (run / "report.md").read_text()
    assert f"| {RARE} " in text and "Attributes are seen by another" in text
    metric = TRAINERS[trainer].metrics["rare_share"]
    for model in report["models"].values():
        assert [of_part["count"] <= 60 for of_part in model["attributes"]] == [True] * 4
        assert metric.value(report, model) == model["attributes"][3]["share"]
        if trainer == "vae":
            images = [of_part["images"] for of_part in model["test_by_attribute"]]
            assert images == pytest.approx([50, 50, 50, 25], abs=2)
            both = (model["test_by_class"][1], model["test_by_attribute"][2])  # those that smile
            assert both[0]["negative_elbo"] == both[1]["negative_elbo"]


def test_a_run_goes_on_from_a_file_as_from_memory(faces, tmp_path, assert_same_run):
    settings = {"dataset": "celeba", "data_dir": str(faces), "image_size": 12, "hidden": "8"}
    vae = TRAINERS["vae"]

    def train(run) -> None:
        run.begin(vae, vae.load(run.config))
        assert run.fit(Silence())

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for directory, epochs in ((whole, 2), (parts, 1)):
        config = configure(VAEConfig, epochs=epochs, latent=3, imbalance="Male=1:0.5", **settings)
        train(Run.new(directory, config))
    train(Run.resumed(VAEConfig, parts, {"epochs": 2, "workers": 2}))
    assert_same_run(whole, parts)
