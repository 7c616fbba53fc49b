import pytest
import torch
from torch.distributions import Normal, kl_divergence

from sqloss.models import VAE
from sqloss.models.vae import Gaussian

BATCH, LATENT = 6, 5


@pytest.fixture
def vae() -> VAE:
    torch.manual_seed(0)
    return VAE((1, 7, 4), hidden=16, latent=LATENT)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(BATCH, 1, 7, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(BATCH, LATENT, generator=torch.Generator().manual_seed(2))


def test_the_classic_sizes():
    sizes = [tuple(p.shape) for p in VAE((1, 28, 28)).parameters() if p.ndim == 2]
    assert sizes == [(400, 784), (40, 400), (400, 20), (784, 400)]


def test_kl_is_that_of_torch_distributions():
    mean, log_variance = torch.randn(2, BATCH, LATENT, dtype=torch.float64)
    posterior = Normal(mean, (0.5 * log_variance).exp())
    expected = kl_divergence(posterior, Normal(torch.zeros(()), torch.ones(()))).sum(1)
    torch.testing.assert_close(Gaussian(mean, log_variance).kl(), expected)


def test_sample_has_the_posterior_mean_and_deviation():
    mean, log_variance = torch.tensor([[3.0]]), torch.tensor([[2.0]]).log() * 2
    noise = torch.tensor([[1.5]])
    torch.testing.assert_close(Gaussian(mean, log_variance).sample(noise), torch.tensor([[6.0]]))


def test_reconstruction_is_the_cross_entropy_summed_over_pixels(vae, x, noise):
    mean, log_variance = vae.encoder(x.flatten(1)).double().chunk(2, dim=1)
    z = mean + (log_variance / 2).exp() * noise
    p = vae.double().decoder(z).sigmoid()
    flat = x.double().flatten(1)
    expected = -(flat * p.log() + (1 - flat) * (1 - p).log()).sum(1)
    losses = vae.float().losses(x, noise)
    torch.testing.assert_close(losses["reconstruction"].double(), expected, rtol=1e-5, atol=1e-5)


def test_losses_are_per_sample(vae, x, noise):
    together = vae.losses(x, noise)
    for name in ("reconstruction", "kl"):
        assert together[name].shape == (BATCH,)
        alone = torch.cat([vae.losses(x[i : i + 1], noise[i : i + 1])[name] for i in range(BATCH)])
        torch.testing.assert_close(together[name], alone)


def test_losses_depend_on_the_callers_noise_only(vae, x, noise):
    first, second = vae.losses(x, noise), vae.losses(x, noise)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["reconstruction"], vae.losses(x, -noise)["reconstruction"])


def test_extreme_logits_stay_finite(vae, x, noise):
    with torch.no_grad():
        vae.decoder[-1].bias.fill_(1e4)
    assert vae.losses(x, noise)["reconstruction"].isfinite().all()


def test_every_parameter_gets_a_gradient(vae, x, noise):
    sum(loss.sum() for loss in vae.losses(x, noise).values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in vae.parameters())


def test_generated_images_are_pixel_means(vae, x, noise):
    for images in (vae.sample(noise), vae.reconstruct(x)):
        assert images.shape == x.shape
        assert images.min() >= 0
        assert images.max() <= 1
    torch.testing.assert_close(vae.reconstruct(x), vae.decode(vae.encode(x).mean).sigmoid())
