"""The plain-PyTorch twin of every operator: the specification that its kernels are tested against,
and what serves tensors on devices that have no kernel.

Everything is computed in float64, whatever the dtype of the losses; nothing waits for the device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# How far alpha in [0, 1) and 1 - alpha can be from the decimal that was meant, as a share of W.
_ALPHA_ROUNDING = 2.0**-52
# How far a sum of n weights can be from their true sum, as a share of it: n times this.
_SUM_ROUNDING = 2.0**-53


def superquantile(
    losses: Tensor,
    tail_fraction: float | Tensor,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    dim: Sequence[int] = (),
    keepdim: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The superquantile (value), the value-at-risk (threshold) and the weights that define them.

    With the losses sorted from the worst, weights ``w`` (1 without ``weight``, 0 where ``mask`` is
    False), their sum ``W`` and ``k = tail_fraction * W``::

        threshold = the first loss at which the weight from the worst on reaches k
        value     = (sum of w * loss above the threshold + (k - weight above) * threshold) / k
        counts    = (weight above, weight at the threshold, k)

    A k that exceeds a sum of weights by no more than rounding does is taken for that sum. NaN ranks
    above +inf; with +inf above the threshold, and no NaN, the value is +inf. ``dim`` lists the
    reduced dimensions, non-negative; empty means all.
    Returns value and threshold in the dtype of losses, counts ``[..., 3]`` in float64.
    """
    x, w = _rows(losses, dim).double() + 0.0, _weights(losses, weight, mask, dim)
    ordered, order = x.sort(-1, descending=True)  # NaN first
    reached = w.gather(-1, order).cumsum(-1)
    total = reached[..., -1:]
    k = tail_fraction * total
    summed = 0 if weight is None else x.shape[-1]
    rounding = total * (_ALPHA_ROUNDING + summed * _SUM_ROUNDING)
    before = (reached < k - rounding) | (reached == 0)
    index = before.sum(-1, keepdim=True).clamp(max=x.shape[-1] - 1)
    t = ordered.gather(-1, index)

    is_above, is_at = _compare(x, t)
    above = (w * is_above).sum(-1, keepdim=True)
    at = (w * is_at).sum(-1, keepdim=True)
    worse = torch.where(is_above & (w > 0), w * x, 0.0).sum(-1, keepdim=True)
    k = torch.maximum(above, torch.minimum(k, above + at))
    value = (worse + torch.where(k > above, (k - above) * t, 0.0)) / k
    value = torch.where(above == 0, t, value)  # the maximum, exactly
    value = torch.where(worse == torch.inf, worse, value)  # even where t is -inf

    shape = output_shape(losses, dim, keepdim)
    return (
        value.reshape(shape).to(losses.dtype),
        t.reshape(shape).to(losses.dtype),
        torch.stack([above, at, k], -1).reshape(*shape, 3),
    )


def superquantile_backward(
    grad_value: Tensor | None,
    grad_threshold: Tensor | None,
    losses: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    threshold: Tensor,
    counts: Tensor,
    dim: Sequence[int] = (),
    keepdim: bool = False,
) -> Tensor:
    """The gradient of the losses from those of value and threshold, either of which may be None.

    The value's subgradient is ``w / k`` above the threshold and ``w * (k - above) / (k * at)`` at
    it; the threshold's is ``w / at`` at it: ties share in proportion to their weight.
    """
    x, w = _rows(losses, dim).double(), _weights(losses, weight, mask, dim)
    above, at, k = counts.reshape(*x.shape[:-1], 3).unsqueeze(-2).unbind(-1)

    def per_row(grad: Tensor | None) -> Tensor | float:
        return 0.0 if grad is None else grad.double().reshape(*x.shape[:-1], 1)

    of_value, of_threshold = per_row(grad_value), per_row(grad_threshold)
    density_above = of_value / k
    density_at = of_value * ((k - above) / k / at) + of_threshold / at
    is_above, is_at = _compare(x, threshold.double().reshape(*x.shape[:-1], 1))
    density = torch.where(is_above, density_above, torch.where(is_at, density_at, 0.0))
    gradient = torch.where(w > 0, w * density, 0.0).to(losses.dtype)

    kept, reduced = _split(losses, dim)
    permuted = gradient.reshape([losses.shape[d] for d in kept + reduced])
    return permuted.permute([(kept + reduced).index(d) for d in range(losses.dim())])


def _split(losses: Tensor, dim: Sequence[int]) -> tuple[list[int], list[int]]:
    """The dimensions kept, and those reduced."""
    for d in dim:
        if not 0 <= d < losses.dim():
            raise IndexError(
                f"superquantile: dim: expected to be in [0, {losses.dim() - 1}] for losses of "
                f"shape {list(losses.shape)}, got {d}"
            )
    reduced = [d for d in range(losses.dim()) if not dim or d in dim]
    return [d for d in range(losses.dim()) if d not in reduced], reduced


def _rows(tensor: Tensor, dim: Sequence[int]) -> Tensor:
    """[rows, n]: the kept dimensions flattened, then the reduced ones."""
    kept, reduced = _split(tensor, dim)
    n = math.prod(tensor.shape[d] for d in reduced)
    return tensor.permute(kept + reduced).reshape(-1, n)


def _weights(
    losses: Tensor, weight: Tensor | None, mask: Tensor | None, dim: Sequence[int]
) -> Tensor:
    w = torch.ones_like(losses, dtype=torch.float64) if weight is None else weight.double()
    if mask is not None:
        w = torch.where(mask, w, 0.0)
    rows = _rows(w, dim)
    if weight is not None:
        _require(
            ((w >= 0) & w.isfinite()).all(), "superquantile: weight: expected finite values >= 0"
        )
        _require(
            rows.sum(-1).isfinite().all(),
            "superquantile: weight: expected a finite sum in every reduction",
        )
    if weight is not None or mask is not None:
        _require(
            (rows.sum(-1) > 0).all(),
            "superquantile: weight, mask: expected a positive sum of weights in every reduction, "
            "got 0",
        )
    return rows


def _require(condition: Tensor, message: str) -> None:
    """A ValueError on the CPU, an assertion on the device elsewhere: no wait for it."""
    if condition.device.type != "cpu":
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def _compare(x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Whether x lies above, and at, the threshold, where NaN ties with NaN above +inf."""
    both_nan = x.isnan() & threshold.isnan()
    return (x > threshold) | (x.isnan() & ~both_nan), (x == threshold) | both_nan


def output_shape(losses: Tensor, dim: Sequence[int], keepdim: bool) -> list[int]:
    """The shape of value and threshold."""
    kept, _ = _split(losses, dim)
    sizes = enumerate(losses.shape)
    return [size if d in kept else 1 for d, size in sizes if keepdim or d in kept]
