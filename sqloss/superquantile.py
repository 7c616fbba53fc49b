"""The superquantile (conditional value-at-risk) of losses, its threshold and its weights.

Source of the definition: R. T. Rockafellar and S. Uryasev, "Optimization of conditional
value-at-risk", Journal of Risk 2(3), 2000; for distributions with atoms, as every sample is, the
same authors' "Conditional value-at-risk for general loss distributions", Journal of Banking &
Finance 26(7), 2002.
"""

import math
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sqloss._checks import (
    check_broadcasts,
    check_device,
    check_floating,
    check_no_gradient,
    check_tensor,
    resolve_tail_fraction,
)
from sqloss._ops import superquantile as _op


def cvar(
    losses: Tensor,
    alpha: float | None = None,
    *,
    tail_fraction: float | None = None,
    dim: int | Sequence[int] | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    keepdim: bool = False,
) -> Tensor:
    r"""The mean of the worst losses: the superquantile at confidence level ``alpha``.

    With ``n`` losses sorted from the worst, :math:`l_{(1)} \ge l_{(2)} \ge \dots`, and
    :math:`k = (1 - \alpha)\, n`, a real number that is never rounded,

    .. math::
        \mathrm{cvar}_\alpha(l) = \frac{1}{k} \Big( \sum_{i \le \lfloor k \rfloor} l_{(i)}
            + (k - \lfloor k \rfloor)\, l_{(\lfloor k \rfloor + 1)} \Big)
        = \min_\eta\; \eta + \frac{\operatorname{mean}(\max(l - \eta, 0))}{1 - \alpha}.

    ``alpha=0`` is the mean, and for :math:`k \le 1` it is the maximum. The gradient is
    :func:`tail_weights`: only the tail is trained on.

    Args:
        losses: per-sample losses of any shape and strides, float16, bfloat16, float32 or float64.
        alpha: the confidence level in [0, 1): the tail is the worst ``1 - alpha`` of the losses.
            May change from step to step without compiling again. Give this or ``tail_fraction``.
        tail_fraction: the size of the tail, in (0, 1], instead of ``alpha``.
        dim: the dimension or dimensions to reduce; ``None`` (or an empty tuple) for all.
        weight: non-negative, finite sample weights, broadcastable to ``losses``. The tail is then
            the worst ``1 - alpha`` of the weight; a sample of weight 2 counts like two samples.
            Takes no gradient.
        mask: bool, broadcastable to ``losses``; where it is False the loss does not count.
        keepdim: whether reduced dimensions stay, with size 1.

    Returns:
        Tensor: of the dtype of ``losses`` (float32 under autocast), one value for each reduction.

    NaN ranks above +inf: a NaN loss lies in the tail, makes the value NaN and gets a gradient. A
    loss of +inf in it makes the value +inf and leaves the weights finite. Sums are in double and
    the same bit for bit for any number of threads and any repetition. ``alpha`` is a decimal that
    doubles cannot hold: a ``k`` within that rounding (2^-52 n) above an integer counts as it, so
    that the tail of ten losses at ``alpha=0.7`` is three of them. ``weight`` is not looked at where
    ``mask`` is False.

    Raises:
        TypeError: ``losses``, ``weight`` or ``mask`` of a dtype other than the above, both or
            neither of ``alpha`` and ``tail_fraction``.
        ValueError: ``alpha`` or ``tail_fraction`` out of range, nothing to reduce, shapes that do
            not broadcast, another device, weights that are negative, not finite or sum to 0 (of
            weights on a device other than the CPU these are assertions of the device).
        IndexError: ``dim`` out of range.

    Example::

        >>> import torch, sqloss
        >>> losses = torch.tensor([0., 1., 4., 9., 16., 25., 36., 49., 64., 81.])
        >>> sqloss.cvar(losses, alpha=0.75)
        tensor(67.8000)
        >>> sqloss.cvar(losses.view(2, 5), tail_fraction=0.2, dim=1)
        tensor([16., 81.])
    """
    fraction, weight, mask, dims = checked_arguments(
        "cvar", losses, alpha, tail_fraction, dim, weight, mask
    )
    return _op.cvar(losses, fraction, weight, mask, dims, keepdim, "cvar")


superquantile = cvar


def value_at_risk(
    losses: Tensor,
    alpha: float | None = None,
    *,
    tail_fraction: float | None = None,
    dim: int | Sequence[int] | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    keepdim: bool = False,
) -> Tensor:
    r"""The loss at which the tail begins, :math:`l_{(\lceil (1 - \alpha) n \rceil)}`.

    Always one of the losses, never interpolated: the largest ``t`` such that the losses ``>= t``
    are at least ``1 - alpha`` of all. This is the threshold of :func:`cvar`, whose arguments,
    dtypes and errors it shares. Its gradient goes to the losses equal to it, in equal shares (in
    proportion to their weights).

    Example::

        >>> import torch, sqloss
        >>> losses = torch.tensor([0., 1., 4., 9., 16., 25., 36., 49., 64., 81.])
        >>> sqloss.value_at_risk(losses, alpha=0.75)
        tensor(49.)
    """
    fraction, weight, mask, dims = checked_arguments(
        "value_at_risk", losses, alpha, tail_fraction, dim, weight, mask
    )
    return _op.value_at_risk(losses, fraction, weight, mask, dims, keepdim, "value_at_risk")


def tail_weights(
    losses: Tensor,
    alpha: float | None = None,
    *,
    tail_fraction: float | None = None,
    dim: int | Sequence[int] | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    keepdim: bool = False,
) -> Tensor:
    r"""The subgradient of :func:`cvar`: how much each loss counts in the tail.

    :math:`q = \arg\max_q \langle q, l \rangle` over :math:`0 \le q_i \le 1/k, \sum_i q_i = 1`:
    ``1/k`` above the value-at-risk, 0 below it, and at it the remaining mass, split evenly over
    ties (in proportion to ``weight``, if given). ``(q * losses).sum()`` is the superquantile. Use
    it to plot which samples are in the tail, or to resample by.

    Arguments, dtypes and errors are those of :func:`cvar`. The result has the shape of ``losses``
    and its dtype (so ``keepdim`` has no effect), and carries no gradient.

    Example::

        >>> import torch, sqloss
        >>> losses = torch.tensor([0., 1., 4., 9., 16., 25., 36., 49., 64., 81.])
        >>> sqloss.tail_weights(losses, alpha=0.75)[-4:]
        tensor([0.0000, 0.2000, 0.4000, 0.4000])
    """
    with torch.no_grad():
        fraction, weight, mask, dims = checked_arguments(
            "tail_weights", losses, alpha, tail_fraction, dim, weight, mask
        )
        return _op.tail_weights(losses, fraction, weight, mask, dims, "tail_weights")


def checked_arguments(
    function: str,
    losses: Tensor,
    alpha: float | None,
    tail_fraction: float | None,
    dim: int | Sequence[int] | None,
    weight: Tensor | None,
    mask: Tensor | None,
    may_be_empty: bool = False,
) -> tuple[float, Tensor | None, Tensor | None, tuple[int, ...]]:
    """The operator's (tail_fraction, weight, mask, dim), everything checked; dim empty for all."""
    check_floating(function, "losses", losses)
    if tail_fraction is None and type(alpha) is float and 0 <= alpha < 1:
        fraction = 1 - alpha  # without another call: this function is most of the time of a small n
    else:
        fraction = resolve_tail_fraction(function, alpha, tail_fraction)
    dims = () if dim is None else _dims(function, losses, dim)
    if losses.numel() == 0 and not may_be_empty:
        _check_not_empty(function, losses, dims)
    if weight is not None:
        weight = _weight(function, losses, weight)
    if mask is not None:
        mask = checked_mask(function, losses, mask)
    return fraction, weight, mask, dims


def _check_not_empty(function: str, losses: Tensor, dims: tuple[int, ...]) -> None:
    if math.prod(losses.shape[d] for d in dims or range(losses.dim())) == 0:
        raise ValueError(
            f"{function}: losses: expected at least one loss in every reduction, got shape "
            f"{tuple(losses.shape)} reduced over {dims or 'all dimensions'}"
        )


def _dims(function: str, losses: Tensor, dim: int | Sequence[int]) -> tuple[int, ...]:
    ndim = max(losses.dim(), 1)  # as in torch, a scalar has dimensions 0 and -1
    try:
        given = tuple(map(operator.index, dim if isinstance(dim, Iterable) else (dim,)))
    except TypeError:
        raise TypeError(f"{function}: dim: expected an int or ints, got {dim!r}") from None
    for d in given:
        if not -ndim <= d < ndim:
            raise IndexError(
                f"{function}: dim: expected to be in [{-ndim}, {ndim - 1}] for losses of shape "
                f"{tuple(losses.shape)}, got {d}"
            )
    dims = tuple(d % ndim for d in given)
    if len(set(dims)) < len(dims):
        raise ValueError(f"{function}: dim: expected each dimension once, got {given}")
    return dims if losses.dim() else ()


def _weight(function: str, losses: Tensor, weight: Tensor) -> Tensor:
    check_tensor(function, "weight", weight)
    check_device(function, "weight", weight, "losses", losses)
    check_broadcasts(function, "weight", weight, "losses", losses)
    if weight.is_complex() or weight.dtype == torch.bool:
        raise TypeError(
            f"{function}: weight: expected a floating-point or integer tensor (a bool tensor is a "
            f"mask), got {weight.dtype}"
        )
    check_no_gradient(function, "weight", weight)
    return weight.expand_as(losses)


def checked_mask(function: str, losses: Tensor, mask: Tensor) -> Tensor:
    check_tensor(function, "mask", mask)
    check_device(function, "mask", mask, "losses", losses)
    check_broadcasts(function, "mask", mask, "losses", losses)
    if mask.dtype != torch.bool:
        raise TypeError(f"{function}: mask: expected a bool tensor, got {mask.dtype}")
    return mask.expand_as(losses)
