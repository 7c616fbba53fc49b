import pytest
import torch

from sqloss.common.flags import configure
from sqloss.datasets import Dataset, load_dataset
from sqloss.models import classifier as classifiers
from sqloss.models.classifier import Classifier, accuracy, train_classifier
from sqloss.models.gan import GAN, Generator
from sqloss.models.seeding import initialisation
from sqloss.training import shares
from sqloss.training.gan.config import GANConfig
from sqloss.training.gan.generation import Noise, draw_noise, generate, generate_many
from sqloss.training.gan.loop import GANTraining, begin
from sqloss.training.gan.plots import CODE_STEPS, noise_by_code
from sqloss.training.loop import fit
from sqloss.training.progress import Silence


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(**kinds: int) -> Generator:
    with initialisation(0, "model"):
        return GAN((1, 8, 8), 3, 2, **kinds).generator


# noise


def test_noise_is_what_the_model_needs():
    plain = draw_noise(4, model(), draws())
    assert (plain.z.shape, plain.labels, plain.codes) == ((4, 3), None, None)
    every = draw_noise(4, model(classes=5, codes=2), draws())
    assert (every.z.shape, every.labels.shape, every.codes.shape) == ((4, 3), (4,), (4, 2))
    assert every.labels.dtype == torch.int64
    assert torch.equal(plain.z, every.z)


def test_labels_that_are_given_are_kept_where_the_model_has_any():
    labels = torch.tensor([4, 0, 4])
    assert draw_noise(3, model(classes=5), draws(), labels).labels is labels
    assert draw_noise(3, model(), draws(), labels).labels is None


def test_the_distributions_of_noise():
    noise = draw_noise(20_000, model(classes=5, codes=2), draws())
    assert noise.z.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.z.std().item() == pytest.approx(1, abs=0.02)
    shares_of_labels = torch.bincount(noise.labels) / 20_000
    torch.testing.assert_close(shares_of_labels, torch.full((5,), 0.2), atol=0.015, rtol=0)
    assert -1 <= noise.codes.min() < -0.99 < 0.99 < noise.codes.max() <= 1
    assert noise.codes.var().item() == pytest.approx(1 / 3, abs=0.01)


def test_noise_is_drawn_alike_from_equal_generators(assert_same):
    first, second = (draw_noise(5, model(classes=2, codes=1), draws(7)) for _ in range(2))
    assert_same(first._asdict(), second._asdict())
    assert not torch.equal(first.z, draw_noise(5, model(), draws(8)).z)


# images


def test_images_are_pixels_each_from_its_own_noise():
    generator = model(classes=3, codes=1)
    generator(*draw_noise(64, generator, draws(1)))  # batch norm has seen something
    noise = draw_noise(6, generator, draws())
    images = generate(generator, noise)
    assert images.shape == (6, 1, 8, 8)
    assert 0 <= images.min() < images.max() <= 1
    assert not images.requires_grad
    single = generate(generator, Noise(*(part[2:3] for part in noise)))
    torch.testing.assert_close(single, images[2:3])


@pytest.mark.parametrize("training", [True, False])
def test_generating_changes_nothing(training, assert_same):
    generator = model().train(training)
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    generate(generator, draw_noise(6, generator, draws()))
    assert generator.training == training
    assert_same(dict(generator.state_dict()), before)


def test_many_images_come_in_batches_from_one_stream(monkeypatch):
    monkeypatch.setattr(shares, "GENERATED_BATCH_SIZE", 4)
    generator = model(classes=3)
    batches = list(generate_many(generator, 10, draws()))
    assert [len(images) for images, _ in batches] == [4, 4, 2]
    one_stream = draws()
    for images, noise in batches:
        again = draw_noise(len(images), generator, one_stream)
        assert torch.equal(noise.z, again.z)
        assert torch.equal(noise.labels, again.labels)
        assert torch.equal(images, generate(generator, again))


# what generators learn


def trained(data: Dataset, **settings) -> GANTraining:
    config = configure(GANConfig, imbalance="none", alpha=0.0, **settings)
    training = begin(config, data)
    assert fit(training, data, config, lambda: None, Silence())
    return training


def judge(data: Dataset, steps: int) -> Classifier:
    """A classifier that is trained for fewer steps than usual."""
    with pytest.MonkeyPatch.context() as few:
        few.setattr(classifiers, "STEPS", steps)
        classifier = train_classifier(data.train_images, data.train_labels, 10, seed=0)
    assert accuracy(classifier, data.test_images, data.test_labels) > 0.94
    return classifier


def share_of_the_class_asked_for(training: GANTraining, classifier: Classifier) -> float:
    [generator] = training.generators.values()
    [(images, noise)] = generate_many(generator, 1000, draws())
    asked = torch.bincount(noise.labels, minlength=10)
    assert asked.min() > 50, "every class is asked for"
    return (classifier.predict(images) == noise.labels).double().mean().item()


@pytest.fixture(scope="module")
def digits() -> Dataset:
    pytest.importorskip("sklearn")
    return load_dataset("digits")


def test_conditional_samples_are_of_the_class_asked_for(digits):
    training = trained(digits, conditional=True, width=16, epochs=6, lr_d=3e-3, lr_g=3e-3, ema=0.97)
    assert share_of_the_class_asked_for(training, judge(digits, steps=200)) >= 0.9


def test_conditional_samples_of_the_real_mnist(real_mnist):
    mnist = load_dataset("mnist", data_dir=real_mnist, download=True, train_limit=4000)
    settings = {"width": 16, "epochs": 8, "batch_size": 64, "lr_d": 2e-3, "lr_g": 2e-3}
    training = trained(mnist, conditional=True, ema=0.98, **settings)
    assert share_of_the_class_asked_for(training, judge(mnist, steps=200)) >= 0.9


def test_codes_are_read_back_from_images_that_vary_with_them(digits):
    settings = {"width": 16, "epochs": 4, "lr_d": 1e-3, "lr_g": 1e-3}
    training = trained(digits, info_codes=2, **settings)
    model = training.models["standard"]
    noise = draw_noise(500, model.generator, draws())
    with torch.no_grad():
        images = 2 * generate(model.generator, noise) - 1
        _, loc, _ = model.discriminator.eval().with_codes(images)
    correlations = torch.corrcoef(torch.cat([loc, noise.codes], 1).T)[:2, 2:]
    assert correlations.diagonal().min() >= 0.8
    assert correlations.fliplr().diagonal().abs().max() <= 0.3, "each code has a place of its own"

    rows = generate(model.generator, noise_by_code(model.generator, 2, seed=0))
    for row in rows.unflatten(0, (2, CODE_STEPS)):
        neighbours = (row[1:] - row[:-1]).abs().mean((1, 2, 3))
        assert neighbours.min() > 0.005, "every step along a row changes the image"
        assert (row[-1] - row[0]).abs().mean() > 0.1
