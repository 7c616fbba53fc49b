import json
import math
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from sqloss.common.errors import UserError
from sqloss.datasets import load_dataset
from sqloss.models import classifier as classifiers
from sqloss.models.classifier import train_classifier
from sqloss.models.pixels import pixels
from sqloss.training.gan import metrics
from sqloss.training.gan.metrics import (
    class_coverage,
    floor,
    frechet_distance,
    kernel_distance,
    measure_images,
    nearest_neighbours,
    precision_and_recall,
    require_fid,
    true_fid,
)

sqrtm = pytest.importorskip("scipy.linalg").sqrtm
cdist = pytest.importorskip("scipy.spatial.distance").cdist
pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics", exc_type=(ImportError, RuntimeError))


def normal(*shape, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draws, dtype=torch.float64)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def classifier(digits):
    with pytest.MonkeyPatch.context() as few:
        few.setattr(classifiers, "STEPS", 150)
        return train_classifier(digits.train_images, digits.train_labels, 10, seed=0)


@pytest.fixture(scope="module")
def judge(digits, classifier):
    def measured(generated, seed=0):
        return measure_images(generated, digits.train_images, digits.test_images, classifier, seed)

    return measured


# The distances.


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("scale", [1, 3])
def test_frechet_distance_is_that_of_the_formula(shift, scale):
    mixing = normal(6, 6, seed=2)
    features, reference = scale * normal(300, 6) @ mixing + shift, normal(200, 6, seed=1)
    x, y = features.numpy(), reference.numpy()
    s, t = np.cov(x.T), np.cov(y.T)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert frechet_distance(features, reference) == pytest.approx(expected, rel=1e-9)


def mmd(x, y):
    """Binkowski et al. (2018), equation 4: unbiased, so without the diagonals."""
    x, y = x.numpy(), y.numpy()

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_off_diagonal(k):
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    between = kernel(x, y).mean()
    return mean_off_diagonal(kernel(x, x)) + mean_off_diagonal(kernel(y, y)) - 2 * between


def test_kernel_distance_is_that_of_the_formula():
    few = normal(2, 5) + 1, normal(2, 5, seed=1)  # every subset is the set
    assert kernel_distance(*few, seed=0) == pytest.approx((mmd(*few), 0), rel=1e-9, abs=1e-12)
    many = normal(200, 5) + 0.5, normal(200, 5, seed=1)
    mean, std = kernel_distance(*many, seed=0)
    assert std > 0.01
    assert abs(mean - mmd(*many)) < 4 * std / math.sqrt(metrics.KERNEL_SUBSETS)


def test_distances_grow_from_real_images_over_a_lost_class_to_noise(digits, classifier, judge):
    images = pixels(digits.train_images)
    real = floor(1000, digits.train_images, digits.test_images, classifier, seed=0)
    lost = judge(images[digits.train_labels >= 3][:1000])
    noise = judge(torch.rand(images[:1000].shape, generator=torch.Generator().manual_seed(0)))
    for name in ("cfid", "ckid"):
        assert 2 * abs(real[name]) < lost[name] and 2 * lost[name] < noise[name]
    assert noise["precision"] < 0.1 < lost["precision"]
    assert lost["recall"] < real["recall"] - 0.1
    assert lost["modes"] == 7 < real["modes"] == 10
    assert lost["label_entropy"] < real["label_entropy"] < real["label_entropy_max"]


def test_distance_of_equal_sets_is_zero(digits, judge):
    same = judge(pixels(digits.test_images))
    assert same["cfid"] == pytest.approx(0, abs=1e-3)
    assert abs(same["ckid"]) < 0.05  # of noise it is 1.7
    assert same["precision"] == same["recall"] == 1


# Precision and recall.


def two_modes(count, seed):
    return torch.cat([normal(count, 8, seed=seed), normal(count, 8, seed=seed + 1) + 100])


def test_a_lost_mode_costs_recall_and_no_precision():
    reference = two_modes(100, seed=0)
    precision, recall = precision_and_recall(two_modes(100, seed=2)[:100], reference)
    assert precision > 0.5
    assert recall < 0.5
    whole = precision_and_recall(two_modes(100, seed=2), reference)
    assert whole == pytest.approx((precision, 2 * recall), abs=0.1)


def test_points_elsewhere_cost_precision_and_no_recall():
    reference = two_modes(100, seed=0)
    made = two_modes(100, seed=2)
    precision, recall = precision_and_recall(made, reference)
    elsewhere = torch.cat([made, made + 1000])
    assert precision_and_recall(elsewhere, reference) == (precision / 2, recall)


def test_precision_and_recall_of_points_on_a_line():
    # The third nearest is 3 away at the ends and 2 in the middle.
    reference = torch.tensor([[0.0], [1], [2], [3], [4]], dtype=torch.float64)
    made = torch.tensor([[-2.9], [-3.1], [2.5], [7.1]], dtype=torch.float64)
    # The third nearest of the four is 10.0, 10.2, 5.6 and 10.2 away: all are near.
    assert precision_and_recall(made, reference) == (0.5, 1)


def test_an_outlier_can_have_everything_near_it():
    """As the report says: its ball reaches back to the others, and whatever lies between"""
    reference = torch.cat([normal(50, 8), torch.full((1, 8), 100.0, dtype=torch.float64)])
    noise = 50 + normal(50, 8, seed=1)
    assert precision_and_recall(noise, reference) == (1, 0)
    assert precision_and_recall(noise, reference[:-1]) == (0, 0)


def test_precision_and_recall_take_as_many_images_of_both(digits, judge, monkeypatch):
    monkeypatch.setattr(metrics, "MANIFOLD_IMAGES", 50)
    sizes = []
    both = metrics.precision_and_recall
    monkeypatch.setattr(
        metrics,
        "precision_and_recall",
        lambda x, y: sizes.append((len(x), len(y))) or both(x, y),
    )
    images = pixels(digits.train_images)
    judge(images[:200])
    judge(images[:20])
    assert sizes == [(50, 50), (20, 20)]


# Classes.


def sure_of(predicted, classes, confidence=1.0):
    others = (1 - confidence) / max(classes - 1, 1)
    probabilities = torch.full((len(predicted), classes), others, dtype=torch.float64)
    probabilities[range(len(predicted)), predicted] = confidence
    return probabilities


def test_class_coverage_of_known_predictions():
    half = class_coverage(sure_of([0, 1, 2, 3, 4] * 20, classes=10))
    assert half == pytest.approx(
        {"label_entropy": math.log(5), "label_entropy_max": math.log(10), "modes": 5}
    )
    assert class_coverage(sure_of([0] * 50 + [1] * 25 + [2] * 25, classes=3)) == pytest.approx(
        {"label_entropy": 1.5 * math.log(2), "label_entropy_max": math.log(3), "modes": 3}
    )


def test_a_mode_needs_a_share_and_confidence():
    # 1 % of 1,000 images is a tenth of an even share among ten classes
    assert class_coverage(sure_of([0] * 981 + [1] * 10 + [2] * 9, classes=10))["modes"] == 2
    assert class_coverage(sure_of([0, 1], classes=10, confidence=0.91))["modes"] == 2
    assert class_coverage(sure_of([0, 1], classes=10, confidence=0.89))["modes"] == 0


def test_coverage_of_a_single_class():
    coverage = class_coverage(torch.ones(5, 1, dtype=torch.float64))
    assert coverage == {"label_entropy": 0, "label_entropy_max": 0, "modes": 1}


# Nearest training images.


@pytest.mark.parametrize("at_once", [metrics.PIXELS_AT_ONCE, 64 * 100, 1])
def test_nearest_neighbours_are_the_nearest(digits, monkeypatch, at_once):
    monkeypatch.setattr(metrics, "PIXELS_AT_ONCE", at_once)
    generated, train = torch.rand(20, 1, 8, 8), digits.train_images[:250]
    distances, indices = nearest_neighbours(generated, train)
    expected = cdist(generated.flatten(1).double(), pixels(train).flatten(1).double())
    np.testing.assert_array_equal(indices, expected.argmin(1))
    np.testing.assert_allclose(distances, expected.min(1), rtol=1e-12)


def test_memorised_images_are_at_the_distance_zero(digits, judge):
    memorised = pixels(digits.train_images[300:500])
    distances, indices = nearest_neighbours(memorised, digits.train_images)
    assert (distances == 0).all()
    assert torch.equal(indices, torch.arange(300, 500))
    rows = judge(memorised)["nearest"]
    assert [row["quantile"] for row in rows] == list(metrics.QUANTILES)
    assert all(row["generated"] == 0 for row in rows)
    assert rows[0]["held_out"] <= rows[-1]["held_out"]
    assert rows[2]["held_out"] > 0.3


def test_quantiles_are_of_a_random_choice(digits, judge, monkeypatch):
    monkeypatch.setattr(metrics, "NEAREST_AMONG", 30)
    memorised = pixels(digits.train_images[:40])
    blank = torch.ones_like(memorised)  # after the first 40 images, so some must be chosen
    rows = {
        row["quantile"]: row["generated"] for row in judge(torch.cat([memorised, blank]))["nearest"]
    }
    assert rows[0.0] == 0 < rows[0.9]


# Sets of any size.


def test_measurements_are_plain_numbers_and_repeat_by_seed(digits, classifier, judge, monkeypatch):
    monkeypatch.setattr(metrics, "NEAREST_AMONG", 100)
    generated = pixels(digits.train_images[:200])
    state = torch.get_rng_state()
    first = judge(generated)
    floors = [
        floor(50, digits.train_images, digits.test_images, classifier, seed) for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    again = judge(generated)
    assert json.loads(json.dumps(first, allow_nan=False)) == first == again
    assert judge(generated, seed=1)["ckid"] != first["ckid"]
    assert floors[0] == floors[1]
    assert floors[0]["cfid"] != floors[2]["cfid"]  # of other images


def test_floor_takes_all_training_images_where_there_are_no_more(digits, classifier):
    arguments = digits.train_images[:30], digits.test_images, classifier
    whole = floor(30, *arguments, seed=0)
    assert floor(10_000, *arguments, seed=0) == whole
    assert whole["images"] == 30 and whole["reference_images"] == len(digits.test_images)
    assert floor(20, *arguments, seed=0)["images"] == 20


@pytest.mark.parametrize("count", [2, 3, 4])
def test_few_images_can_be_judged(digits, classifier, count):
    generated, test = pixels(digits.train_images[:count]), digits.test_images[:count]
    measured = measure_images(generated, digits.train_images[:1], test, classifier, seed=0)
    json.dumps(measured, allow_nan=False)
    assert measured["images"] == measured["reference_images"] == count


def test_images_that_are_all_the_same_can_be_judged(digits, judge):
    measured = judge(pixels(digits.train_images[:1]).expand(500, -1, -1, -1))
    json.dumps(measured, allow_nan=False)
    assert (measured["modes"], measured["label_entropy"], measured["recall"]) == (1, 0, 0)


def test_one_class_only(digits):
    zeros = digits.train_images[digits.train_labels == 0]
    with pytest.MonkeyPatch.context() as few:
        few.setattr(classifiers, "STEPS", 1)
        only = train_classifier(zeros, torch.zeros(len(zeros), dtype=torch.int64), 1, seed=0)
    measured = floor(50, zeros[:70], zeros[70:], only, seed=0)
    assert (measured["modes"], measured["label_entropy"], measured["label_entropy_max"]) == (
        1,
        0,
        0,
    )


def broken(images, value):
    images = images.clone()
    images[3, 0, 2, 2] = value
    images[5] = value
    return images


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: broken(x, math.nan), "expected finite pixels, got NaN or infinity in 2 of 20"),
        (lambda x: broken(x, math.inf), "expected finite pixels, got NaN or infinity in 2 of 20"),
        (lambda x: 2 * x - 1, r"expected pixels in \[0, 1\], got -1 to 1"),
        (lambda x: x[:1], "expected at least 2 images, got 1"),
        (lambda x: x[:0], "expected at least 2 images, got 0"),
        (lambda x: x[:, :, 1:], r"test images, \(1, 8, 8\), got \(1, 7, 8\)"),
    ],
)
def test_images_that_cannot_be_judged(digits, judge, tmp_path, make, message):
    generated = make(pixels(digits.train_images[:20]))
    with pytest.raises(UserError, match=f"^measure_images: generated: .*{message}"):
        judge(generated)
    with pytest.raises(UserError, match=f"^true_fid: generated: .*{message}"):
        true_fid(generated, digits.test_images, tmp_path)


def test_real_images_that_are_too_few(digits, classifier):
    train, test = digits.train_images, digits.test_images
    with pytest.raises(UserError, match=r"^floor: train_images: expected at least 2 .* got 1"):
        floor(10, train[:1], test, classifier, seed=0)
    with pytest.raises(UserError, match=r"^floor: test_images: expected at least 2 .* got 1"):
        floor(10, train, test[:1], classifier, seed=0)


# The true FID.


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """Weights drawn at random, in the file's form; judged by 64 features, for the time."""
    pytest.importorskip("torch_fidelity", reason="the true FID needs torch-fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    weights = tmp_path / metrics.FID_WEIGHTS
    torch.save({}, weights)
    with monkeypatch.context() as empty:
        empty.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        extractor = FeatureExtractorInceptionV3("random", ["64"], str(weights))
    torch.save(extractor.state_dict(), weights)
    monkeypatch.setattr(metrics, "FID_FEATURES", 64)
    return weights


@pytest.mark.parametrize("channels", [1, 3])
def test_true_fid_is_that_of_torch_fidelity(inception, channels):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    require_fid(inception)
    draws = torch.Generator().manual_seed(0)
    real, made = torch.randint(256, (2, 4, channels, 8, 8), generator=draws, dtype=torch.uint8)
    extract = FeatureExtractorInceptionV3("random", ["64"], str(inception))
    features, reference = (extract(x.expand(-1, 3, -1, -1))[0].double() for x in (made, real))
    expected = frechet_distance(features, reference)
    assert expected > 0
    assert true_fid(pixels(made), real, inception) == pytest.approx(expected, rel=1e-3)


def test_true_fid_is_zero_for_the_same_images(inception):
    every_value = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    almost = (pixels(every_value) - 0.4 / 255).clamp(0)  # in 8 bits, the same
    assert abs(true_fid(almost, every_value, inception)) < 1e-6


def test_weights_that_are_others(inception):
    torch.save(nn.Linear(2, 2).state_dict(), inception)
    with pytest.raises(UserError, match=r"^--fid-weights: .* not hold them \(RuntimeError"):
        require_fid(inception)


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("the file has run code",))


@pytest.mark.parametrize(
    "content",
    [b"", b"something else", pickle.dumps(Malicious(), protocol=2)],
    ids=["empty", "text", "code"],
)
def test_files_that_are_no_weights(content, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    weights = tmp_path / "weights.pth"
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"expected .*weights\.pth, which does not hold them"):
        require_fid(weights)


def test_a_file_of_weights_that_is_absent(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    for weights in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(UserError, match=r"^--fid-weights: expected .* which is no file"):
            require_fid(weights)


def test_torch_fidelity_is_named_where_it_is_missing(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    message = r"torch-fidelity is needed .* pip install 'sqloss\[fid\]'"
    with pytest.raises(UserError, match=message):
        require_fid(tmp_path)
    with pytest.raises(UserError, match=message):
        true_fid(pixels(digits.test_images[:2]), digits.test_images[:2], tmp_path)
