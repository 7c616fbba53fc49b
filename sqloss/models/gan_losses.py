r"""The losses of GANs, one per sample, so that any risk can be taken of them.

``real_losses`` and ``fake_losses`` are what a discriminator minimises on real and on generated
images, ``generator_losses`` what the generator minimises on its own. With logits x, all [B]::

    kind            real              fake              generator
    nonsaturating   softplus(-x)      softplus(x)       softplus(-x)
    saturating      softplus(-x)      softplus(x)       -softplus(x)
    lsgan           (x - 1)^2         x^2               (x - 1)^2
    hinge           max(0, 1 - x)     max(0, 1 + x)     -x
    wgan-gp         -x                x                 -x

With D = sigmoid(x), softplus(-x) is -log D and softplus(x) is -log(1 - D): the first two are of
Goodfellow et al. (2014), the game's own generator loss log(1 - D), whose gradient vanishes where
the discriminator is sure of a fake, and the one that they train with instead. The others are those
of Mao et al. (2017), with the targets 0 and 1 and without the factor 1/2; of Lim & Ye (2017) and
Miyato et al. (2018); and of Arjovsky, Chintala & Bottou (2017), to which the discriminator adds
``gradient_penalty``.

Logits are float32 or float64, as are the losses. Cross-entropies, squares and likelihoods are those
of ``sqloss.losses``, deterministic as they are.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sqloss.losses import binary_cross_entropy_with_logits, gaussian_nll_loss, mse_loss


def real_losses(kind: str, logits: Tensor) -> Tensor:
    """The discriminator's loss of each real image, [B], of their logits [B].

    Args:
        kind: one of ``GAN_LOSSES``; the formulas are above.
        logits: of the discriminator, float32 or float64.

    Raises:
        ValueError: another kind.

    Example::

        >>> import torch
        >>> from sqloss.models.gan_losses import real_losses
        >>> real_losses("hinge", torch.tensor([-1., 0., 2.]))
        tensor([2., 1., 0.])
    """
    return _of_kind("real_losses", kind, _REAL)(logits)


def fake_losses(kind: str, logits: Tensor) -> Tensor:
    """The discriminator's loss of each generated image; as ``real_losses``.

    Example::

        >>> import torch
        >>> from sqloss.models.gan_losses import fake_losses
        >>> fake_losses("lsgan", torch.tensor([-1., 0., 2.]))
        tensor([1., 0., 4.])
    """
    return _of_kind("fake_losses", kind, _FAKE)(logits)


def generator_losses(kind: str, logits: Tensor) -> Tensor:
    """The generator's loss of each generated image; as ``real_losses``.

    Example::

        >>> import torch
        >>> from sqloss.models.gan_losses import generator_losses
        >>> generator_losses("nonsaturating", torch.zeros(2))
        tensor([0.6931, 0.6931])
    """
    return _of_kind("generator_losses", kind, _GENERATOR)(logits)


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mix: Tensor
) -> Tensor:
    r"""How far the critic's slope is from 1, at a point between each real and each fake image.

    With :math:`x = \mathrm{mix} \cdot \mathrm{real} + (1 - \mathrm{mix}) \cdot \mathrm{fake}`,

    .. math::
        \left( \lVert \nabla_x\, \mathrm{critic}(x) \rVert_2 - 1 \right)^2

    (Gulrajani et al., 2017). It has gradients in what the critic is made of, but none in the
    images; where the slope is 0, which has no direction to grow in, they are 0.

    Args:
        critic: images to logits [B]; each from its own image, hence without batch norm.
        real: images, [B, ...].
        fake: images of the same shape.
        mix: [B], usually uniform in [0, 1].

    Returns:
        Tensor: [B].

    Raises:
        ValueError: shapes that do not fit.

    Example::

        >>> import torch
        >>> from sqloss.models.gan_losses import gradient_penalty
        >>> real, fake, mix = torch.ones(2, 1, 1, 4), torch.zeros(2, 1, 1, 4), torch.rand(2)
        >>> gradient_penalty(lambda images: 3 * images.flatten(1)[:, 0], real, fake, mix)
        tensor([4., 4.])
    """
    if fake.shape != real.shape:
        raise ValueError(
            f"gradient_penalty: fake: expected the shape of real, {tuple(real.shape)}, got "
            f"{tuple(fake.shape)}"
        )
    if mix.shape != (len(real),):
        raise ValueError(
            f"gradient_penalty: mix: expected shape {(len(real),)}, got {tuple(mix.shape)}"
        )
    share = mix.view(-1, *(1,) * (real.dim() - 1))
    x = torch.lerp(fake.detach(), real.detach(), share).requires_grad_()
    logits = critic(x)
    if logits.shape != mix.shape:
        raise ValueError(
            f"gradient_penalty: critic: expected logits of shape {tuple(mix.shape)}, got "
            f"{tuple(logits.shape)}"
        )
    (slopes,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    norms: Tensor = torch.linalg.vector_norm(slopes.flatten(1), dim=1)
    return (norms - 1).square()


def code_losses(loc: Tensor, var: Tensor, codes: Tensor) -> Tensor:
    r"""How unlikely the codes of each generated image are for who reads them from it, in nats.

    The negative log-likelihood of InfoGAN (Chen et al., 2016) with normal distributions,

    .. math::
        \sum_k \tfrac{1}{2} \left( \log 2 \pi v_k + (c_k - \mu_k)^2 / v_k \right).

    For codes uniform in [-1, 1], K log 2 minus its mean is a lower bound on the information that an
    image has about its K codes. Generator and discriminator both minimise it.

    Args:
        loc: means, [B, K].
        var: variances, [B, K], clamped to 1e-6.
        codes: what the generator was given, [B, K].

    Returns:
        Tensor: [B].

    Raises:
        ValueError: shapes that differ.

    Example::

        >>> import torch
        >>> from sqloss.models.gan_losses import code_losses
        >>> code_losses(torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([[0.], [1.]]))
        tensor([0.9189, 1.4189])
    """
    return gaussian_nll_loss(loc, codes, var, full=True, reduction="sum")


def _bce(target: float, logits: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def _mse(target: float, logits: Tensor) -> Tensor:
    return mse_loss(logits, torch.full_like(logits, target))


def _hinge(sign: int, logits: Tensor) -> Tensor:
    return torch.relu(1 + sign * logits)


_Losses = Callable[[Tensor], Tensor]

_REAL: dict[str, _Losses] = {
    "nonsaturating": partial(_bce, 1),
    "saturating": partial(_bce, 1),
    "lsgan": partial(_mse, 1),
    "hinge": partial(_hinge, -1),
    "wgan-gp": torch.neg,
}
_FAKE: dict[str, _Losses] = {
    "nonsaturating": partial(_bce, 0),
    "saturating": partial(_bce, 0),
    "lsgan": partial(_mse, 0),
    "hinge": partial(_hinge, 1),
    "wgan-gp": torch.positive,
}
_GENERATOR: dict[str, _Losses] = {
    "nonsaturating": partial(_bce, 1),
    "saturating": lambda logits: -_bce(0, logits),
    "lsgan": partial(_mse, 1),
    "hinge": torch.neg,
    "wgan-gp": torch.neg,
}
GAN_LOSSES = tuple(_REAL)


def _of_kind(function: str, kind: str, known: dict[str, _Losses]) -> _Losses:
    if kind not in known:
        raise ValueError(f"{function}: kind: expected one of {GAN_LOSSES}, got {kind!r}")
    return known[kind]
