import io
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from sqloss.models import VAE
from sqloss.models.mixture import Mixture
from sqloss.student_t import draw_seed

M, D = 4, 3
F64 = torch.float64


def make(df: float = math.inf, power: float = 0.0, d: int = D) -> Mixture:
    draws = torch.Generator().manual_seed(0)
    factors = 0.4 * torch.randn(M, d, d, dtype=F64, generator=draws)
    squares = factors @ factors.mT + 0.1 * torch.eye(d, dtype=F64)
    loc = 2 * torch.randn(M, d, dtype=F64, generator=draws)
    sizes = torch.tensor([100.0, 50.0, 20.0, 1.0])
    return Mixture(sizes, loc, torch.linalg.cholesky(squares), df, power=power)


def seed(number: int = 1) -> torch.Tensor:
    return draw_seed(generator=torch.Generator().manual_seed(number))


def density_of_t(mixture: Mixture, z: torch.Tensor) -> torch.Tensor:
    """The mixture of multivariate t distributions by scipy."""
    multivariate_t = pytest.importorskip("scipy.stats").multivariate_t
    total = torch.zeros(len(z), dtype=F64)
    for weight, loc, scale in zip(mixture.weights, mixture.loc, mixture.scale_tril, strict=True):
        shape = (scale @ scale.T).numpy()
        total += weight * torch.as_tensor(
            multivariate_t.pdf(z.numpy(), loc.numpy(), shape, df=mixture.df.item())
        )
    return total


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 40.0])
def test_the_density_is_that_of_torch_distributions(power):
    mixture = make(power=power)
    z = 3 * torch.randn(5, 7, D, dtype=F64, generator=torch.Generator().manual_seed(2))
    reference = MixtureSameFamily(
        Categorical(logits=(1 - power) * mixture.sizes.log()),
        MultivariateNormal(mixture.loc, scale_tril=mixture.scale_tril),
    )
    torch.testing.assert_close(mixture.log_prob(z), reference.log_prob(z), rtol=1e-12, atol=1e-11)
    low = mixture.log_prob(z.float())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), reference.log_prob(z), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("df", [0.7, 3.0, 30.0])
def test_the_density_of_t_components(df):
    mixture = make(df, power=0.5)
    z = 3 * torch.randn(30, D, dtype=F64, generator=torch.Generator().manual_seed(2))
    expected = density_of_t(mixture, z)
    torch.testing.assert_close(mixture.log_prob(z).exp(), expected, rtol=1e-9, atol=0)


def test_t_components_tend_to_normal_ones():
    z = torch.randn(30, D, dtype=F64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(make(1e9).log_prob(z), make().log_prob(z), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("df", [math.inf, 4.0])
def test_the_density_integrates_to_one(df):
    """The mean of p / q over draws of a wider q is the integral of p."""
    mixture = make(df)
    wide = torch.distributions.StudentT(torch.tensor(2.0, dtype=F64), 0, 4)
    torch.manual_seed(3)
    z = wide.sample((200_000, D))
    ratios = (mixture.log_prob(z) - wide.log_prob(z).sum(1)).exp()
    assert ratios.mean().item() == pytest.approx(1, abs=5 * ratios.std().item() / 200_000**0.5)


@pytest.mark.parametrize("df", [math.inf, 8.0])
@pytest.mark.parametrize(("power", "temperature"), [(0.0, 1.0), (1.0, 1.0), (1.5, 0.5)])
def test_draws_have_the_moments_of_the_mixture(df, power, temperature):
    mixture, count = make(df, power), 200_000
    z = mixture.sample(count, seed(), temperature)
    weights = mixture.weights
    variance = 1 if math.isinf(df) else df / (df - 2)
    within = temperature**2 * variance * mixture.scale_tril @ mixture.scale_tril.mT
    mean = weights @ mixture.loc
    apart = mixture.loc - mean
    covariance = (weights[:, None, None] * (within + apart[:, :, None] * apart[:, None])).sum(0)
    torch.testing.assert_close(z.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(z.T.cov(), covariance, rtol=0, atol=0.06)


def test_components_are_as_frequent_as_they_weigh():
    mixture, count = make(power=0.5), 100_000
    seen = torch.bincount(mixture.components(count, seed()), minlength=M) / count
    torch.testing.assert_close(seen.double(), mixture.weights, rtol=0, atol=0.006)


@pytest.mark.parametrize("df", [math.inf, 4.0])
def test_draws_depend_on_their_arguments_alone(df):
    mixture = make(df)
    first = mixture.sample(50, seed())
    torch.rand(3)
    assert torch.equal(mixture.sample(50, seed()), first)
    assert not torch.equal(mixture.sample(50, seed(2)), first)
    components = mixture.components(50, seed())
    assert torch.equal(mixture.draws(components, seed()), first)
    torch.testing.assert_close(
        mixture.draws(components, seed(), 0.0), mixture.loc[components], rtol=0, atol=0
    )
    # Half of the deviation from the component's location, and of the same noise
    half = mixture.sample(50, seed(), 0.5) - mixture.loc[components]
    torch.testing.assert_close(2 * half, first - mixture.loc[components])


SIZES = st.lists(st.floats(0.5, 1e6), min_size=1, max_size=12)


@given(SIZES, st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_laws_of_the_power(sizes, power):
    sizes, loc = torch.tensor(sizes, dtype=F64), torch.zeros(len(sizes), 1)
    mixture = Mixture(sizes, loc, torch.ones(len(sizes), 1, 1), power=power)
    weights = mixture.weights
    assert weights.sum().item() == pytest.approx(1)
    powered = sizes ** (1 - power)
    torch.testing.assert_close(weights, powered / powered.sum(), rtol=1e-9, atol=0)
    # 0 gives the shares of the data, 1 the same to all, and above 1 the smallest weighs most
    torch.testing.assert_close(mixture.with_power(0).weights, sizes / sizes.sum())
    torch.testing.assert_close(
        mixture.with_power(1).weights, torch.full_like(sizes, 1 / len(sizes))
    )
    if power > 1:
        assert weights[sizes.argmin()] >= weights.max() * (1 - 1e-9)
    # (sum p)^2 / (n sum p^2) over all members, of which each has its part of its group's weight
    members = weights / sizes
    expected = 1 / (sizes.sum() * (sizes * members.square()).sum())
    assert mixture.effective_share == pytest.approx(expected.item())
    assert mixture.effective_share <= 1 + 1e-9
    assert mixture.with_power(0).effective_share == pytest.approx(1)


@pytest.mark.parametrize("df", [math.inf, 4.0])
def test_the_state_is_plain_and_makes_the_same_mixture(df):
    mixture, content = make(df), io.BytesIO()
    torch.save(mixture.state_dict(), content)
    content.seek(0)
    again = Mixture(**torch.load(content, weights_only=True))
    z = torch.randn(4, D)
    assert torch.equal(again.log_prob(z), mixture.log_prob(z))
    assert torch.equal(again.sample(9, seed()), mixture.sample(9, seed()))
    assert again.power == 0 and len(again) == M


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sizes": torch.ones(3)}, "got sizes [3]"),
        ({"loc": torch.ones(M)}, "got loc [4]"),
        ({"loc": torch.ones(M, 2)}, "got scale_tril [4, 3, 3]"),
        ({"loc": torch.ones(0, D), "sizes": torch.ones(0), "scale_tril": torch.ones(0, D, D)},
         "one component or more"),
        ({"sizes": torch.tensor([1.0, 2.0, 0.0, 1.0])}, "sizes: expected finite numbers above 0"),
        ({"sizes": torch.full((M,), math.inf)}, "sizes: expected finite numbers above 0"),
        ({"loc": torch.full((M, D), math.nan)}, "loc: expected finite numbers, got"),
        ({"scale_tril": torch.zeros(M, D, D)}, "scale_tril: expected finite numbers, above 0"),
        ({"df": 0.0}, "df: expected a number above 0, got 0.0"),
        ({"df": torch.ones(2)}, "df: expected a number above 0, got [1.0, 1.0]"),
        ({"power": math.nan}, "power: expected a finite number, got nan"),
    ],
)  # fmt: skip
def test_what_is_no_mixture(changes, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        Mixture(**{**make().state_dict(), **changes})


# as the prior of a VAE

FAMILIES = {"normal": {}, "t": {"prior": "t", "df": 4.0}}


@pytest.fixture(params=FAMILIES)
def vae(request) -> VAE:
    torch.manual_seed(0)
    return VAE((1, 4, 3), hidden=(8,), latent=D, **FAMILIES[request.param])


class Own:
    """The model's own prior, as torch.distributions has it."""

    def __init__(self, model: VAE) -> None:
        zeros, ones = torch.zeros(D, dtype=F64), torch.ones(D, dtype=F64)
        self.p = (
            torch.distributions.Normal(zeros, ones)
            if model.prior == "normal"
            else torch.distributions.StudentT(model.df, zeros, ones)
        )

    def log_prob(self, z):
        return self.p.log_prob(z.double()).sum(-1)


def test_samples_without_a_prior_are_what_they_were(vae):
    zeros = torch.zeros(6, D)
    expected = vae.decode(vae.distribution(zeros, zeros).rsample(seed())).sigmoid()
    assert torch.equal(vae.sample(6, seed()), expected)
    cold = vae.decode(0.5 * vae.distribution(zeros, zeros).rsample(seed())).sigmoid()
    assert torch.equal(vae.sample(6, seed(), temperature=0.5), cold)


def test_samples_of_a_prior(vae):
    mixture = make(power=1.5)
    z = mixture.sample(6, seed(), 0.7).float()
    found = vae.sample(6, seed(), prior=mixture, temperature=0.7)
    assert torch.equal(found, vae.decode(z).sigmoid())


def test_losses_and_weights_under_the_models_own_prior_are_the_models(vae):
    x = torch.rand(5, 1, 4, 3, generator=torch.Generator().manual_seed(4), dtype=F64)
    vae = vae.double()
    own = Own(vae)
    weights = vae.log_weights(x, seed(), 7)
    torch.testing.assert_close(vae.log_weights(x, seed(), 7, prior=own), weights)
    losses = vae.losses(x, seed(), prior=own)
    posterior = vae.encode(x)
    z = posterior.rsample(seed())
    torch.testing.assert_close(losses["kl"], posterior.log_prob(z) - own.log_prob(z))
    assert torch.equal(losses["reconstruction"], vae.losses(x, seed())["reconstruction"])
    if vae.prior == "t":
        torch.testing.assert_close(losses["kl"], vae.losses(x, seed())["kl"])


def test_weights_under_a_mixture(vae):
    x = torch.rand(5, 1, 4, 3, generator=torch.Generator().manual_seed(4), dtype=F64)
    vae, mixture = vae.double(), make(3.0)
    z = vae.encode(x).rsample(seed(), 7)
    changed = vae.log_weights(x, seed(), 7, prior=mixture) - vae.log_weights(x, seed(), 7)
    torch.testing.assert_close(changed, mixture.log_prob(z) - Own(vae).log_prob(z))
