import pytest
import torch

from sqloss.datasets import load_dataset
from sqloss.models import classifier as module
from sqloss.models.classifier import Classifier, accuracy, train_classifier


@pytest.fixture
def one_thread():
    """Two threads on images this small wait for one another: for a minute on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_learns_the_digits(one_thread):
    pytest.importorskip("sklearn")
    data = load_dataset("digits")
    classifier = train_classifier(data.train_images, data.train_labels, 10, seed=0)
    assert accuracy(classifier, data.test_images, data.test_labels) > 0.95


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 5)


def test_is_deterministic_by_seed(few_steps):
    images = torch.randint(256, (50, 1, 8, 8), dtype=torch.uint8)
    labels = torch.arange(50) % 3
    first, second, other = (train_classifier(images, labels, 3, seed) for seed in (0, 0, 1))
    weights = [torch.cat([p.flatten() for p in c.parameters()]) for c in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (1, 28, 23), (3, 64, 48), (1, 1, 8), (1, 8, 1), (3, 1, 1)]
)
def test_takes_images_of_any_size(shape):
    assert Classifier(shape, classes=4)(torch.rand(2, *shape)).shape == (2, 4)


def test_predictions_do_not_depend_on_the_batches(monkeypatch):
    classifier, x = Classifier((1, 8, 8), classes=3), torch.rand(7, 1, 8, 8)
    whole = classifier.predict(x)
    monkeypatch.setattr(module, "PREDICTION_BATCH_SIZE", 2)
    assert torch.equal(classifier.predict(x), whole)


def test_sees_features_and_probabilities(monkeypatch):
    classifier, x = Classifier((1, 8, 8), classes=3), torch.rand(7, 1, 8, 8)
    monkeypatch.setattr(module, "PREDICTION_BATCH_SIZE", 3)
    features, probabilities = classifier.see(x)
    assert features.shape == (7, module.FEATURES)
    torch.testing.assert_close(probabilities, classifier(x).softmax(1))
    torch.testing.assert_close(classifier.logits(features), classifier(x))
    assert not features.requires_grad and not probabilities.requires_grad


def test_accuracy_is_the_share_of_hits():
    classifier = Classifier((1, 8, 8), classes=2)
    images = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8)
    seen = classifier.predict(images / 255)
    labels = seen.clone()
    labels[:10] = 1 - labels[:10]
    assert accuracy(classifier, images, labels) == 0.75
