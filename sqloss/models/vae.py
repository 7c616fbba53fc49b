"""A variational autoencoder with a Bernoulli decoder, after Kingma & Welling (2014).

Its losses are per sample and in nats, summed over pixels and latent dimensions: how samples are
averaged, and how much the KL weighs (beta), belong to the objective, not to the model.

Posterior and prior are of one family, which one word chooses: normal, or Student's t with the same
df for both, as ``sqloss.models.latents`` has them. The prior is the posterior at loc 0 and
logvar 0. Another network is another pair of ``encoder`` and ``decoder``.

What is random here is a function of a seed (``sqloss.draw_seed``) and of the rows of a batch:
the same seed gives the same draws, and ``rows`` names the rows of a larger draw that a batch has.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sqloss.losses import binary_cross_entropy_with_logits
from sqloss.models.latents import Normal, Prior, StudentT

PRIORS = ("normal", "t")
ARCHITECTURES = ("mlp", "conv")
# A learnt df stays between these. Below 1 a t has no mean, and the expected reconstruction of a
# decoder that is linear far out is infinite; 1e6 is a normal distribution in all but name.
LEAST_DF, GREATEST_DF = 1.0, 1e6


class VAE(nn.Module):
    """A VAE of images [B, *data_shape]: 784-400-20 with the defaults on MNIST.

    Args:
        data_shape: channels, height and width; with ``"mlp"`` any shape.
        hidden: units of the dense hidden layers, from the image's side; the decoder mirrors them.
        latent: dimensions of z.
        architecture: ``"mlp"``, or ``"conv"``: convolutions of stride 2 before the dense layers,
            and transposed ones after the decoder's.
        channels: of the convolutions, from the image's side; each halves the image, rounding up.
        prior: ``"normal"`` or ``"t"``, of the encoder's distribution too.
        df: of the t.
        learn_df: whether df is a parameter, one number that starts at ``df`` and stays between
            ``LEAST_DF`` and ``GREATEST_DF``.

    Raises:
        ValueError: another word, or a df that cannot be learnt.

    Example::

        >>> import torch, sqloss
        >>> from sqloss.models import VAE
        >>> model = VAE((1, 8, 8), hidden=(32,), latent=4, prior="t", df=5)
        >>> x, seed = torch.rand(3, 1, 8, 8), sqloss.draw_seed()
        >>> losses = model.losses(x, seed)
        >>> losses["reconstruction"].shape, losses["kl"].shape
        (torch.Size([3]), torch.Size([3]))
        >>> model.log_weights(x, seed, num_samples=10).shape
        torch.Size([10, 3])
        >>> model.sample(2, seed).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        hidden: Sequence[int] = (400,),
        latent: int = 20,
        *,
        architecture: str = "mlp",
        channels: Sequence[int] = (32, 64),
        prior: str = "normal",
        df: float = 5.0,
        learn_df: bool = False,
    ) -> None:
        super().__init__()
        for argument, value, known in (
            ("architecture", architecture, ARCHITECTURES),
            ("prior", prior, PRIORS),
        ):
            if value not in known:
                raise ValueError(f"VAE: {argument}: expected one of {known}, got {value!r}")
        if learn_df and not LEAST_DF < df < GREATEST_DF:
            raise ValueError(
                f"VAE: df: expected a number between {LEAST_DF:g} and {GREATEST_DF:g} with "
                f"learn_df, got {df}"
            )
        self.data_shape = tuple(data_shape)
        self.latent = latent
        self.prior = prior
        # Of an unbounded number, so that no step of an optimiser leaves the range of df.
        self.free_df = nn.Parameter(torch.tensor(as_free(df))) if learn_df else None
        self._fixed_df = float(df)
        layers = {"mlp": mlp_layers, "conv": conv_layers}[architecture]
        self.encoder, self.decoder = layers(self.data_shape, hidden, latent, channels)

    @property
    def df(self) -> Tensor | float:
        """The df of a t prior: a number, or where it is learnt a tensor with its gradient."""
        if self.free_df is None:
            return self._fixed_df
        low, high = math.log(LEAST_DF), math.log(GREATEST_DF)
        return (low + (high - low) * self.free_df.sigmoid()).exp()

    def distribution(self, loc: Tensor, logvar: Tensor) -> Normal | StudentT:
        """The member of the model's family with these parameters."""
        if self.prior == "normal":
            return Normal(loc, logvar)
        return StudentT(loc, logvar, self.df)

    def encode(self, x: Tensor) -> Normal | StudentT:
        """The posterior of each image of pixels ``x`` in [0, 1], [B, *data_shape]."""
        return self.distribution(*self.encoder(x).chunk(2, dim=1))

    def decode(self, z: Tensor) -> Tensor:
        """The logits of the pixels, [..., *data_shape], for z [..., latent]."""
        logits: Tensor = self.decoder(z.reshape(-1, self.latent))
        return logits.reshape(z.shape[:-1] + self.data_shape)

    def losses(
        self, x: Tensor, seed: Tensor, *, rows: Tensor | None = None, prior: Prior | None = None
    ) -> dict[str, Tensor]:
        """Per-sample losses of pixels ``x`` in [0, 1], [B, *data_shape], of one draw each.

        ``reconstruction`` + ``kl`` is the negative ELBO: both are [B], in nats. The KL of a normal
        is that in closed form, that of a t, and any to another ``prior`` than the model's own, is
        of the same draw as the reconstruction.
        """
        posterior = self.encode(x)
        z, kl = posterior.rsample_kl(seed, rows=rows)
        if prior is not None:
            kl = (posterior.log_prob(z) - prior.log_prob(z)).to(z)
        reconstruction = binary_cross_entropy_with_logits(self.decode(z), x, reduction="sum")
        return {"reconstruction": reconstruction, "kl": kl}

    def log_weights(
        self,
        x: Tensor,
        seed: Tensor,
        num_samples: int,
        *,
        rows: Tensor | None = None,
        prior: Prior | None = None,
    ) -> Tensor:
        """The log importance weights log p(x|z) + log p(z) - log q(z|x) of draws z, [S, B].

        S is num_samples; p(z) is the model's own prior, or another. Takes memory for S * B images.
        """
        posterior = self.encode(x)
        z, kl = posterior.rsample_kl(seed, num_samples, estimator="mc", reduction="none", rows=rows)
        if prior is not None:
            kl = (posterior.log_prob(z) - prior.log_prob(z)).to(z)
        logits = self.decode(z.reshape(num_samples, len(x), self.latent))
        reconstruction = binary_cross_entropy_with_logits(
            logits, x.expand_as(logits), reduction="sum", sample_dims=2
        )
        return -(reconstruction + kl)

    def negative_iw_bound(
        self, x: Tensor, seed: Tensor, num_samples: int, *, rows: Tensor | None = None
    ) -> Tensor:
        """-log of the mean of num_samples importance weights of each image, [B].

        Its expectation is the negative of the importance-weighted bound on log p(x) of Burda et al.
        (2016). With one sample that is the negative ELBO, whose KL is then a sampled one too; it
        falls, towards -log p(x), with every sample more.
        """
        log_weights = self.log_weights(x, seed, num_samples, rows=rows)
        return math.log(num_samples) - log_weights.logsumexp(0)

    def sample(
        self,
        count: int,
        seed: Tensor,
        *,
        prior: Prior | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """The pixel means of images drawn from the prior, [count, *data_shape].

        It is the model's own, or another, such as a ``Mixture`` fitted to the training images.
        ``temperature`` scales its standard deviations.
        """
        zeros = next(self.decoder.parameters()).new_zeros(count, self.latent)
        if prior is None:
            z = self.distribution(zeros, zeros).rsample(seed) * temperature
        else:
            z = prior.sample(count, seed, temperature).to(zeros)
        return self.decode(z).sigmoid()

    def reconstruct(self, x: Tensor) -> Tensor:
        """The pixel means at the posterior's loc of each ``x``."""
        return self.decode(self.encode(x).loc).sigmoid()


def as_free(df: float) -> float:
    """The unbounded number that stands for a learnt df: the logit of log df in its range."""
    low, high = math.log(LEAST_DF), math.log(GREATEST_DF)
    share = (math.log(df) - low) / (high - low)
    return math.log(share / (1 - share))


Layers = tuple[nn.Sequential, nn.Sequential]


def mlp_layers(
    data_shape: tuple[int, ...], hidden: Sequence[int], latent: int, _channels: Sequence[int]
) -> Layers:
    """Encoder and decoder of dense layers with ReLUs between them."""
    pixels = math.prod(data_shape)
    return (
        nn.Sequential(nn.Flatten(), *dense(pixels, *hidden, 2 * latent)),
        nn.Sequential(*dense(latent, *reversed(hidden), pixels)),
    )


def conv_layers(
    data_shape: tuple[int, ...], hidden: Sequence[int], latent: int, channels: Sequence[int]
) -> Layers:
    """Encoder and decoder of dense layers with convolutions between them and the image.

    There is no batch norm: the losses of a sample must not depend on the others of its batch.
    """
    depth, height, width = data_shape
    depths = [depth, *channels]
    down: list[nn.Module] = []
    up: list[nn.Module] = []
    for outer, inner in itertools.pairwise(depths):
        down += [nn.Conv2d(outer, inner, 3, stride=2, padding=1), nn.ReLU()]
        # Twice the smaller side is the larger one, or one more where that is odd.
        is_even = (1 - height % 2, 1 - width % 2)
        upwards = nn.ConvTranspose2d(inner, outer, 3, stride=2, padding=1, output_padding=is_even)
        up = [nn.ReLU(), upwards, *up]
        height, width = (height + 1) // 2, (width + 1) // 2
    features = (channels[-1], height, width)
    flat = math.prod(features)
    return (
        nn.Sequential(*down, nn.Flatten(), *dense(flat, *hidden, 2 * latent)),
        nn.Sequential(*dense(latent, *reversed(hidden), flat), nn.Unflatten(1, features), *up),
    )


def dense(*sizes: int) -> list[nn.Module]:
    """Linear layers of these sizes with ReLUs between them."""
    linear: list[nn.Module] = [
        nn.Linear(inputs, outputs) for inputs, outputs in itertools.pairwise(sizes)
    ]
    return [layer for each in linear for layer in (each, nn.ReLU())][:-1]
