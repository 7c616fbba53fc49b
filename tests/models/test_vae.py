import math
import re

import pytest
import torch
from torch.distributions import Normal, StudentT, kl_divergence

from sqloss.models import VAE
from sqloss.models import vae as module
from sqloss.models.vae import GREATEST_DF, LEAST_DF
from sqloss.student_t import draw_seed

BATCH, LATENT, SHAPE = 6, 5, (1, 7, 4)
FAMILIES = {
    "normal": {"prior": "normal"},
    "t": {"prior": "t", "df": 4.0},
    "learnt df": {"prior": "t", "df": 4.0, "learn_df": True},
}


def make(**options) -> VAE:
    torch.manual_seed(0)
    return VAE(SHAPE, hidden=(16,), latent=LATENT, **options)


@pytest.fixture(params=FAMILIES)
def vae(request) -> VAE:
    return make(**FAMILIES[request.param])


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(BATCH, *SHAPE, generator=torch.Generator().manual_seed(1))


def seed(number: int = 2) -> torch.Tensor:
    return draw_seed(generator=torch.Generator().manual_seed(number))


def in_torch(posterior) -> tuple[torch.distributions.Distribution, ...]:
    """Posterior and prior as those of torch.distributions."""
    loc, scale = posterior.loc, (0.5 * posterior.logvar).exp()
    zeros, ones = torch.zeros_like(loc), torch.ones_like(loc)
    if isinstance(posterior, module.Normal):
        return Normal(loc, scale), Normal(zeros, ones)
    return StudentT(posterior.df, loc, scale), StudentT(posterior.df, zeros, ones)


def test_the_classic_sizes():
    sizes = [tuple(p.shape) for p in VAE((1, 28, 28)).parameters() if p.ndim == 2]
    assert sizes == [(400, 784), (40, 400), (400, 20), (784, 400)]


def test_the_decoder_mirrors_the_encoder():
    model = VAE((1, 28, 28), hidden=(512, 256), latent=10)
    sizes = [tuple(p.shape) for p in model.parameters() if p.ndim == 2]
    encoder = [(512, 784), (256, 512), (20, 256)]
    assert sizes == [*encoder, (256, 10), (512, 256), (784, 512)]


@pytest.mark.parametrize("channels", [(4,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 8, 8), (3, 7, 10), (1, 28, 28), (3, 32, 32), (3, 33, 31), (1, 64, 64)]
)
def test_convolutions_fit_images_of_any_size(shape, channels):
    model = VAE(shape, (6,), latent=2, architecture="conv", channels=channels)
    x = torch.rand(2, *shape)
    assert model.encode(x).loc.shape == (2, 2)
    assert model.reconstruct(x).shape == x.shape
    assert model.decode(torch.zeros(3, 4, 2)).shape == (3, 4, *shape)
    sum(loss.sum() for loss in model.losses(x, seed()).values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    depths = [m.out_channels for m in model.encoder if isinstance(m, torch.nn.Conv2d)]
    assert depths == list(channels)


def test_the_losses_of_a_convolutional_model_are_per_sample():
    model = VAE((1, 9, 8), (6,), latent=2, architecture="conv", channels=(3, 5))
    x, rows = torch.rand(BATCH, 1, 9, 8), torch.arange(BATCH)
    together = model.losses(x, seed())
    alone = model.losses(x[2:3], seed(), rows=rows[2:3])
    for name in together:
        torch.testing.assert_close(together[name][2:3], alone[name])


def test_the_closed_form_is_that_of_torch_distributions(x):
    model = make().double()
    expected = kl_divergence(*in_torch(model.encode(x.double()))).sum(1)
    torch.testing.assert_close(model.losses(x.double(), seed())["kl"], expected)


def test_the_kl_of_a_t_is_of_the_same_draw():
    model = make(prior="t", df=3.0).double()
    posterior = model.encode(torch.rand(BATCH, *SHAPE, dtype=torch.float64))
    z, kl = posterior.rsample_kl(seed())
    q, p = in_torch(posterior)
    torch.testing.assert_close(kl, (q.log_prob(z) - p.log_prob(z)).sum(1))


def test_draws_have_the_posteriors_median_and_quartiles(vae):
    loc, logvar = torch.full((4000, 3), 2.0), torch.full((4000, 3), math.log(9.0))
    draws = vae.distribution(loc, logvar).rsample(seed()).flatten().detach()
    # of the t with 4 degrees of freedom, and of the normal
    quartile = 3 * (0.674490 if vae.prior == "normal" else 0.740697)
    found = draws.quantile(torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(
        found, torch.tensor([2 - quartile, 2, 2 + quartile]), atol=0.12, rtol=0
    )


def test_draws_with_and_without_the_kl_are_the_same(vae, x):
    posterior = vae.encode(x)
    torch.testing.assert_close(posterior.rsample(seed()), posterior.rsample_kl(seed())[0])
    draws = posterior.rsample(seed(), 3)
    assert draws.shape == (3, BATCH, LATENT)
    torch.testing.assert_close(draws, posterior.rsample_kl(seed(), 3)[0])


def test_reconstruction_is_the_cross_entropy_summed_over_pixels(vae, x):
    losses = vae.losses(x, seed())
    p = vae.decode(vae.encode(x).rsample(seed())).double().sigmoid().flatten(1)
    flat = x.double().flatten(1)
    expected = -(flat * p.log() + (1 - flat) * (1 - p).log()).sum(1)
    torch.testing.assert_close(losses["reconstruction"].double(), expected, rtol=1e-5, atol=1e-5)


def test_losses_are_per_sample(vae, x):
    together = vae.losses(x, seed())
    rows = torch.arange(BATCH)
    for name in ("reconstruction", "kl"):
        assert together[name].shape == (BATCH,)
        alone = torch.cat(
            [vae.losses(x[i : i + 1], seed(), rows=rows[i : i + 1])[name] for i in rows]
        )
        torch.testing.assert_close(together[name], alone)


def test_losses_depend_on_the_callers_seed_only(vae, x):
    first, second = vae.losses(x, seed()), vae.losses(x, seed())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["reconstruction"], vae.losses(x, seed(3))["reconstruction"])


def test_extreme_logits_stay_finite(vae, x):
    with torch.no_grad():
        vae.decoder[-1].bias.fill_(1e4)
    assert vae.losses(x, seed())["reconstruction"].isfinite().all()


@pytest.mark.parametrize("iwae_samples", [0, 1, 4])
def test_every_parameter_gets_a_gradient(vae, x, iwae_samples):
    if iwae_samples:
        vae.negative_iw_bound(x, seed(), iwae_samples).sum().backward()
    else:
        sum(loss.sum() for loss in vae.losses(x, seed()).values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in vae.parameters())


def test_generated_images_are_pixel_means(vae, x):
    for images in (vae.sample(BATCH, seed()), vae.reconstruct(x)):
        assert images.shape == x.shape
        assert images.min() >= 0
        assert images.max() <= 1
    torch.testing.assert_close(vae.reconstruct(x), vae.decode(vae.encode(x).loc).sigmoid())
    assert torch.equal(vae.sample(BATCH, seed()), vae.sample(BATCH, seed()))
    zeros = torch.zeros(BATCH, LATENT)
    prior = vae.distribution(zeros, zeros)
    torch.testing.assert_close(
        vae.sample(BATCH, seed()), vae.decode(prior.rsample(seed())).sigmoid()
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prior": "cauchy"}, "VAE: prior: expected one of ('normal', 't'), got 'cauchy'"),
        ({"architecture": "x"}, "VAE: architecture: expected one of ('mlp', 'conv'), got 'x'"),
        (
            {"prior": "t", "df": 1, "learn_df": True},
            "VAE: df: expected a number between 1 and 1e+06 with learn_df, got 1",
        ),
    ],
)
def test_what_is_no_model(options, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        make(**options)


# importance weights


def test_log_weights_are_those_of_torch_distributions(vae, x):
    vae, x = vae.double(), x.double()
    weights = vae.log_weights(x, seed(), 7)
    posterior = vae.encode(x)
    z = posterior.rsample(seed(), 7)
    q, p = in_torch(posterior)
    decoder = torch.distributions.ContinuousBernoulli(logits=vae.decode(z))
    likelihood = decoder.log_prob(x) - decoder._cont_bern_log_norm()
    expected = likelihood.flatten(2).sum(2) + (p.log_prob(z) - q.log_prob(z)).sum(2)
    assert weights.shape == (7, BATCH)
    torch.testing.assert_close(weights, expected)


def test_the_bound_of_one_draw_is_the_elbo_with_a_sampled_kl(vae, x):
    posterior = vae.encode(x)
    _, kl = posterior.rsample_kl(seed(), estimator="mc")
    expected = vae.losses(x, seed())["reconstruction"] + kl
    torch.testing.assert_close(vae.negative_iw_bound(x, seed(), 1), expected)


def test_the_bound_is_minus_the_log_of_the_mean_weight(vae, x):
    vae, x = vae.double(), x.double()
    expected = -vae.log_weights(x, seed(), 5).exp().mean(0).log()
    torch.testing.assert_close(vae.negative_iw_bound(x, seed(), 5), expected)


def test_the_first_weights_of_many_are_those_of_few(vae, x):
    torch.testing.assert_close(vae.log_weights(x, seed(), 9)[:4], vae.log_weights(x, seed(), 4))


def test_the_bound_rises_with_the_number_of_draws(vae, x):
    weights = vae.log_weights(x, seed(), 2**14).double().detach()
    bounds = []
    for draws in (1, 4, 64, 1024):
        groups = weights.unflatten(0, (-1, draws))
        bounds.append((groups.logsumexp(1) - math.log(draws)).mean())
    assert bounds == sorted(bounds)
    assert bounds[-1] > bounds[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bound_tends_to_the_likelihood(family):
    torch.manual_seed(3)
    model = VAE(SHAPE, hidden=(16,), latent=1, **FAMILIES[family]).double()
    x = torch.rand(BATCH, *SHAPE, dtype=torch.float64).round()
    with torch.no_grad():
        model.decoder[0].weight.mul_(4)  # else z would hardly matter
        # log p(x) by the trapezoid rule over z = tan(angle), which has all of the tails
        angle = torch.linspace(-math.pi / 2, math.pi / 2, 20_003, dtype=torch.float64)[1:-1]
        z = angle.tan()[:, None]
        _, prior = in_torch(model.distribution(torch.zeros_like(z), torch.zeros_like(z)))
        logits = model.decode(z).flatten(1)
        likelihood = x.flatten(1) @ logits.T - torch.nn.functional.softplus(logits).sum(1)
        log_density = likelihood + prior.log_prob(z)[:, 0] + torch.log1p(z[:, 0].square())
        log_evidence = (log_density + (angle[1] - angle[0]).log()).logsumexp(1)

        bound = model.negative_iw_bound(x, seed(), 20_000)
        losses = [sum(model.losses(x, seed(i)).values()) for i in range(200)]
    torch.testing.assert_close(-bound, log_evidence, atol=0.02, rtol=0)
    assert (torch.stack(losses).mean(0) > -log_evidence).all(), "the ELBO is below"


# a learnt df


@pytest.mark.parametrize("df", [1.01, 2.0, 5.0, 100.0, 9e5])
def test_a_learnt_df_starts_where_it_is_told(df):
    assert make(prior="t", df=df, learn_df=True).df.item() == pytest.approx(df, rel=1e-4)


@pytest.mark.parametrize("free", [-1e9, -100.0, 0.0, 100.0, 1e9])
def test_a_learnt_df_never_leaves_its_range(free, x):
    model = make(prior="t", learn_df=True)
    with torch.no_grad():
        model.free_df.fill_(free)
    assert LEAST_DF <= model.df.item() <= GREATEST_DF * (1 + 1e-6)
    assert all(loss.isfinite().all() for loss in model.losses(x, seed()).values())


def test_the_gradient_of_a_learnt_df_is_that_of_the_losses(x):
    model, x = make(prior="t", df=4.0, learn_df=True).double(), x.double()

    def loss() -> torch.Tensor:
        losses = model.losses(x, seed())
        return (losses["reconstruction"] + losses["kl"]).mean()

    loss().backward()
    found = model.free_df.grad.item()
    with torch.no_grad():
        start, step = model.free_df.item(), 1e-6
        ends = []
        for end in (start + step, start - step):
            model.free_df.fill_(end)
            ends.append(loss().item())
    assert found == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)


def test_a_df_that_is_not_learnt_is_no_parameter():
    assert make(prior="t", df=3.0).df == 3.0
    assert len(list(make(prior="t").parameters())) == len(list(make().parameters()))
