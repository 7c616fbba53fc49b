"""The VAE again, by hand: forward and backward passes in NumPy alone, for both priors, and SGD.

It is ``sqloss.models.vae.VAE`` with its fully connected layers, written out in formulas: what
autograd does there can be read here, and each checks the other. Parameters are a dict of arrays
under the names and in the layout of that model's ``state_dict()``. All arithmetic has their dtype.

With pixels x, and the noise t of a standard normal or Student-t distribution::

    loc, logvar = encoder(x)
    z           = loc + sigma t,  sigma = exp(logvar / 2)
    logits      = decoder(z)

    reconstruction = sum over pixels      of softplus(logits) - x logits
    kl, normal     = sum over latent dims of (loc^2 + sigma^2 - 1 - logvar) / 2
    kl, Student-t  = sum over latent dims of (df + 1) / 2 * (log1p(z^2 / df) - log1p(t^2 / df))
                                             - logvar / 2

The first KL is in closed form; the second is log q(z | x) - log p(z) at the one sample z, where
prior and posterior have the same df, so that their normalising constants cancel.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Parameters = Mapping[str, Array]


def train_step(
    parameters: Parameters,
    x: Array,
    seed: int,
    *,
    lr: float,
    df: float | None = None,
    alpha: float = 0.0,
    tail_term: str = "elbo",
    beta: float = 1.0,
) -> float:
    """One step of SGD, in place, on pixels ``x`` in [0, 1], [B, pixels]; the objective before it.

    The noise is a function of the seed. ``df`` is that of prior and posterior; None: they are
    normal. ``alpha``, ``tail_term`` and ``beta`` are those of ``objective``.
    """
    latent = layers(parameters, "decoder")[0].weight.shape[1]
    rng = np.random.default_rng(seed)
    t = standard_draws(1 - rng.random((len(x), latent)), rng.random((len(x), latent)), df)
    with np.errstate(all="ignore"):  # the value tells what is no longer finite
        passed = forward(parameters, x, t.astype(x.dtype), df)
        value, of_losses = objective(passed.losses, alpha, tail_term, beta)
        sgd_step(parameters, backward(parameters, passed, of_losses, df), lr)
    return value


class Forward(NamedTuple):
    """The losses of each sample, [B], in nats, and what the backward pass needs beside them."""

    losses: dict[str, Array]
    x: Array  # [B, pixels]
    t: Array  # [B, latent], as are the next three
    loc: Array
    sigma: Array
    z: Array
    pixel_means: Array  # [B, pixels]: sigmoid(logits)
    encoder_inputs: list[Array]  # of each layer
    decoder_inputs: list[Array]


def forward(parameters: Parameters, x: Array, t: Array, df: float | None = None) -> Forward:
    """The losses of pixels ``x`` in [0, 1], [B, pixels], given the noise t [B, latent].

    The noise is that of ``standard_draws`` with the same ``df``.
    """
    encoded, encoder_inputs = mlp(layers(parameters, "encoder"), x)
    loc, logvar = np.split(encoded, 2, axis=1)
    sigma = np.exp(logvar / 2)
    z = loc + sigma * t
    logits, decoder_inputs = mlp(layers(parameters, "decoder"), z)

    e = np.exp(-np.abs(logits))  # at most 1: neither of its uses below can overflow
    cross_entropy = np.maximum(logits, 0) - x * logits + np.log1p(e)
    pixel_means = np.where(logits >= 0, 1, e) / (1 + e)
    if df is None:
        kl = (loc**2 + sigma**2 - 1 - logvar) / 2
    else:
        kl = (df + 1) / 2 * (np.log1p(z**2 / df) - np.log1p(t**2 / df)) - logvar / 2

    losses = {"reconstruction": cross_entropy.sum(1), "kl": kl.sum(1)}
    return Forward(losses, x, t, loc, sigma, z, pixel_means, encoder_inputs, decoder_inputs)


def backward(
    parameters: Parameters,
    forward: Forward,
    gradients: Mapping[str, Array],
    df: float | None = None,
) -> dict[str, Array]:
    """The gradients of the parameters from those of the per-sample losses, [B] each."""
    x, t, loc, sigma, z = forward.x, forward.t, forward.loc, forward.sigma, forward.z
    grad_reconstruction = gradients["reconstruction"][:, None]
    grad_kl = gradients["kl"][:, None]

    grad_logits = grad_reconstruction * (forward.pixel_means - x)
    decoder = layers(parameters, "decoder")
    of_decoder, grad_first = mlp_backward(decoder, forward.decoder_inputs, grad_logits)
    grad_z = grad_first @ decoder[0].weight

    # By the reparameterisation: dz/dloc = 1 and dz/dlogvar = sigma t / 2.
    if df is None:
        grad_loc = grad_z + grad_kl * loc
        grad_logvar = grad_z * sigma * t / 2 + grad_kl * (sigma**2 - 1) / 2
    else:
        grad_loc = grad_z + grad_kl * (df + 1) * z / (df + z**2)
        grad_logvar = grad_loc * sigma * t / 2 - grad_kl / 2

    grad_encoded = np.concatenate([grad_loc, grad_logvar], axis=1)
    encoder = layers(parameters, "encoder")
    of_encoder, _ = mlp_backward(encoder, forward.encoder_inputs, grad_encoded)
    return of_encoder | of_decoder


def sgd_step(parameters: Parameters, gradients: Parameters, lr: float) -> None:
    """One step of plain stochastic gradient descent, in place."""
    for name, gradient in gradients.items():
        parameters[name][...] -= lr * gradient


class Layer(NamedTuple):
    """A linear layer: x @ weight.T + bias."""

    name: str
    weight: Array  # [outputs, inputs]
    bias: Array  # [outputs]


def layers(parameters: Parameters, part: str) -> list[Layer]:
    """The linear layers of the encoder or the decoder, in order."""
    names = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]
    return [
        Layer(name, parameters[f"{name}.weight"], parameters[f"{name}.bias"])
        for name in names
        if name.startswith(part)
    ]


def mlp(layers: list[Layer], x: Array) -> tuple[Array, list[Array]]:
    """The outputs of linear layers with ReLUs between them, and the inputs of each layer."""
    inputs = [x]
    for layer in layers[:-1]:
        inputs.append(np.maximum(inputs[-1] @ layer.weight.T + layer.bias, 0))
    last = layers[-1]
    return inputs[-1] @ last.weight.T + last.bias, inputs


def mlp_backward(
    layers: list[Layer], inputs: list[Array], grad: Array
) -> tuple[dict[str, Array], Array]:
    """The gradients of the layers from that of the outputs, and that of the first layer's outputs.

    The gradient of the MLP's own input is the latter times the first layer's weight: a product
    that the encoder, whose input is the data, can do without.
    """
    gradients: dict[str, Array] = {}
    for i in reversed(range(len(layers))):
        gradients[f"{layers[i].name}.weight"] = grad.T @ inputs[i]
        gradients[f"{layers[i].name}.bias"] = grad.sum(0)
        if i > 0:
            grad = grad @ layers[i].weight * (inputs[i] > 0)
    return gradients, grad


def standard_draws(u: Array, v: Array, df: float | None = None) -> Array:
    """Standard Student-t draws by Bailey's (1994) transform of u in (0, 1] and v in [0, 1]::

        e = -2 log u,   t = sqrt(df expm1(e / df)) cos(2 pi v)

    Its limit at infinite df is the transform of Box & Muller: for df None, normal draws.
    """
    e = -2 * np.log(u)
    squared_radius = e if df is None else df * np.expm1(e / df)
    draws: Array = np.sqrt(squared_radius) * np.cos(2 * math.pi * v)
    return draws


def objective(
    losses: Mapping[str, Array], alpha: float, tail_term: str, beta: float
) -> tuple[float, dict[str, Array]]:
    """The value of ``vae_objective`` of the torch trainer, and its gradients in the losses, [B]."""
    reconstruction, kl = losses["reconstruction"], losses["kl"]
    if tail_term == "elbo":
        value, weights = superquantile(reconstruction + beta * kl, alpha)
        return value, {"reconstruction": weights, "kl": beta * weights}
    value, weights = superquantile(reconstruction, alpha)
    mean, mean_weights = superquantile(kl, 0.0)
    return value + beta * mean, {"reconstruction": weights, "kl": beta * mean_weights}


def superquantile(losses: Array, alpha: float) -> tuple[float, Array]:
    """The mean of the worst k = (1 - alpha) n losses, k not rounded, and its weights [n].

    The weights are 1 / k above the threshold, the ceil(k)-th largest loss; the losses equal to it
    share evenly what is left of 1. They are the gradient, and alpha = 0 is the mean.
    """
    n = len(losses)
    k = (1 - alpha) * n
    # For 1 - 0.7 and n = 10 floating point has k = 3 + 4e-16: that is not a fourth loss.
    rank = max(math.ceil(k - n * 2.0**-52), 1)
    threshold = np.sort(losses)[n - rank]
    above, at = losses > threshold, losses == threshold
    weights = above / k + at * ((k - above.sum()) / k / at.sum())
    return float(weights @ losses), weights.astype(losses.dtype)
