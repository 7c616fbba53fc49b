import re

import pytest
import torch
from torch import nn

from sqloss.models import GAN
from sqloss.models.gan import LEAST_CODE_VAR, Discriminator, Generator
from sqloss.models.gan_losses import code_losses
from sqloss.models.seeding import initialisation

LATENT, WIDTH = 6, 4


def make(shape=(1, 8, 8), **options) -> GAN:
    return GAN(shape, LATENT, WIDTH, **options)


def leaves(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if not list(module.children())]


# the guidelines of Radford et al. (2016), and the sizes


@pytest.fixture(params=[28, 32, 64])
def side(request) -> int:
    return request.param


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def channels(request) -> int:
    return request.param


def test_the_discriminator_keeps_the_guidelines(side, channels):
    """Strided convolutions, leaky ReLUs, batch norm but on the input; no pooling, no dense layer"""
    *hidden, head = leaves(make((channels, side, side)).discriminator)
    first, others = hidden[:2], hidden[2:]
    assert [type(layer) for layer in first] == [nn.Conv2d, nn.LeakyReLU]
    layers = [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU]
    assert [type(layer) for layer in others] == layers * (len(others) // 3)
    assert len(others) >= 6
    convolutions = [layer for layer in hidden if type(layer) is nn.Conv2d]
    assert {layer.stride for layer in convolutions} == {(2, 2)}
    assert {layer.negative_slope for layer in hidden if type(layer) is nn.LeakyReLU} == {0.2}
    assert [layer.bias is None for layer in convolutions] == [False] + [True] * (len(others) // 3)
    assert type(head) is nn.Conv2d
    assert (head.kernel_size, head.out_channels, head.bias is None) == ((4, 4), 1, False)


def test_the_generator_keeps_the_guidelines(side, channels):
    """Strided transposed convolutions, ReLUs and tanh, batch norm but on the output; no pooling, no
    dense layer"""
    *hidden, last, tanh = leaves(make((channels, side, side)).generator)
    layers = [nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU]
    assert [type(layer) for layer in hidden] == layers * (len(hidden) // 3)
    assert len(hidden) >= 9
    assert [type(last), type(tanh)] == [nn.ConvTranspose2d, nn.Tanh]
    first, *others = [layer for layer in hidden if type(layer) is nn.ConvTranspose2d]
    assert (first.in_channels, first.kernel_size) == (LATENT, (4, 4))
    assert {layer.stride for layer in [*others, last]} == {(2, 2)}
    assert all(layer.bias is None for layer in [first, *others])
    assert last.bias is not None


@pytest.mark.parametrize(
    ("shape", "depths", "maps", "kernels"),
    [
        ((1, 5, 5), [4, 8], [(3, 3), (2, 2)], [(3, 3), (3, 3)]),
        ((1, 8, 8), [4, 8], [(4, 4), (2, 2)], [(4, 4), (4, 4)]),
        (
            (1, 28, 28),
            [4, 8, 16],
            [(14, 14), (7, 7), (4, 4)],
            [(4, 4), (4, 4), (3, 3)],
        ),
        (
            (2, 23, 28),
            [4, 8, 16],
            [(12, 14), (6, 7), (3, 4)],
            [(3, 4), (4, 4), (4, 3)],
        ),
        (
            (3, 64, 5),
            [4, 8, 16, 32],
            [(32, 3), (16, 2), (8, 1), (4, 1)],
            [(4, 3), (4, 3), (4, 4), (4, 3)],
        ),
    ],
)
def test_maps_are_halved_and_doubled_for_images_of_any_size(shape, depths, maps, kernels):
    model, seen = make(shape), []
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            layer.register_forward_hook(lambda layer, _, y: seen.append((layer, tuple(y.shape))))
    images = model.generator(torch.randn(2, LATENT))
    upwards, seen[:] = list(seen), []
    assert model.discriminator(images).shape == (2,)
    downwards = seen[:-1]

    expected = [(2, depth, *sides) for depth, sides in zip(depths, maps, strict=True)]
    assert [size for _, size in downwards] == expected
    assert [layer.kernel_size for layer, _ in downwards] == kernels
    assert [size for _, size in upwards] == [*reversed(expected), (2, *shape)]
    assert [layer.kernel_size for layer, _ in upwards] == [maps[-1], *reversed(kernels)]


def test_images_are_in_the_range_of_the_data():
    generator = make().generator
    images = generator(torch.randn(5, LATENT))
    assert images.min() < 0 < images.max() and images.abs().max() < 0.9, "grey to begin with"
    with torch.no_grad():
        generator.layers[-2].weight.mul_(1e4)
    images = generator(torch.randn(5, LATENT))
    assert images.min() == -1 and images.max() == 1


def test_initial_weights():
    model = GAN((3, 32, 32), 20, 16, classes=10, codes=2)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    convolutions = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    for layers, mean in ((norms, 1.0), (convolutions, 0.0)):
        weights = torch.cat([layer.weight.flatten() for layer in layers])
        few = len(weights) ** -0.5
        assert weights.mean().item() == pytest.approx(mean, abs=4 * 0.02 * few)
        assert weights.std().item() == pytest.approx(0.02, rel=4 * few)
    biases = [layer.bias for layer in norms + convolutions if layer.bias is not None]
    assert len(biases) == len(norms) + 4  # the generator's output, the discriminator's input, heads
    assert not any(bias.any() for bias in biases)
    for layer in convolutions:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.15)


def test_initial_weights_are_those_of_the_seed():
    weights = []
    for seed in (0, 0, 1):
        with initialisation(seed, "gan"):
            weights.append(torch.cat([p.flatten() for p in make().parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


OPTIONS = {
    "plain": {},
    "classes": {"classes": 3},
    "codes": {"codes": 2},
    "both": {"classes": 3, "codes": 2},
    "no batch norm": {"batch_norm": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_gets_a_gradient(options):
    model = make((1, 12, 16), **options)
    labels = torch.tensor([0, 1, 2, 0]) if "classes" in options else None
    codes = torch.rand(4, 2) if "codes" in options else None
    images = model.generator(torch.randn(4, LATENT), labels, codes)
    if codes is None:
        loss = model.discriminator(images, labels).exp().sum()
    else:
        logits, loc, var = model.discriminator.with_codes(images, labels)
        loss = logits.exp().sum() + code_losses(loc, var, codes).sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_without_batch_norm_every_logit_is_of_one_image():
    discriminator = make((1, 12, 16), batch_norm=False).discriminator.double()
    images = torch.randn(3, 1, 12, 16, dtype=torch.float64)
    alone = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(discriminator(images), alone)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in discriminator.modules())


# labels


def test_the_label_changes_the_image():
    generator = make(classes=3).generator
    images = generator(torch.randn(1, LATENT).expand(3, -1), torch.arange(3))
    assert min((images[i] - images[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3


def test_the_logit_is_a_projection_on_the_label():
    discriminator = make((1, 16, 12), classes=3).discriminator.double()
    nn.init.normal_(discriminator.head.bias)
    images, labels = torch.randn(4, 1, 16, 12, dtype=torch.float64), torch.tensor([0, 2, 1, 2])
    features = discriminator.body(images)
    weight, bias = discriminator.head.weight, discriminator.head.bias
    unlabelled = (features * weight[0]).flatten(1).sum(1) + bias[0]
    of_label = (features * weight[1 + labels]).flatten(1).sum(1) + bias[1 + labels]
    torch.testing.assert_close(discriminator(images, labels), unlabelled + of_label)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_its_range(label):
    model, labels = make(classes=3), torch.tensor([0, label])
    with pytest.raises(RuntimeError):
        model.generator(torch.randn(2, LATENT), labels)
    with pytest.raises(RuntimeError):
        model.discriminator(torch.zeros(2, 1, 8, 8), labels)


# codes


def test_the_codes_change_the_image():
    generator = make(codes=2).generator
    codes = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    images = generator(torch.randn(1, LATENT).expand(3, -1), codes=codes)
    assert min((images[i] - images[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3


def test_logits_with_and_without_codes_are_the_same():
    discriminator = make(classes=3, codes=2).discriminator
    images, labels = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    logits, loc, var = discriminator.with_codes(images, labels)
    torch.testing.assert_close(logits, discriminator(images, labels))
    assert loc.shape == var.shape == (5, 2)


@pytest.mark.parametrize("bias", [-1e4, -10.0, 0.0, 1e4])
def test_the_variance_of_codes_is_positive(bias):
    discriminator = make(codes=2).discriminator
    with torch.no_grad():
        discriminator.code_head.bias.fill_(bias)
    _, loc, var = discriminator.with_codes(torch.randn(3, 1, 8, 8))
    assert (var >= LEAST_CODE_VAR).all() and var.isfinite().all()
    assert code_losses(loc.detach(), var, loc.detach()).isfinite().all()


def test_codes_can_be_learnt():
    """Generator and Q agree on a code that the image then shows"""
    model = make(codes=1)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        codes = 2 * torch.rand(32, 1) - 1
        images = model.generator(torch.randn(32, LATENT), codes=codes)
        _, loc, var = model.discriminator.with_codes(images)
        loss = code_losses(loc, var, codes).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert torch.corrcoef(torch.cat([loc, codes], 1).T)[0, 1] > 0.9


# errors


@pytest.mark.parametrize("network", [Generator, Discriminator, GAN])
@pytest.mark.parametrize("shape", [(1, 4, 8), (1, 28, 3), (0, 8, 8), (8, 8)])
def test_what_is_no_shape_of_images(network, shape):
    expected = "data_shape: expected (channels, height, width) with sides of at least 5 pixels, got"
    with pytest.raises(ValueError, match=re.escape(f"{expected} {shape}")):
        network(shape)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"latent": 0}, "Generator: latent: expected at least 1, got 0"),
        ({"width": 0}, "Generator: width: expected at least 1, got 0"),
        ({"classes": -1}, "Generator: classes: expected at least 0, got -1"),
        ({"codes": -2}, "Generator: codes: expected at least 0, got -2"),
    ],
)
def test_what_is_no_model(options, told):
    with pytest.raises(ValueError, match=told):
        GAN((1, 8, 8), **options)


Z, LABELS, CODES = torch.zeros(2, LATENT), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("options", "inputs", "told"),
    [
        ({}, (Z[:, 1:],), "z: expected shape (2, 6), got (2, 5)"),
        (
            {"classes": 4},
            (Z,),
            "labels: expected int64 of shape (2,), as the model has 4 classes, got none",
        ),
        ({}, (Z, LABELS), "labels: expected none, as the model has no classes, got a tensor"),
        (
            {"classes": 4},
            (Z, LABELS[:1]),
            "labels: expected int64 of shape (2,), got torch.int64 of shape (1,)",
        ),
        (
            {"classes": 4},
            (Z, LABELS.int()),
            "labels: expected int64 of shape (2,), got torch.int32 of shape (2,)",
        ),
        (
            {"codes": 3},
            (Z,),
            "codes: expected shape (2, 3), as the model has 3 codes, got none",
        ),
        ({"codes": 3}, (Z, None, CODES[:, 1:]), "codes: expected shape (2, 3), got (2, 2)"),
        ({}, (Z, None, CODES), "codes: expected none, as the model has no codes, got a tensor"),
    ],
)
def test_what_a_generator_does_not_take(options, inputs, told):
    generator = Generator((1, 8, 8), LATENT, WIDTH, **options)
    with pytest.raises(ValueError, match=re.escape(f"Generator: {told}")):
        generator(*inputs)


IMAGES = torch.zeros(2, 1, 8, 8)


@pytest.mark.parametrize("method", ["forward", "with_codes"])
@pytest.mark.parametrize(
    ("classes", "inputs", "told"),
    [
        (0, (IMAGES[..., 1:],), "images: expected shape (2, 1, 8, 8), got (2, 1, 8, 7)"),
        (
            4,
            (IMAGES,),
            "labels: expected int64 of shape (2,), as the model has 4 classes, got none",
        ),
        (0, (IMAGES, LABELS), "labels: expected none, as the model has no classes, got a tensor"),
        (
            4,
            (IMAGES, LABELS.float()),
            "labels: expected int64 of shape (2,), got torch.float32 of shape (2,)",
        ),
    ],
)
def test_what_a_discriminator_does_not_take(method, classes, inputs, told):
    discriminator = Discriminator((1, 8, 8), WIDTH, classes=classes, codes=1)
    with pytest.raises(ValueError, match=re.escape(f"Discriminator: {told}")):
        getattr(discriminator, method)(*inputs)


def test_codes_of_a_model_without():
    told = "Discriminator: with_codes: expected a model with codes, got codes=0"
    with pytest.raises(ValueError, match=told):
        make().discriminator.with_codes(IMAGES)
