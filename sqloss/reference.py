"""The plain-PyTorch twin of every operator: the specification that its kernels are tested against,
and what serves tensors on devices that have no kernel.

Everything is computed in float64, whatever the dtypes of the tensors; nothing waits for the device.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
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


# --- per-sample losses ----------------------------------------------------------------------------


def pointwise_losses(
    loss: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    other: Tensor | None,
    parameter: float,
    full: bool,
    sample_dims: int,
    mean: bool,
) -> Tensor:
    """One loss per sample: the sum or mean of its element losses, each times ``weight``.

    The element losses are those of torch.nn.functional with ``reduction="none"``::

        loss                               other          parameter
        binary_cross_entropy_with_logits   pos_weight
        mse
        smooth_l1                                         beta; L1 where it is 0
        huber                                             delta
        gaussian_nll                       var            eps; and full

    All tensors have one shape, whose first ``sample_dims`` dimensions are those of the samples.
    Returns float64 if one of the tensors is, else float32.
    """
    x, y, z = input.double(), target.double(), None if other is None else other.double()
    elements = _element_losses(loss, x, y, z, parameter, full)
    if weight is not None:
        elements = elements * weight.double()
    samples = elements.unsqueeze(-1).flatten(sample_dims)
    losses = samples.mean(-1) if mean else samples.sum(-1)
    return losses.to(losses_dtype(input, target, weight, other))


def pointwise_losses_backward(
    grad_losses: Tensor,
    loss: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    other: Tensor | None,
    parameter: float,
    full: bool,
    sample_dims: int,
    mean: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, target and other that ``output_mask`` wants; else empty tensors.

    A sample whose ``grad_losses`` is 0 gets zeros, even where a derivative of its elements is not
    finite. ``weight`` and ``pos_weight`` have no gradient.
    """
    x, y, z = input.double(), target.double(), None if other is None else other.double()
    derivatives = _element_derivatives(loss, x, y, z, parameter)
    grad = grad_losses.double()[(...,) + (None,) * (input.dim() - sample_dims)]
    scale = grad / max(math.prod(input.shape[sample_dims:]), 1) if mean else grad
    if weight is not None:
        scale = scale * weight.double()

    def gradient(of: Tensor | None, derivative: Tensor | None, wanted: bool) -> Tensor:
        if of is None or derivative is None or not wanted:
            return input.new_empty(0)
        return torch.where(grad == 0, 0.0, scale * derivative).to(of.dtype)

    tensors = (input, target, other)
    grad_input, grad_target, grad_other = map(gradient, tensors, derivatives, output_mask)
    return grad_input, grad_target, grad_other


def cross_entropy_losses(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """One loss per target element, and the log-sum-exp of its logits.

    ``input`` is ``[N, C, d1, ...]``, ``target`` int64 classes ``[N, d1, ...]`` or probabilities of
    the shape of input, ``weight`` ``[C]``. With the coefficients ``t`` of the classes::

        classes:        t[c] = (1 - label_smoothing) * weight[c] * (c == target)
                               + label_smoothing / C * weight[c],    0 where target is ignore_index
        probabilities:  t[c] = ((1 - label_smoothing) * target[c] + label_smoothing / C) * weight[c]
        loss          = sum over c of t[c] * (log_sum_exp - input[c])

    Returns losses ``[N, d1, ...]``, float64 if one of the tensors is, else float32, and
    log_sum_exp ``[N, d1, ...]`` in float64: backward subtracts it from logits of any size.
    """
    x, w = input.double(), None if weight is None else weight.double()
    if target.is_floating_point():
        losses = F.cross_entropy(
            x, target.double(), w, reduction="none", label_smoothing=label_smoothing
        )
    else:
        _require_classes(target, input.shape[1], ignore_index)
        losses = F.cross_entropy(
            x,
            target,
            w,
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
        )
    return losses.to(losses_dtype(input, target, weight)), x.logsumexp(1)


def cross_entropy_losses_backward(
    grad_losses: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    log_sum_exp: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The gradient of input: ``grad_losses * (softmax(input) * sum of t - t)``.

    Targets whose ``grad_losses`` is 0 and ignored ones get zeros, even where the softmax is not
    finite.
    """
    x = input.double()
    classes = input.shape[1]
    w = torch.ones(classes, device=x.device) if weight is None else weight
    w = w.double().view(-1, *[1] * (input.dim() - 2))
    grad = grad_losses.double().unsqueeze(1)
    skipped = grad == 0
    if target.is_floating_point():
        smoothed = target.double() * (1 - label_smoothing) + label_smoothing / classes
    else:
        index = target.unsqueeze(1)
        skipped = skipped | (index == ignore_index)
        is_target = (index == torch.arange(classes, device=x.device).view_as(w)).double()
        smoothed = is_target * (1 - label_smoothing) + label_smoothing / classes
    t = smoothed * w
    softmax = (x - log_sum_exp.double().unsqueeze(1)).exp()
    gradient = grad * (softmax * t.sum(1, keepdim=True) - t)
    return torch.where(skipped, 0.0, gradient).to(input.dtype)


def losses_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the per-sample losses of these tensors."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def _element_losses(
    loss: str, x: Tensor, y: Tensor, other: Tensor | None, parameter: float, full: bool
) -> Tensor:
    match loss:
        case "binary_cross_entropy_with_logits":
            # F's is inf - inf where this is inf
            positive = y if other is None else other * y
            return -(1 - y) * F.logsigmoid(-x) - positive * F.logsigmoid(x)
        case "mse":
            return F.mse_loss(x, y, reduction="none")
        case "smooth_l1":
            return F.smooth_l1_loss(x, y, reduction="none", beta=parameter)
        case "huber":
            return F.huber_loss(x, y, reduction="none", delta=parameter)
        case "gaussian_nll" if other is not None:
            # not F's, which waits for the device to look for negative variances
            var = other.clamp(min=parameter)
            return 0.5 * (var.log() + (x - y) ** 2 / var + full * math.log(2 * math.pi))
    raise ValueError(f"pointwise_losses: loss: expected the name of one, got {loss!r}")


def _element_derivatives(
    loss: str, x: Tensor, y: Tensor, other: Tensor | None, parameter: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The derivatives of the element losses in input, in target and, of gaussian_nll, in var."""
    if loss == "binary_cross_entropy_with_logits":
        pos_weight = 1.0 if other is None else other
        in_x = (1 - y) * x.sigmoid() - pos_weight * y * (-x).sigmoid()
        return in_x, F.logsigmoid(-x) - pos_weight * F.logsigmoid(x), None
    difference = x - y
    if loss == "gaussian_nll" and other is not None:
        var = other.clamp(min=parameter)  # the derivative in var is taken as if not clamped
        return difference / var, -difference / var, 0.5 * (1 - difference**2 / var) / var
    if loss == "mse":
        in_x = 2 * difference
    elif loss == "huber":
        in_x = difference.clamp(-parameter, parameter)
    elif parameter > 0:
        in_x = (difference / parameter).clamp(-1, 1)
    else:
        in_x = difference.sign().where(~difference.isnan(), difference)  # torch's sign of NaN is 0
    return in_x, -in_x, None


def _require_classes(target: Tensor, classes: int, ignore_index: int) -> None:
    """An IndexError on the CPU, an assertion on the device elsewhere: no wait for it."""
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    message = (
        f"cross_entropy: target: expected class indices in [0, {classes}) or ignore_index "
        f"({ignore_index})"
    )
    if target.device.type != "cpu":
        torch._assert_async(~bad.any(), message)
    elif bad.any():
        raise IndexError(f"{message}, got {target[bad][0]}")
