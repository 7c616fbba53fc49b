"""The plain-PyTorch twin of every operator: the specification that its kernels are tested against,
and what serves tensors on devices that have no kernel.

Everything is computed in float64, whatever the dtypes of the tensors; nothing waits for the device.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# How far alpha in [0, 1) and 1 - alpha can be from the decimal that was meant, as a share of W.
ALPHA_ROUNDING = 2.0**-52
# How far a sum of n weights can be from their true sum, as a share of it: n times this.
SUM_ROUNDING = 2.0**-53
# What errors say of the arguments where no loss counts.
NONE_COUNTS = "weight, mask: expected a positive sum of weights in every reduction, got 0"


def superquantile(
    losses: Tensor,
    tail_fraction: float | Tensor,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    dim: Sequence[int] = (),
    keepdim: bool = False,
    function: str = "superquantile",
    none_counts: str = NONE_COUNTS,
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
    Returns value and threshold in the dtype of losses, counts ``[..., 3]`` in float64. Errors name
    ``function``, and read ``none_counts`` where no loss counts.
    """
    if isinstance(tail_fraction, Tensor):
        require(
            ((tail_fraction > 0) & (tail_fraction <= 1)).all(),
            f"{function}: alpha, tail_fraction: expected alpha in [0, 1) or tail_fraction in "
            f"(0, 1]",
        )
    x = _rows(losses, dim).double() + 0.0
    w = _weights(losses, weight, mask, dim, function, none_counts)
    ordered, order = x.sort(-1, descending=True)  # NaN first
    reached = w.gather(-1, order).cumsum(-1)
    total = reached[..., -1:]
    k = tail_fraction * total
    summed = 0 if weight is None else x.shape[-1]
    rounding = total * (ALPHA_ROUNDING + summed * SUM_ROUNDING)
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


def tail_indices(
    losses: Tensor, tail_fraction: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The indices of the tail of losses [N], and their weights in float64.

    With n losses that count and k of them in the tail, these are the first ceil(k) of the losses in
    descending order, NaN first and ties by index; then sorted by index. Each has 1/k, those at the
    threshold equal parts of what is left. The size is ceil(k) of all N losses: the rest is the
    first index, with weight 0.
    """
    (size,) = losses.shape
    n = size if mask is None else int(mask.sum())
    _, threshold, counts = superquantile(losses, tail_fraction, None, mask)
    above, _, k = counts.tolist()

    def tail_size(n: int) -> int:
        return max(math.ceil(tail_fraction * n - n * ALPHA_ROUNDING), 1)

    order = (losses.double() + 0.0).argsort(descending=True, stable=True)
    if mask is not None:
        order = order[mask[order]]
    indices = order[: tail_size(n)].sort().values
    _, is_at = _compare(losses[indices], threshold)
    weights = torch.full_like(indices, 1 / k, dtype=torch.float64)
    weights[is_at] = (k - above) / k / (tail_size(n) - above)
    padding = (0, tail_size(size) - tail_size(n))
    return F.pad(indices, padding, value=int(indices[0])), F.pad(weights, padding)


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
    losses: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    dim: Sequence[int],
    function: str = "superquantile_backward",
    none_counts: str = NONE_COUNTS,
) -> Tensor:
    w = torch.ones_like(losses, dtype=torch.float64) if weight is None else weight.double()
    if mask is not None:
        w = torch.where(mask, w, 0.0)
    rows = _rows(w, dim)
    if weight is not None:
        require(((w >= 0) & w.isfinite()).all(), f"{function}: weight: expected finite values >= 0")
        require(
            rows.sum(-1).isfinite().all(),
            f"{function}: weight: expected a finite sum in every reduction",
        )
    if weight is not None or mask is not None:
        require((rows.sum(-1) > 0).all(), f"{function}: {none_counts}")
    return rows


def require(condition: Tensor, message: str) -> None:
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


# --- the superquantile of losses on many ranks ----------------------------------------------------

# The first digit has as many bits whatever the dtype, so that ranks that disagree about it can tell
# each other so.
_FIRST = 11
# (type of the keys, bits of the digits)
_FORMATS = {
    torch.float64: (torch.int64, (_FIRST, 11, 11, 11, 10, 10)),
    torch.float32: (torch.int32, (_FIRST, 11, 10)),
    torch.bfloat16: (torch.int16, (_FIRST, 5)),
    torch.float16: (torch.int16, (_FIRST, 5)),
}
# A number of magnitude below 1 is so many integers of so many bits each, whose sums are exact.
_LIMBS, _LIMB = 3, 28
_MOST_LOSSES = 1 << (62 - _LIMB)  # of which a sum of limbs fits
# What a tail has to weigh, however small it is, in units of which the total is at least half of one
_SOME = torch.finfo(torch.float64).tiny


def distributed_superquantile(
    losses: Tensor,
    tail_fraction: float,
    weight: Tensor | None,
    mask: Tensor | None,
    config: Sequence[int],
    ranks: int,
    scale: int,
    all_reduce: Callable[[Tensor], None],
    check: Callable[[Tensor], None],
    function: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``superquantile`` of the losses of all ranks, from those of this one, without a gather.

    Its counts are over ``scale``: the density they give, the gradient, is that of the value times
    it. (Not the gradient in half precision, which may be too large with it, and 0 without.)
    ``all_reduce`` turns an int64 tensor into its sum over the ranks, in place. ``config`` are
    integers below 2^16; ``check`` gets for each whether it is equal on all ranks, after the first
    sum and before anything depends on it. Errors name ``function``.

    A loss is a key: an integer of as many bits, in the order of the losses. Each round finds one
    digit of the threshold's key, from the leading one, by the mass of the keys with each digit.
    With it the last round adds up what lies above. Real numbers are added up as integers, exactly:
    those that count less than 2^-84 of the largest, weight or loss, are cut off there. So the
    results do not depend on the order of the losses, on how they are spread over ranks, nor on the
    machine.
    """
    x = losses.detach().reshape(-1)
    keys = _to_keys(x)

    def summed(*parts: Tensor) -> list[Tensor]:
        payload = torch.cat([part.reshape(-1) for part in parts])
        all_reduce(payload)
        sums = payload.split([part.numel() for part in parts])
        return [part.view_as(like) for part, like in zip(sums, parts, strict=True)]

    def agreed(histogram: Tensor, invalid: Tensor | None = None) -> list[Tensor]:
        # With the sum of the squares: no variance where both are what they are if all are equal
        own = torch.tensor([*config, *(number * number for number in config), len(x)])
        own = own.to(x.device, non_blocking=True)
        if invalid is None:
            invalid = own.new_zeros(())
        sums = summed(own, invalid, histogram)
        check((sums[0][:-1] == own[:-1] * ranks).view(2, -1).all(0))
        n = sums[0][-1:]
        require(
            (n <= _MOST_LOSSES).all(),
            f"{function}: losses: expected at most {_MOST_LOSSES} on all ranks together",
        )
        return [n, *sums[1:]]

    # How much each loss counts: [1, n] integers, or [_LIMBS, n] in units of 2^unit
    w, unit = None, None
    rounding: Tensor | float = ALPHA_ROUNDING
    if weight is None:
        counts = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.reshape(-1)
        mass = counts.long().unsqueeze(0)
    else:
        w, unit, rounding = _scaled_weights(weight, mask, agreed, function)
        counts, mass = w > 0, _to_limbs(w)

    # Of one element each, like all that follows: the threshold's digits that are known, as an
    # integer, and the mass above all keys that begin with them
    first, *middle, last = _FORMATS[x.dtype][1]
    shift = 8 * keys.element_size() - first
    half = 1 << first >> 1
    histogram = _histogram((keys >> shift).long() + half, mass, first)
    if weight is None:
        *_, histogram = agreed(histogram)
    else:
        (histogram,) = summed(histogram)
    total = _real(histogram.sum(1, keepdim=True))
    require(
        (total > 0).all(),
        f"{function}: losses: expected one that counts on any of the ranks, got none",
    )
    if unit is not None:
        require(
            _times_power_of_two(total, unit).isfinite().all(),
            f"{function}: weight: expected a finite sum over all ranks",
        )
    target = (tail_fraction * total - total * rounding).clamp(min=_SOME)
    digit, above, at = _descend(histogram, torch.zeros_like(histogram[:, :1]), target)
    prefix = digit - half
    exponent = _exponent(x.dtype, x.device, histogram, digit)

    for width in middle:
        shift -= width
        (histogram,) = summed(_histogram_within(keys, mass, prefix, shift, width))
        digit, above, at = _descend(histogram, above, target)
        prefix = (prefix << width) | digit

    # Before the last round only losses of its histogram are not known to be above the threshold or
    # not, and its bins are keys
    shift -= last
    assert shift == 0
    # Of a mass that is cut off to 0 the exponent may not be in the bound
    is_above = (keys >> last > prefix) & (mass > 0).any(0) & x.isfinite()
    scaled = torch.where(is_above, _times_power_of_two(x.double(), -exponent), 0.0)
    sums = _to_limbs(scaled if w is None else scaled * w).sum(1)
    special = torch.stack([x == torch.inf, x.isnan()]).logical_and(counts).sum(1)
    histogram = _histogram_within(keys, mass, prefix, shift, last)
    histogram, sums, special = summed(histogram, sums, special)
    digit, above, at = _descend(histogram, above, target)

    bins = torch.arange(1 << last, device=x.device)
    values = _from_keys((prefix << last) | bins, x.dtype)
    threshold = values.index_select(0, digit)
    is_above = (bins > digit) & values.isfinite()
    scaled = torch.where(is_above, _times_power_of_two(values.double(), -exponent), 0.0)
    if w is None:  # so many limbs
        sums = sums + (_to_limbs(scaled) * histogram).sum(1)
    else:
        sums = sums + _to_limbs(scaled * _real(histogram)).sum(1)

    above, at = _real(above), _real(at)
    k = torch.minimum(torch.maximum(tail_fraction * total, above), above + at)
    rest = k - above
    at_threshold = rest * _times_power_of_two(threshold.double(), -exponent)
    value = (_real(sums) + torch.where(rest > 0, at_threshold, 0.0)) / k
    value = _times_power_of_two(value, exponent).to(x.dtype)
    value = torch.where(above == 0, threshold, value)  # the maximum, exactly
    infinite, nan = special > 0
    value = torch.where(infinite & (threshold < torch.inf), torch.inf, value)  # -inf at it or not
    # Not a view, as which it could not get a node: an operation in place would lose that
    value = torch.where(nan, torch.nan, value.squeeze())
    masses = torch.cat([above, at, k])
    if unit is not None:
        masses = _times_power_of_two(masses, unit)
    return value, threshold.squeeze(), masses / scale


def _scaled_weights(
    weight: Tensor,
    mask: Tensor | None,
    agreed: Callable[..., Sequence[Tensor]],
    function: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights below 1 in double, 2^unit of them being 1, and what sums of them may be off by.

    A round of its own: the unit is that of the largest weight of all ranks.
    """
    w = weight.reshape(-1).double()
    if mask is not None:
        w = torch.where(mask.reshape(-1), w, 0.0)
    valid = (w >= 0) & w.isfinite()
    w = torch.where(valid, w, 0.0)
    lowest = 1 - (1 << _FIRST >> 1)  # of the exponents that have a bin; lower ones share it
    exponents = torch.frexp(w).exponent.long().clamp(min=lowest)
    histogram = _histogram(exponents - lowest, (w > 0).long().unsqueeze(0), _FIRST)
    n, invalid, histogram = agreed(histogram, (~valid).sum())
    require(invalid == 0, f"{function}: weight: expected finite values >= 0")
    bins = torch.arange(1 << _FIRST, device=w.device)
    unit = torch.where(histogram[0] > 0, bins, 0).max().reshape(1) + lowest
    rounding = ALPHA_ROUNDING + n.double() * SUM_ROUNDING
    return _times_power_of_two(w, -unit), unit, rounding


def _histogram(digits: Tensor, mass: Tensor, width: int) -> Tensor:
    """The mass of each digit of so many bits, [len(mass), 2^width]."""
    histogram = mass.new_zeros(len(mass), 1 << width)
    return histogram.scatter_add_(1, digits.expand_as(mass), mass)


def _histogram_within(keys: Tensor, mass: Tensor, prefix: Tensor, shift: int, width: int) -> Tensor:
    """That of the digits after the prefix, of the keys that begin with it."""
    digits = ((keys >> shift) & ((1 << width) - 1)).long()
    return _histogram(digits, mass * (keys >> (shift + width) == prefix), width)


def _descend(histogram: Tensor, above: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The highest digit from which on the mass reaches the target: (digit, mass above, mass at)."""
    reached = above + histogram.flip(1).cumsum(1).flip(1)
    digit = ((_real(reached) >= target).sum().reshape(1) - 1).clamp(min=0)
    at = histogram.index_select(1, digit)
    return digit, reached.index_select(1, digit) - at, at


def _exponent(dtype: torch.dtype, device: torch.device, histogram: Tensor, digit: Tensor) -> Tensor:
    """e such that 2^e bounds the finite losses with this first digit or a higher one."""
    exponents, bins = _exponents(dtype, device)
    is_there = (histogram > 0).any(0) & (bins >= digit)
    return torch.where(is_there, exponents, exponents.min()).max().reshape(1)


@functools.lru_cache
def _exponents(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each first digit e such that 2^e bounds the finite losses that have it; the digits."""
    kind, (first, *_) = _FORMATS[dtype]
    shift = torch.iinfo(kind).bits - first
    bins = torch.arange(1 << first)
    lowest = (bins - (1 << first >> 1)) << shift
    edges = _from_keys(torch.stack([lowest, lowest + (1 << shift) - 1]), dtype)
    # Where one end is finite and the other is not, the largest number lies between
    largest = edges.double().nan_to_num(torch.finfo(dtype).max).abs()
    largest = largest.clamp(max=torch.finfo(dtype).max).amax(0)
    largest = torch.where((edges.isfinite()).any(0), largest, 0.0)
    return torch.frexp(largest).exponent.long().to(device), bins.to(device)


def _to_keys(x: Tensor) -> Tensor:
    """Integers in the order of the losses: NaN is the largest, and -0 is 0."""
    kind = _FORMATS[x.dtype][0]
    keys = _flipped((x + 0.0).view(kind))
    return keys.masked_fill_(x.isnan(), torch.iinfo(kind).max)


def _from_keys(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The losses with these keys."""
    return _flipped(keys.to(_FORMATS[dtype][0])).view(dtype)


def _flipped(bits: Tensor) -> Tensor:
    """Between the bits of a number and its key: of a negative one, all bits but the sign."""
    info = torch.iinfo(bits.dtype)
    flipped: Tensor = bits ^ ((bits >> (info.bits - 1)) & info.max)
    return flipped


def _to_limbs(x: Tensor) -> Tensor:
    """Integers [_LIMBS, n] that add up, see _real, to numbers below 1 but for 2^-84."""
    cut = (x * _scales(x.device)).trunc()
    cut[1:] -= cut[:-1] * 2.0**_LIMB  # exact: what is left are the lower bits of x
    return cut.long()


@functools.lru_cache
def _scales(device: torch.device) -> Tensor:
    scales = [2.0 ** (_LIMB * (i + 1)) for i in range(_LIMBS)]
    return torch.tensor(scales, dtype=torch.float64, device=device).unsqueeze(1)


def _real(sums: Tensor) -> Tensor:
    """In double, and in their order: sums of limbs [_LIMBS, ...], or of integers [1, ...]."""
    if len(sums) == 1:
        return sums[0].double()
    high, middle, low = sums
    middle = middle + (low >> _LIMB)
    high = high + (middle >> _LIMB)
    middle, low = (limb & ((1 << _LIMB) - 1) for limb in (middle, low))
    scale = 2.0**-_LIMB
    real: Tensor = (high.double() + (middle.double() + low.double() * scale) * scale) * scale
    return real


def _times_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """x * 2^exponent for exponents up to 2,000, where 2^exponent may be out of range."""
    half = exponent >> 1
    product: Tensor = x * _power_of_two(half) * _power_of_two(exponent - half)
    return product


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in double; functions of torch may round it."""
    bits: Tensor = (exponent + 1023) << 52
    return bits.view(torch.float64)


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
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    function: str = "cross_entropy_losses",
) -> tuple[Tensor, Tensor]:
    """One loss per target element, and the log-sum-exp of its logits.

    ``input`` is ``[N, C, d1, ...]``, ``target`` int64 classes ``[N, d1, ...]`` or probabilities of
    the shape of input, ``weight`` ``[C]``. With the coefficients ``t`` of the classes::

        classes:        t[c] = (1 - label_smoothing) * weight[c] * (c == target)
                               + label_smoothing / C * weight[c],    0 where target is ignore_index
        probabilities:  t[c] = ((1 - label_smoothing) * target[c] + label_smoothing / C) * weight[c]
        loss          = sum over c of t[c] * (log_sum_exp - input[c])

    Returns losses ``[N, d1, ...]``, float64 if one of the tensors is, else float32, and
    log_sum_exp ``[N, d1, ...]`` in float64: backward subtracts it from logits of any size. Errors
    about the values of target name ``function``.
    """
    x, w = input.double(), None if weight is None else weight.double()
    if target.is_floating_point():
        losses = F.cross_entropy(
            x, target.double(), w, reduction="none", label_smoothing=label_smoothing
        )
    else:
        _require_classes(target, input.shape[1], ignore_index, function)
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
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of input and target that ``output_mask`` wants; else empty tensors::

        input:                      grad_losses * (softmax(input) * sum of t - t)
        target, of probabilities:   grad_losses * (1 - label_smoothing) * weight
                                    * (log_sum_exp - input)

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
    log_softmax = x - log_sum_exp.double().unsqueeze(1)
    derivatives = (
        log_softmax.exp() * t.sum(1, keepdim=True) - t,
        -(1 - label_smoothing) * w * log_softmax,
    )

    def gradient(of: Tensor, derivative: Tensor, wanted: bool) -> Tensor:
        if not wanted:
            return input.new_empty(0)
        return torch.where(skipped, 0.0, grad * derivative).to(of.dtype)

    grad_input, grad_target = map(gradient, (input, target), derivatives, output_mask)
    return grad_input, grad_target


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


def _require_classes(target: Tensor, classes: int, ignore_index: int, function: str) -> None:
    """An IndexError on the CPU, an assertion on the device elsewhere: no wait for it."""
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    message = (
        f"{function}: target: expected class indices in [0, {classes}) or ignore_index "
        f"({ignore_index})"
    )
    if target.device.type != "cpu":
        torch._assert_async(~bad.any(), message)
    elif bad.any():
        raise IndexError(f"{message}, got {target[bad][0]}")


# --- Student-t sampling ---------------------------------------------------------------------------

_WORD = 0xFFFFFFFF  # 32 bits

# The polynomials below reach 1e-16 up to an argument of _SMALL, those of log1p up to _SMALL_LOG1P,
# those in 2 / df from _LARGE_DF on.
_SMALL = 0.1
_SMALL_LOG1P = 0.01
_LARGE_DF = 40.0

# log(expm1(x) / x) and 1 - x / (1 - exp(-x)): of the Bernoulli numbers.
_LOG_EXPM1_RATIO = (0.0, 1 / 2, 1 / 24, 0.0, -1 / 2880, 0.0, 1 / 181440, 0.0, -1 / 9676800)
_LOG_T_SLOPE = (0.0, -1 / 2, -1 / 12, 0.0, 1 / 720, 0.0, -1 / 30240, 0.0, 1 / 1209600)
# log1p(y) / y and (log1p(y) - y / (1 + y)) / y^2.
_LOG1P_RATIO = tuple((-1) ** k / (k + 1) for k in range(9))
_LOG1P_REST = tuple((-1) ** k * (k + 1) / (k + 2) for k in range(9))
# log Z and the entropy H of Student's t less those of the normal distribution, in j = 2 / df: from
# log Gamma(a + 1/2) - log Gamma(a) - log(a) / 2 in 1 / a, and from its derivative.
_LOG_Z = (0.0, 1 / 8, 0.0, -1 / 192, 0.0, 1 / 640, 0.0, -17 / 14336, 0.0, 31 / 18432)
_ENTROPY = (
    0.0,
    1 / 4 + 2 * _LOG_Z[1],
    *((k + 1) * _LOG_Z[k] + 0.5 * (k - 1) * _LOG_Z[k - 1] for k in range(2, 10)),
)


def student_t_rsample_kl(
    df: Tensor | None,
    loc: Tensor,
    scale: Tensor,
    prior_df: Tensor | None,
    seed: Tensor,
    rows: Tensor | None,
    num_samples: int | None,
    parameterization: str,
    kl: str,
    kl_mean: bool,
    return_z: bool,
) -> tuple[Tensor, Tensor]:
    """Samples of Student's t, and the Kullback-Leibler divergence from the prior t(0, 1, prior_df).

    With u, v of :func:`uniforms`, for every element and sample::

        t  = sqrt(df * expm1(-2 log(u) / df)) * cos(2 pi v),    z = loc + sigma * t
        kl = log q(z) - log p(z) = -log(sigma) + log Z(prior_df) - log Z(df)
             - (df + 1) / 2 * log1p(t^2 / df) + (prior_df + 1) / 2 * log1p(z^2 / prior_df)
        log Z(df) = lgamma(df / 2) - lgamma((df + 1) / 2) + log(df * pi) / 2

    where ``parameterization`` tells what ``scale`` is of sigma: ``"scale"``, ``"log_scale"`` or
    ``"logvar"`` (2 log sigma). loc and scale have one shape ``[..., m]``, df and prior_df that too,
    or ``[m]``, or none; without prior_df it is df, without df both are infinite: the normal
    distribution. ``kl`` is::

        "none"              not computed
        "mc"                the above
        "analytic_entropy"  E[log q] instead of log q(z)
        "closed_form"       its expectation, (loc^2 + sigma^2 - 1) / 2 - log(sigma), without df

    A df that is not positive gives NaN. Returns z in the dtype of loc, ``[..., m]`` or
    ``[num_samples, ..., m]`` (empty unless ``return_z``), and kl, summed over the last dimension,
    ``[...]`` or, where samples are counted and it is not their mean (``kl_mean``),
    ``[num_samples, ...]``; in float64 if loc or scale is, else float32.
    """
    dtype = losses_dtype(loc, scale)
    e, cosine = _noise(loc, seed, rows, num_samples, dtype)
    i, mu, sigma, log_sigma = _parameters(df, loc, scale, parameterization)
    t = (e.sqrt() * (0.5 * _log_expm1_ratio(e * i)).exp()) * cosine
    z = mu + sigma * t
    samples = z.to(loc.dtype) if return_z else loc.new_empty(0)
    if kl == "none":
        return samples, loc.new_empty(0, dtype=dtype)

    if kl == "closed_form":
        elements = (0.5 * (mu**2 + (2 * log_sigma).expm1()) - log_sigma).expand_as(z)
    else:
        p = i if prior_df is None else _inverse(prior_df)
        of_q = -_entropy(i) if kl == "analytic_entropy" else -_log_z(i) - _log_kernel(t, i)
        elements = -log_sigma + of_q + _log_z(p) + _log_kernel(z, p)
    divergence = elements.sum(-1)
    if kl_mean and num_samples is not None:
        divergence = divergence.mean(0)
    return samples, divergence.to(dtype)


def student_t_rsample_kl_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    df: Tensor | None,
    loc: Tensor,
    scale: Tensor,
    prior_df: Tensor | None,
    seed: Tensor,
    rows: Tensor | None,
    num_samples: int | None,
    parameterization: str,
    kl: str,
    kl_mean: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of df, loc, scale and prior_df that ``output_mask`` wants; else empty tensors.

    They are pathwise, at fixed u and v; t depends on df by::

        d log|t| / d df = (1 - e / (1 - exp(-e))) / (2 df),    e = -2 log(u) / df

    Without prior_df the gradient of df has the prior's part.
    """
    e, cosine = _noise(loc, seed, rows, num_samples, losses_dtype(loc, scale))
    i, mu, sigma, log_sigma = _parameters(df, loc, scale, parameterization)
    x = e * i
    t = (e.sqrt() * (0.5 * _log_expm1_ratio(x)).exp()) * cosine
    z = mu + sigma * t
    slope = _log_t_slope(x)  # of log|t| in df, times 2 df

    zero = torch.zeros_like(z)
    of_z = zero if grad_z is None else grad_z.double()
    of_log_sigma, of_df, of_prior_df = zero, zero, zero
    if grad_kl is not None and kl != "none":
        grad = grad_kl.double().unsqueeze(-1)
        if kl_mean and num_samples is not None:
            grad = grad / num_samples
        if kl == "closed_form":
            of_mu, of_log_sigma = grad * mu, grad * (2 * log_sigma).expm1()
        else:
            p = i if prior_df is None else _inverse(prior_df)
            of_mu, of_log_sigma = zero, -grad
            of_z = of_z + grad * (1 + p) * z / (1 + p * z**2)
            if kl == "analytic_entropy":
                of_df = -grad * _entropy_slope(i)
            else:
                y = i * t**2
                turned = y / (1 + y) * (slope * (1 + i) - i)
                of_df = -grad * (0.5 * (_log1p_rest(y) + turned) + _log_z_slope(i))
            w = p * z**2
            of_prior_df = grad * (0.5 * (_log1p_rest(w) - p * w / (1 + w)) + _log_z_slope(p))
    else:
        of_mu = zero

    of_mu = of_mu + of_z
    of_log_sigma = of_log_sigma + of_z * sigma * t
    of_df = of_df + of_z * sigma * t * (0.5 * i * slope)
    if prior_df is None:
        of_df = of_df + of_prior_df
    of_scale = {
        "scale": of_log_sigma / sigma,
        "log_scale": of_log_sigma,
        "logvar": 0.5 * of_log_sigma,
    }[parameterization]

    def gradient(of: Tensor | None, derivative: Tensor, wanted: bool) -> Tensor:
        if of is None or not wanted:
            return loc.new_empty(0)
        derivative = derivative.expand_as(z)
        return (
            (derivative if num_samples is None else derivative.sum(0))
            .sum_to_size(of.shape)
            .to(of.dtype)
        )

    tensors, derivatives = (df, loc, scale, prior_df), (of_df, of_mu, of_scale, of_prior_df)
    grad_df, grad_loc, grad_scale, grad_prior_df = map(gradient, tensors, derivatives, output_mask)
    return grad_df, grad_loc, grad_scale, grad_prior_df


def uniforms(
    seed: Tensor, rows: Tensor, columns: int, num_samples: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Two independent uniform numbers, u in (0, 1] and v in [-1/2, 1/2), for every element.

    They are functions of the seed, the sample and the element, ``row * columns + column``: of the
    Philox block ``key = seed, counter = (element // 2 in two words, sample, 0)`` an even element
    has the words 0 and 1, an odd one 2 and 3, as ``u = (word + 1/2) / 2^32`` in the arithmetic of
    float32, so that it has all its digits where it is small, and ``v = word as a signed int32 /
    2^32``; in float64 both are continued by 21 bits of the block whose last counter is 1. ``seed``
    and ``rows`` are int64 of shapes that broadcast.
    Returns float64 ``[..., columns]``, or ``[num_samples, ..., columns]``.
    """
    device = rows.device
    element = rows.unsqueeze(-1) * columns + torch.arange(columns, device=device)
    seed = seed.to(device).unsqueeze(-1)
    sample = torch.zeros((), dtype=torch.int64, device=device)
    if num_samples is not None:
        sample = torch.arange(num_samples, device=device).view(-1, *[1] * element.dim())

    def words(block: int) -> tuple[Tensor, Tensor]:
        last = torch.full((), block, dtype=torch.int64, device=device)
        counter = ((element >> 1) & _WORD, (element >> 33) & (_WORD >> 1), sample, last)
        a, b, c, d = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))
        odd = (element & 1) == 1
        return torch.where(odd, c, a), torch.where(odd, d, b)

    of_u, of_v = words(0)
    v = (of_v - ((of_v >> 31) << 32)).double()
    if dtype == torch.float64:
        more_of_u, more_of_v = words(1)
        u = of_u.double() + ((more_of_u >> 11).double() + 0.5) / 2**21
        v = v + (more_of_v >> 11).double() / 2**21
    else:
        u = (of_u.float() + 0.5).double()
    return u / 2**32, v / 2**32


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: the four words of a block, in int64 tensors, from four of a counter and two of
    a key. J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        of_a, of_c = a * 0xD2511F53, c * 0xCD9E8D57  # modulo 2^64
        a, b, c, d = (
            ((of_c >> 32) & _WORD) ^ b ^ k0,
            of_c & _WORD,
            ((of_a >> 32) & _WORD) ^ d ^ k1,
            of_a & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return a, b, c, d


def student_t_noise(
    loc: Tensor, seed: Tensor, rows: Tensor | None, num_samples: int | None
) -> tuple[Tensor, Tensor]:
    """-2 log(u) and cos(2 pi v) of :func:`uniforms`, of the dtype of loc, float32 or float64."""
    energy, cosine = _noise(loc, seed, rows, num_samples, loc.dtype)
    return energy.to(loc.dtype), cosine.to(loc.dtype)


def _noise(
    loc: Tensor, seed: Tensor, rows: Tensor | None, num_samples: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """-2 log(u) and cos(2 pi v)."""
    leading = loc.shape[:-1]
    if rows is None:
        rows = torch.arange(math.prod(leading), device=loc.device).reshape(leading)
    u, v = uniforms(seed, rows, loc.shape[-1], num_samples, dtype)
    return -2 * u.log(), (0.5 * math.pi * (1 - 4 * v.abs())).sin()  # exact where it is small


def _parameters(
    df: Tensor | None, loc: Tensor, scale: Tensor, parameterization: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1 / df, loc, sigma and log(sigma)."""
    mu, s = loc.double(), scale.double()
    i = torch.zeros_like(mu) if df is None else _inverse(df)
    if parameterization == "scale":
        return i, mu, s, s.log()
    log_sigma = 0.5 * s if parameterization == "logvar" else s
    return i, mu, log_sigma.exp(), log_sigma


def _inverse(df: Tensor) -> Tensor:
    """1 / df, by which all formulas reach an infinite df; NaN where df is not positive."""
    return torch.where(df > 0, df, math.nan).double().reciprocal()


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    value = torch.zeros_like(x)
    for coefficient in reversed(coefficients):
        value = value * x + coefficient
    return value


def _derivative(coefficients: Sequence[float]) -> list[float]:
    return [k * coefficient for k, coefficient in enumerate(coefficients)][1:]


def _log_expm1_ratio(x: Tensor) -> Tensor:
    """log(expm1(x) / x)"""
    near, far = x.clamp(max=_SMALL), x.clamp(min=_SMALL)
    exact = far + (-(-far).exp()).log1p() - far.log()
    return torch.where(x < _SMALL, _polynomial(_LOG_EXPM1_RATIO, near), exact)


def _log_t_slope(x: Tensor) -> Tensor:
    """1 - x / (1 - exp(-x))"""
    near, far = x.clamp(max=_SMALL), x.clamp(min=_SMALL)
    return torch.where(x < _SMALL, _polynomial(_LOG_T_SLOPE, near), 1 + far / (-far).expm1())


def _log_kernel(t: Tensor, i: Tensor) -> Tensor:
    """(df + 1) / 2 * log1p(t^2 / df)"""
    square = t**2
    y = torch.where(i == 0, 0.0, i * square)  # also where t is infinite
    small = y < _SMALL_LOG1P
    ratio = _polynomial(_LOG1P_RATIO, y.clamp(max=_SMALL_LOG1P)) * square
    return 0.5 * (1 + i) * torch.where(small, ratio, y.log1p() / torch.where(small, 1.0, i))


def _log1p_rest(y: Tensor) -> Tensor:
    """log1p(y) - y / (1 + y)"""
    near = y.clamp(max=_SMALL_LOG1P)
    return torch.where(
        y < _SMALL_LOG1P, _polynomial(_LOG1P_REST, near) * near**2, y.log1p() - y / (1 + y)
    )


def _by_df(i: Tensor, series: Sequence[float], exact: Callable[[Tensor], Tensor]) -> Tensor:
    """The series in 2 / df where that is small, else the function of df / 2: differences of
    lgamma and its derivatives lose their digits where df is large.
    """
    large = ~(i > 1 / _LARGE_DF)
    j = torch.where(large, 2 * i, 0.0)
    return torch.where(large, _polynomial(series, j), exact(0.5 / torch.where(large, 1.0, i)))


def _log_z(i: Tensor) -> Tensor:
    normal = 0.5 * math.log(2 * math.pi)
    return _by_df(
        i,
        (normal, *_LOG_Z[1:]),
        lambda a: a.lgamma() - (a + 0.5).lgamma() + 0.5 * (2 * math.pi * a).log(),
    )


def _log_z_slope(i: Tensor) -> Tensor:
    """The derivative of log Z in df."""
    return (
        -2
        * i**2
        * _by_df(
            i,
            _derivative(_LOG_Z),
            lambda a: a**2 * ((a + 0.5).digamma() - a.digamma()) - 0.5 * a,
        )
    )


def _entropy(i: Tensor) -> Tensor:
    """Of Student's t: -E[log q] at sigma = 1."""
    normal = 0.5 * (1 + math.log(2 * math.pi))

    def exact(a: Tensor) -> Tensor:
        log_z = a.lgamma() - (a + 0.5).lgamma() + 0.5 * (2 * math.pi * a).log()
        return (a + 0.5) * ((a + 0.5).digamma() - a.digamma()) + log_z

    return _by_df(i, (normal, *_ENTROPY[1:]), exact)


def _entropy_slope(i: Tensor) -> Tensor:
    """The derivative of the entropy in df."""

    def exact(a: Tensor) -> Tensor:
        # the trigamma function; torch.polygamma(1, a) has but 10 digits
        step: Tensor = torch.special.zeta(2.0, a + 0.5) - torch.special.zeta(2.0, a)
        return -(a**2) * (a + 0.5) * step - 0.5 * a

    return -2 * i**2 * _by_df(i, _derivative(_ENTROPY), exact)
