"""A variational autoencoder with a Bernoulli decoder, after Kingma & Welling (2014).

Its losses are per sample and in nats, summed over pixels and latent dimensions: how samples are
averaged, and how much the KL weighs (beta), belong to the objective, not to the model.

Another network (convolutional, say) is another pair of ``encoder`` and ``decoder``; another
posterior and prior (Student-t, say) is another class with the two methods of ``Gaussian``.
"""

import math
from typing import NamedTuple

from torch import Tensor, nn

from sqloss.losses import binary_cross_entropy_with_logits


class Gaussian(NamedTuple):
    """The posterior N(mean, exp(log_variance)) of each sample, against the prior N(0, 1)."""

    mean: Tensor  # [B, latent]
    log_variance: Tensor  # [B, latent]

    def sample(self, noise: Tensor) -> Tensor:
        """Reparameterised: standard normal ``noise`` [B, latent] becomes a draw [B, latent]."""
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self) -> Tensor:
        """KL(posterior || prior) in closed form, [B]."""
        per_dimension = self.mean.square() + self.log_variance.exp() - 1 - self.log_variance
        return 0.5 * per_dimension.sum(1)


class VAE(nn.Module):
    """One hidden ReLU layer on either side: 784-400-20 with the defaults on MNIST."""

    def __init__(self, data_shape: tuple[int, ...], hidden: int = 400, latent: int = 20) -> None:
        super().__init__()
        self.data_shape = data_shape
        self.latent = latent
        self.encoder = mlp(math.prod(data_shape), hidden, 2 * latent)
        self.decoder = mlp(latent, hidden, math.prod(data_shape))

    def losses(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Per-sample losses of pixels ``x`` in [0, 1], [B, *data_shape], given noise [B, latent].

        ``reconstruction`` + ``kl`` is the negative ELBO: both are [B], in nats.
        """
        posterior = self.encode(x)
        logits = self.decode(posterior.sample(noise))
        reconstruction = binary_cross_entropy_with_logits(logits, x, reduction="sum")
        return {"reconstruction": reconstruction, "kl": posterior.kl()}

    def encode(self, x: Tensor) -> Gaussian:
        return Gaussian(*self.encoder(x.flatten(1)).chunk(2, dim=1))

    def decode(self, z: Tensor) -> Tensor:
        """The logits of the pixels, [B, *data_shape]."""
        logits: Tensor = self.decoder(z).unflatten(1, self.data_shape)
        return logits

    def sample(self, noise: Tensor) -> Tensor:
        """The pixel means of images drawn from the prior by ``noise`` [B, latent]."""
        return self.decode(noise).sigmoid()

    def reconstruct(self, x: Tensor) -> Tensor:
        """The pixel means at the posterior mean of each ``x``."""
        return self.decode(self.encode(x).mean).sigmoid()


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
