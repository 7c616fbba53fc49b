import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, StudentT, kl_divergence

import sqloss
from sqloss.models import VAE
from sqloss.models.numpy_vae import (
    backward,
    forward,
    objective,
    sgd_step,
    standard_draws,
    superquantile,
    train_step,
)
from sqloss.training.risks import CVaR
from sqloss.training.vae.objective import TAIL_TERMS, vae_objective

BATCH, LATENT, SHAPE = 13, 5, (1, 7, 4)
DFS = [None, 0.5, 5.0, 1e4]
OBJECTIVES = [(0.0, "elbo", 1.0), (0.8, "elbo", 0.5), (0.7, "reconstruction", 2.0)]


@pytest.fixture(params=[(16,), (9, 7)], ids=str)
def vae(request) -> VAE:
    torch.manual_seed(0)
    return VAE(SHAPE, request.param, LATENT).double()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(BATCH, *SHAPE, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture
def uniform() -> tuple[torch.Tensor, torch.Tensor]:
    u, v = torch.rand(2, BATCH, LATENT, generator=torch.Generator().manual_seed(2)).double()
    return 1 - u, v


def parameters(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def flat(x: torch.Tensor) -> np.ndarray:
    return x.flatten(1).numpy()


def torch_losses(vae, x, uniform, df):
    """By autograd, torch's own loss and torch.distributions."""
    u, v = uniform
    e, cosine = -2 * u.log(), (2 * math.pi * v).cos()
    t = (e if df is None else df * torch.expm1(e / df)).sqrt() * cosine
    loc, logvar = vae.encoder(x).chunk(2, dim=1)
    scale = logvar.exp().sqrt()
    z = loc + scale * t
    if df is None:
        kl = kl_divergence(Normal(loc, scale), Normal(0.0, 1.0))
    else:
        df = torch.tensor(df, dtype=torch.float64)
        kl = StudentT(df, loc, scale).log_prob(z) - StudentT(df).log_prob(z)
    logits = vae.decoder(z).flatten(1)
    reconstruction = F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="none")
    return {"reconstruction": reconstruction.sum(1), "kl": kl.sum(1)}


def numpy_step(parameters, x, uniform, df, of):
    """The losses, the objective and the gradients of the parameters."""
    t = standard_draws(*(array.numpy() for array in uniform), df)
    passed = forward(parameters, flat(x), t, df)
    value, gradients = objective(passed.losses, *of)
    return passed.losses, value, backward(parameters, passed, gradients, df)


def assert_close(ours, expected, tolerance):
    """In units of the largest value of the array."""
    expected = torch.as_tensor(expected).numpy(force=True)
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("df", DFS)
@pytest.mark.parametrize("of", OBJECTIVES)
def test_losses_and_gradients_are_those_of_autograd(vae, x, uniform, df, of):
    expected = torch_losses(vae, x, uniform, df)
    loss = vae_objective(CVaR(of[0]), *of[1:], iwae_samples=0)(expected)
    loss.backward()
    losses, value, gradients = numpy_step(parameters(vae), x, uniform, df, of)

    for name in ("reconstruction", "kl"):
        assert_close(losses[name], expected[name], 1e-10)
    assert value == pytest.approx(loss.item(), rel=1e-11)
    assert gradients.keys() == dict(vae.named_parameters()).keys()
    for name, parameter in vae.named_parameters():
        assert_close(gradients[name], parameter.grad, 1e-10)


@pytest.mark.parametrize("df", DFS)
@pytest.mark.parametrize("of", OBJECTIVES)
def test_gradients_are_numerical_differences(vae, x, uniform, df, of):
    values = parameters(vae)
    _, _, gradients = numpy_step(values, x, uniform, df, of)
    draws = np.random.default_rng(0)
    for name, gradient in gradients.items():  # along one random direction for each parameter
        step = 1e-6 * draws.standard_normal(gradient.shape)
        _, after, _ = numpy_step(values | {name: values[name] + step}, x, uniform, df, of)
        _, before, _ = numpy_step(values | {name: values[name] - step}, x, uniform, df, of)
        assert 2 * (gradient * step).sum() == pytest.approx(after - before, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("df", [None, 5.0])
def test_steps_are_those_of_torchs_sgd(vae, x, uniform, df):
    values = parameters(vae)
    sgd = torch.optim.SGD(vae.parameters(), lr=0.01)
    for step in range(5):
        noise = tuple(array.roll(step, 0) for array in uniform)
        sgd.zero_grad()
        vae_objective(CVaR(0.8), "elbo", 1.0, 0)(torch_losses(vae, x, noise, df)).backward()
        sgd.step()
        sgd_step(values, numpy_step(values, x, noise, df, (0.8, "elbo", 1.0))[2], 0.01)
    for name, tensor in vae.state_dict().items():
        assert_close(values[name], tensor, 1e-10)


@pytest.mark.parametrize("df", [None, 5.0])
@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_training_lowers_the_loss_of_images_not_seen(df, alpha):
    images = pytest.importorskip("sklearn.datasets").load_digits().data.astype(np.float32) / 16
    torch.manual_seed(0)
    values = parameters(VAE((1, 8, 8), (32,), 4))

    def test_objective():
        return train_step(values, images[1500:], 0, lr=0.0, df=df, alpha=alpha)

    before = test_objective()
    values_before = [train_step(values, images[:100], 0, lr=0.0, df=df) for _ in range(2)]
    assert values_before[0] == values_before[1], "a function of the seed"
    for step in range(300):
        batch = images[step % 15 * 100 :][:100]
        train_step(values, batch, step, lr=0.02, df=df, alpha=alpha)
    assert test_objective() < 0.75 * before


@pytest.mark.parametrize("df", [None, 0.5, 5.0, 1e6])
def test_draws_have_their_distribution(df):
    rng = np.random.default_rng(0)
    draws = standard_draws(1 - rng.random(100_000), rng.random(100_000), df)
    expected = scipy.stats.norm() if df is None else scipy.stats.t(df)
    assert scipy.stats.kstest(draws, expected.cdf).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("df", [None, 5.0])
def test_everything_has_the_dtype_of_the_parameters(vae, x, uniform, df, dtype):
    values = {name: array.astype(dtype) for name, array in parameters(vae).items()}
    t = standard_draws(*(array.numpy() for array in uniform), df).astype(dtype)
    passed = forward(values, flat(x).astype(dtype), t, df)
    _, weights = objective(passed.losses, 0.8, "elbo", 1.0)
    gradients = backward(values, passed, weights, df)
    for array in [*passed.losses.values(), *weights.values(), *gradients.values()]:
        assert array.dtype == dtype


def test_extreme_logits_stay_finite(vae, x, uniform):
    values = parameters(vae)
    for bias in (-1e4, 1e4):
        values[list(values)[-1]] = np.full(28, bias)
        with np.errstate(all="raise", under="ignore"):
            losses, _, gradients = numpy_step(values, x, uniform, None, OBJECTIVES[0])
        for array in [*losses.values(), *gradients.values()]:
            assert np.isfinite(array).all()


@given(
    losses=st.lists(st.integers(0, 5), min_size=1, max_size=40),  # many ties
    alpha=st.integers(0, 99).map(lambda percent: percent / 100),
)
def test_the_superquantile_is_that_of_the_kernel(losses, alpha):
    value, weights = superquantile(np.array(losses, float), alpha)
    tensor = torch.tensor(losses, dtype=torch.float64)
    assert value == pytest.approx(sqloss.cvar(tensor, alpha).item(), rel=1e-12)
    np.testing.assert_allclose(weights, sqloss.tail_weights(tensor, alpha).numpy(), atol=1e-12)


def test_a_loss_that_is_not_a_number_reaches_the_value():
    with np.errstate(all="ignore"):
        for losses in ([1.0, np.nan, 3.0, 2.0], [np.nan] * 4):
            assert math.isnan(superquantile(np.array(losses), 0.5)[0])


@pytest.mark.parametrize("tail", TAIL_TERMS)
@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_objectives_are_those_of_the_torch_trainer(tail, alpha):
    draws = torch.Generator().manual_seed(0)
    losses = {
        name: torch.rand(9, generator=draws).double().requires_grad_()
        for name in ("reconstruction", "kl")
    }
    expected = vae_objective(CVaR(alpha), tail, 0.3, 0)(losses)
    expected.backward()
    arrays = {name: tensor.detach().numpy() for name, tensor in losses.items()}
    value, gradients = objective(arrays, alpha, tail, 0.3)
    assert value == pytest.approx(expected.item(), rel=1e-12)
    for name, tensor in losses.items():
        np.testing.assert_allclose(gradients[name], tensor.grad.numpy(), rtol=1e-12)
