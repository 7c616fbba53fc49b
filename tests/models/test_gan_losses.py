import re

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import sqloss
from sqloss.models.gan import Discriminator
from sqloss.models.gan_losses import (
    GAN_LOSSES,
    code_losses,
    fake_losses,
    generator_losses,
    gradient_penalty,
    real_losses,
)
from sqloss.training.risks import CVaR

LOSSES = {"real": real_losses, "fake": fake_losses, "generator": generator_losses}


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


# As the papers write them, with D = sigmoid(x)
FORMULAS = {
    "nonsaturating": {
        "real": lambda x: -sigmoid(x).log(),
        "fake": lambda x: -(1 - sigmoid(x)).log(),
        "generator": lambda x: -sigmoid(x).log(),
    },
    "saturating": {
        "real": lambda x: -sigmoid(x).log(),
        "fake": lambda x: -(1 - sigmoid(x)).log(),
        "generator": lambda x: (1 - sigmoid(x)).log(),
    },
    "lsgan": {
        "real": lambda x: (x - 1) ** 2,
        "fake": lambda x: x**2,
        "generator": lambda x: (x - 1) ** 2,
    },
    "hinge": {
        "real": lambda x: (1 - x).clamp(min=0),
        "fake": lambda x: (1 + x).clamp(min=0),
        "generator": lambda x: -x,
    },
    "wgan-gp": {
        "real": lambda x: -x,
        "fake": lambda x: x,
        "generator": lambda x: -x,
    },
}
CASES = [
    pytest.param(kind, of, formula, id=f"{kind}, {of}")
    for kind, formulas in FORMULAS.items()
    for of, formula in formulas.items()
]


def test_every_kind_has_its_formulas():
    assert tuple(FORMULAS) == GAN_LOSSES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "of", "formula"), CASES)
def test_losses_and_gradients_are_those_of_the_formula(kind, of, formula, dtype):
    logits = (3 * torch.randn(50, dtype=dtype)).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    losses, expected = LOSSES[of](kind, logits), formula(exact)
    assert losses.shape == (50,) and losses.dtype == dtype
    torch.testing.assert_close(losses, expected.to(dtype))
    of_samples = torch.randn(50, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(losses, logits, of_samples.to(dtype))
    (wanted,) = torch.autograd.grad(expected, exact, of_samples)
    torch.testing.assert_close(gradient, wanted.to(dtype))


@pytest.mark.parametrize("alpha", [0.0, 0.75])
@pytest.mark.parametrize(("kind", "of", "formula"), CASES)
def test_the_risk_of_losses(kind, of, formula, alpha):
    """Value and gradient, against the sorted losses of the formula: 0.25 * 32 is whole"""
    logits = torch.randn(32, dtype=torch.float64, requires_grad=True)
    value = CVaR(alpha)(LOSSES[of](kind, logits))
    expected = formula(logits).sort(descending=True).values[: round((1 - alpha) * 32)].mean()
    torch.testing.assert_close(value, expected)
    gradients = [torch.autograd.grad(each, logits)[0] for each in (value, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("kind", "of", "formula"), CASES)
def test_extreme_logits_stay_finite(kind, of, formula):
    logits = torch.tensor([-1e4, -100.0, 100.0, 1e4], requires_grad=True)
    losses = LOSSES[of](kind, logits)
    losses.sum().backward()
    assert losses.isfinite().all() and logits.grad.isfinite().all()


@pytest.mark.parametrize("probability", [0.5, 1e-3, 1e-6, 1e-12])
def test_the_saturating_gradient_vanishes_and_the_other_does_not(probability):
    """Where D is sure of a fake: d/dx log(1 - D) = -D, and d/dx -log D = -(1 - D)"""
    p = torch.tensor([probability], dtype=torch.float64)
    logits = p.logit().requires_grad_()
    for kind, expected in (("saturating", -p), ("nonsaturating", p - 1)):
        (gradient,) = torch.autograd.grad(generator_losses(kind, logits).sum(), logits)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("function", LOSSES.values())
def test_another_kind(function):
    told = f"{function.__name__}: kind: expected one of {GAN_LOSSES}, got 'vanilla'"
    with pytest.raises(ValueError, match=re.escape(told)):
        function("vanilla", torch.zeros(2))


# the gradient penalty


def between(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Real and fake images and the mix of them."""
    real, fake = torch.randn(2, *shape, dtype=torch.float64)
    return real, fake, torch.rand(shape[0], dtype=torch.float64)


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0, 3.0])
def test_the_penalty_of_a_linear_critic(slope):
    """Zero for the 1-Lipschitz one"""
    direction = torch.randn(36, dtype=torch.float64)
    direction *= slope / direction.norm()
    penalty = gradient_penalty(lambda x: x.flatten(1) @ direction, *between(5, 1, 6, 6))
    expected = torch.full((5,), (slope - 1) ** 2, dtype=torch.float64)
    torch.testing.assert_close(penalty, expected, rtol=1e-12, atol=1e-24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_slope_is_taken_between_the_images(dtype):
    """That of |x|^2 / 2 is x"""
    real, fake, mix = (tensor.to(dtype) for tensor in between(4, 2, 3, 3))
    penalty = gradient_penalty(lambda x: x.square().sum((1, 2, 3)) / 2, real, fake, mix)
    points = [m * r + (1 - m) * f for m, r, f in zip(mix, real, fake, strict=True)]
    expected = torch.stack([(point.norm() - 1) ** 2 for point in points])
    torch.testing.assert_close(penalty, expected)
    assert penalty.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_finite_where_the_slope_is_zero(dtype):
    weight = torch.ones((), dtype=dtype, requires_grad=True)
    zeros = torch.zeros(3, 1, 2, 2, dtype=dtype)
    penalty = gradient_penalty(
        lambda x: weight * x.square().sum((1, 2, 3)), zeros, zeros, torch.rand(3, dtype=dtype)
    )
    assert torch.equal(penalty.detach(), torch.ones(3, dtype=dtype))
    penalty.sum().backward()
    assert weight.grad == 0


def test_the_images_get_no_gradient():
    real, fake, mix = between(3, 1, 2, 2)
    for images in (real, fake):
        images.requires_grad_()
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    gradient_penalty(lambda x: weight * x.pow(3).sum((1, 2, 3)), real, fake, mix).sum().backward()
    assert real.grad is None and fake.grad is None and weight.grad is not None


def test_derivatives_of_the_penalised_objective():
    real, fake, mix = between(3, 1, 2, 2)

    def objective(first: Tensor, second: Tensor) -> Tensor:
        def critic(x: Tensor) -> Tensor:
            return torch.tanh(x.flatten(1) @ first) @ second

        losses = real_losses("wgan-gp", critic(real)) + fake_losses("wgan-gp", critic(fake))
        return (losses + 10 * gradient_penalty(critic, real, fake, mix)).mean()

    weights = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 5), (5,))]
    assert gradcheck(objective, weights)
    assert gradgradcheck(objective, weights)


@pytest.fixture
def discriminator() -> Discriminator:
    return Discriminator((1, 9, 12), width=4, batch_norm=False).double()


def gradients(value: Tensor, network: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(network.parameters()), materialize_grads=True))


def tail_mean(losses: Tensor, alpha: float) -> Tensor:
    """In plain torch, where (1 - alpha) n is whole."""
    return losses.topk(round((1 - alpha) * len(losses))).values.mean()


@pytest.mark.parametrize("kind", ["nonsaturating", "lsgan", "hinge"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_tail_of_the_penalty_of_fused_losses(discriminator, kind, alpha):
    """Double backward through the fused losses, and one through cvar, against plain torch"""
    images = between(8, 1, 9, 12)
    penalty = gradient_penalty(lambda x: real_losses(kind, 5 * discriminator(x)), *images)
    twin = gradient_penalty(lambda x: FORMULAS[kind]["real"](5 * discriminator(x)), *images)
    torch.testing.assert_close(penalty, twin)
    found, expected = CVaR(alpha)(penalty), tail_mean(twin, alpha)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, discriminator), gradients(expected, discriminator))


def fused(logits: Tensor) -> Tensor:
    return sqloss.cvar_binary_cross_entropy_with_logits(logits, torch.ones_like(logits), alpha=0.5)


@pytest.mark.parametrize(
    "tail",
    [lambda logits: sqloss.cvar(real_losses("nonsaturating", logits), 0.5), fused],
    ids=["cvar of losses", "cvar and losses in one"],
)
def test_the_penalty_of_the_slope_of_a_tail(discriminator, tail):
    """Double backward through cvar: only the worst images have a slope"""
    images, _, _ = between(8, 1, 9, 12)
    penalties = []
    for risk_of in (tail, lambda x: tail_mean(FORMULAS["nonsaturating"]["real"](x), 0.5)):
        x = images.clone().requires_grad_()
        (slopes,) = torch.autograd.grad(risk_of(5 * discriminator(x)), x, create_graph=True)
        penalties.append(slopes.flatten(1).square().sum(1))
    assert (penalties[0] == 0).sum() == 4
    torch.testing.assert_close(*penalties)
    found, expected = (gradients(penalty.sum(), discriminator) for penalty in penalties)
    torch.testing.assert_close(found, expected)
    assert any(gradient.any() for gradient in found)


def test_the_penalty_shapes_a_critic():
    """Its slopes between the images come to 1, whatever they were"""
    critic = Discriminator((1, 8, 8), width=4, batch_norm=False)
    real, fake = torch.randn(2, 16, 1, 8, 8)
    optimiser = torch.optim.Adam(critic.parameters(), lr=0.01)
    penalties = []
    for _ in range(40):
        penalty = gradient_penalty(critic, real, fake, torch.rand(16)).mean()
        penalties.append(penalty.item())
        optimiser.zero_grad()
        penalty.backward()
        optimiser.step()
    assert penalties[-1] < penalties[0] / 10


@pytest.mark.parametrize(
    ("fake", "mix", "logits", "told"),
    [
        ((4, 1, 2, 3), 4, 4, "fake: expected the shape of real, (4, 1, 2, 2), got (4, 1, 2, 3)"),
        ((4, 1, 2, 2), 3, 4, "mix: expected shape (4,), got (3,)"),
        ((4, 1, 2, 2), 4, 1, "critic: expected logits of shape (4,), got (1,)"),
    ],
)
def test_what_is_no_penalty(fake, mix, logits, told):
    with pytest.raises(ValueError, match=re.escape(f"gradient_penalty: {told}")):
        gradient_penalty(
            lambda x: x.flatten()[:logits],
            torch.zeros(4, 1, 2, 2),
            torch.zeros(fake),
            torch.zeros(mix),
        )


# codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_code_losses_are_log_likelihoods(dtype):
    loc, codes = torch.randn(2, 5, 3, dtype=dtype)
    var = torch.rand(5, 3, dtype=dtype) + 0.1
    tensors = [tensor.requires_grad_() for tensor in (loc, var, codes)]
    losses = code_losses(*tensors)
    normal = torch.distributions.Normal(loc, var.sqrt())
    expected = -normal.log_prob(codes).sum(1)
    assert losses.shape == (5,) and losses.dtype == dtype
    torch.testing.assert_close(losses, expected)
    found, wanted = (torch.autograd.grad(each.sum(), tensors) for each in (losses, expected))
    torch.testing.assert_close(found, wanted)
