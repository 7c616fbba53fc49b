r"""The superquantile of a batch that is spread over the processes of torch.distributed.

The tail of a distributed batch is not made of the tails of its parts: the mean of the ranks' own
superquantiles is too low, and gives no gradient to a part of the true tail (docs/distributed.md).
Here the tail is that of all losses together, exactly, without gathering them: the ranks add up
histograms of the losses' bits, a digit at a time from the leading one, and with each digit all
know that of the threshold. Everything that is added up between ranks is an integer, so that the
result does not depend on an order, or on which rank has which losses.
"""

import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sqloss.reference import ALPHA_ROUNDING, SUM_ROUNDING, require
from sqloss.superquantile import checked_arguments

GRAD_REDUCTIONS = ("mean", "sum")


def cvar(
    losses: Tensor,
    alpha: float | None = None,
    *,
    tail_fraction: float | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    grad_reduction: str = "mean",
) -> Tensor:
    r"""The superquantile of the losses of all ranks together, on every rank.

    With :math:`l` the concatenation of the ranks' losses, the value is that of :func:`sqloss.cvar`,

    .. math::
        \mathrm{cvar}_\alpha(l) = \frac{1}{k} \Big( \sum_{i \le \lfloor k \rfloor} l_{(i)}
            + (k - \lfloor k \rfloor)\, l_{(\lfloor k \rfloor + 1)} \Big),
        \qquad k = (1 - \alpha) \sum_r n_r,

    and the gradient that of the rank's own losses in it. All ranks of the group must call this,
    with equal ``alpha``; they may have any numbers of losses, also none.

    Args:
        losses: this rank's losses, of any shape; the same dtype on all ranks.
        alpha, tail_fraction: as in :func:`sqloss.cvar`.
        weight, mask: of this rank's losses, as in :func:`sqloss.cvar`. All ranks give a weight, or
            none.
        group: the ranks that take part; ``None``: all.
        grad_reduction: what happens to the gradients of the ranks' parameters afterwards:
            ``"mean"`` if they are averaged, as DistributedDataParallel does, ``"sum"`` if they are
            added up. Either way they become those of one process with all losses: with
            ``"mean"``, the gradient of ``losses`` carries a factor of the number of ranks.

    Returns:
        Tensor: as :func:`sqloss.cvar`; the same bits on all ranks.

    There are three all-reduces of up to 2,065 int64 for losses of float32, two for float16 and
    bfloat16, six for float64, and with weights one more, whose histograms are three times as long;
    none in backward. Tensors of a device stay on it, and the host waits for nothing. Under
    torch.compile this breaks the graph.

    The threshold is bit for bit that of one process with all losses (with weights: unless sums of
    them are within rounding of k), and so is, up to the rounding of that process, the value. It is
    the same bits however the losses are spread over ranks: each loss above the threshold counts to
    2^-84 of the largest, and these numbers are added up as integers, exactly (up to 2^34 losses).

    Raises:
        TypeError, ValueError: as :func:`sqloss.cvar`, on the rank with that argument alone: the
            others then wait until the group's time-out.
        ValueError: torch.distributed without this rank in the group; on every rank: ``alpha``,
            dtype or the presence of weights differ between ranks, no losses on any rank, or
            weights that are negative, not finite or sum to 0. (On devices other than the CPU these
            last ones are assertions of the device.)
        RuntimeError: that of torch.distributed, with the name of this function, where a rank is
            gone, or later than the group's time-out.

    Example::

        >>> import tempfile, torch, sqloss
        >>> torch.distributed.init_process_group(
        ...     "gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1
        ... )
        >>> losses = torch.tensor([0., 1., 4., 9., 16., 25., 36., 49., 64., 81.])
        >>> sqloss.distributed.cvar(losses, alpha=0.75)  # of this rank and all others
        tensor(67.8000)
        >>> torch.distributed.destroy_process_group()
    """
    function = "distributed.cvar"
    fraction, weight, mask, _ = checked_arguments(
        function, losses, alpha, tail_fraction, None, weight, mask, may_be_empty=True
    )
    call = _call(function, group, alpha, tail_fraction, fraction)
    scale = _scale(call, grad_reduction)
    value: Tensor = _CVaR.apply(_out_of_autocast(losses), weight, mask, call, scale)
    return value


def tail_indices(
    losses: Tensor,
    alpha: float | None = None,
    *,
    tail_fraction: float | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    grad_reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    r"""Which of this rank's losses are in the tail of all ranks' losses, and how much each counts.

    For a second forward pass with a graph on those rows alone: the gradient of
    ``(weights * losses[indices]).sum()`` is that of :func:`cvar`, whose arguments, collectives and
    errors these are. Without ``"mean"``, the sum over all ranks of ``(weights *
    losses[indices]).sum()`` is the superquantile; with it, their mean is.

    Args:
        losses: ``[N]``, this rank's losses.
        alpha, tail_fraction, weight, mask, group, grad_reduction: as in :func:`cvar`.

    Returns:
        (Tensor, Tensor): indices, int64, ascending: of all losses at or above the global
        value-at-risk, of which this rank may have any number, also none; weights, of the dtype of
        losses (float32 under autocast). They carry no gradient.

    The size is not known before, so that the host waits for the device. Where losses tie with the
    value-at-risk all of them are taken, with equal shares, on whichever rank, as
    :func:`sqloss.tail_weights` does.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`cvar`.
        ValueError: ``losses`` that are not ``[N]``.

    Example::

        >>> import tempfile, torch, sqloss
        >>> torch.distributed.init_process_group(
        ...     "gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1
        ... )
        >>> losses = torch.tensor([0., 81., 4., 9., 16., 25., 36., 49., 64., 1.])
        >>> sqloss.distributed.tail_indices(losses, alpha=0.75)
        (tensor([1, 7, 8]), tensor([0.4000, 0.2000, 0.4000]))
        >>> torch.distributed.destroy_process_group()
    """
    function = "distributed.tail_indices"
    with torch.no_grad():
        fraction, weight, mask, _ = checked_arguments(
            function, losses, alpha, tail_fraction, None, weight, mask, may_be_empty=True
        )
        if losses.dim() != 1:
            raise ValueError(f"{function}: losses: expected shape [N], got {tuple(losses.shape)}")
        call = _call(function, group, alpha, tail_fraction, fraction)
        scale = _scale(call, grad_reduction)
        losses = _out_of_autocast(losses)
        tail = _select(call, losses, weight, mask)
        in_double = tail._replace(threshold=tail.threshold.double())
        one = torch.ones_like(in_double.threshold)
        weights = _gradient(one, losses.double(), weight, mask, in_double)
        indices = weights.nonzero().squeeze(1)
        return indices, (weights[indices] * scale).to(losses.dtype)


class _Call(NamedTuple):
    """What all ranks of a group must agree on, and with whom."""

    function: str
    group: dist.ProcessGroup | None
    rank: int
    ranks: int
    given: str  # alpha=0.8
    fraction: float


class _Tail(NamedTuple):
    value: Tensor
    threshold: Tensor
    counts: Tensor  # of csrc/superquantile/superquantile.h


class _CVaR(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        losses: Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        call: _Call,
        scale: int,
    ) -> Tensor:
        tail = _select(call, losses, weight, mask)
        ctx.save_for_backward(losses, weight, mask, *tail)
        ctx.scale = scale
        return tail.value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        losses, weight, mask, *tail = ctx.saved_tensors
        gradient = _gradient(grad, losses, weight, mask, _Tail(*tail))
        # Not of grad: a scaler's may be as large as the dtype allows
        return gradient * ctx.scale, None, None, None, None


def _gradient(
    grad: Tensor, losses: Tensor, weight: Tensor | None, mask: Tensor | None, tail: _Tail
) -> Tensor:
    """The gradient of this rank's losses from that of the value."""
    gradient: Tensor = torch.ops.sqloss.superquantile_backward(
        grad, None, losses, weight, mask, tail.threshold, tail.counts, (), False
    )
    return gradient


def _scale(call: _Call, grad_reduction: str) -> int:
    if grad_reduction not in GRAD_REDUCTIONS:
        raise ValueError(
            f"{call.function}: grad_reduction: expected one of {GRAD_REDUCTIONS}, got "
            f"{grad_reduction!r}"
        )
    return call.ranks if grad_reduction == "mean" else 1


def _out_of_autocast(losses: Tensor) -> Tensor:
    """As the operator's autocast does."""
    half = losses.dtype in (torch.float16, torch.bfloat16)
    return losses.float() if half and torch.is_autocast_enabled(losses.device.type) else losses


# --- what ranks tell each other -------------------------------------------------------------------


def _call(
    function: str,
    group: dist.ProcessGroup | None,
    alpha: float | None,
    tail_fraction: float | None,
    fraction: float,
) -> _Call:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"{function}: group: expected torch.distributed to be initialised "
            f"(torch.distributed.init_process_group), but it is not"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{function}: group: expected one of which this rank is, got {group}")
    given = f"tail_fraction={tail_fraction}" if alpha is None else f"alpha={alpha}"
    return _Call(function, group, rank, dist.get_world_size(group), given, fraction)


def _all_reduce(call: _Call, *parts: Tensor) -> list[Tensor]:
    """The sums of int64 tensors over the ranks."""
    payload = torch.cat([part.reshape(-1) for part in parts])
    try:
        dist.all_reduce(payload, group=call.group)
    except RuntimeError as error:
        raise type(error)(
            f"{call.function}: expected all {call.ranks} ranks of the group to call it, but "
            f"torch.distributed.all_reduce failed on rank {call.rank}: {error}"
        ) from error
    sums = payload.split([part.numel() for part in parts])
    return [part.view_as(like) for part, like in zip(sums, parts, strict=True)]


def _agreeing(
    call: _Call, losses: Tensor, weight: Tensor | None, *parts: Tensor
) -> Sequence[Tensor]:
    """The sums over the ranks, if these agree about the call.

    Each number that must be equal comes with its square: if the sums are what they are where all
    are equal, their variance is 0.
    """
    bits = struct.unpack("4H", struct.pack("d", call.fraction))
    numbers = (
        sum(call.function.encode()),
        list(_FORMATS).index(losses.dtype),
        int(weight is not None),
        *bits,
    )
    own = torch.tensor([*numbers, *(number * number for number in numbers)])
    own = own.to(losses.device, non_blocking=True)
    sums, *others = _all_reduce(call, own, *parts)
    equal = (sums == own * call.ranks).view(2, -1).all(0)
    if losses.device.type != "cpu":
        for i, what in enumerate(("the function", "losses", "weight")):
            torch._assert_async(equal[i], f"{call.function}: {what}: {_SAME}")
        torch._assert_async(equal[3:].all(), f"{call.function}: alpha, tail_fraction: {_SAME}")
    elif not equal.all():
        raise _disagreement(call, losses, weight)
    return others


_SAME = "expected the same on all ranks"


def _disagreement(call: _Call, losses: Tensor, weight: Tensor | None) -> ValueError:
    """What the ranks do not agree about, once all know that there is something."""
    own = {
        "the function": call.function,
        "losses": str(losses.dtype),
        "weight": "none" if weight is None else "a tensor",
        "alpha, tail_fraction": call.given,
    }
    of_ranks: list[Any] = [None] * call.ranks
    dist.all_gather_object(of_ranks, own, group=call.group)
    differences = []
    for what in own:
        ranks: dict[str, list[int]] = {}
        for rank, of_rank in enumerate(of_ranks):
            ranks.setdefault(of_rank[what], []).append(rank)
        if len(ranks) > 1:
            got = [f"{value} on rank {_some(those)}" for value, those in ranks.items()]
            differences.append(f"{what}: {_SAME}, got {', '.join(got)}")
    return ValueError(f"{call.function}: {'; '.join(differences)}")


def _some(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:3])) + (f" and {len(ranks) - 3} more" if ranks[3:] else "")


# --- the tail, digit by digit ---------------------------------------------------------------------

# A loss is a key: an integer of as many bits, in the order of the losses. Each round finds one
# digit of the threshold's key. The first digit has as many bits whatever the dtype, so that ranks
# that disagree about it can tell each other so.
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
# What a tail has to weigh, however small it is, in units of which the total is at least half of one
_SOME = torch.finfo(torch.float64).tiny


def _select(call: _Call, losses: Tensor, weight: Tensor | None, mask: Tensor | None) -> _Tail:
    """The tail of all ranks' losses."""
    x = losses.detach().reshape(-1)
    keys = _to_keys(x)
    # How much each loss counts: [1, n] integers, or [_LIMBS, n] in units of 2^unit
    w, unit = None, None
    rounding: Tensor | float = ALPHA_ROUNDING
    if weight is None:
        counts = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.reshape(-1)
        mass = counts.long().unsqueeze(0)
    else:
        w, unit, rounding = _scaled_weights(call, losses, weight, mask)
        counts, mass = w > 0, _to_limbs(w)

    # Of one element each, like all that follows: the threshold's digits that are known, as an
    # integer, and the mass above all keys that begin with them
    first, *middle, last = _FORMATS[x.dtype][1]
    shift = 8 * keys.element_size() - first
    half = 1 << first >> 1
    histogram = _histogram((keys >> shift).long() + half, mass, first)
    if weight is None:
        (histogram,) = _agreeing(call, losses, weight, histogram)
    else:
        (histogram,) = _all_reduce(call, histogram)
    total = _real(histogram.sum(1, keepdim=True))
    require(
        (total > 0).all(),
        f"{call.function}: losses: expected one that counts on any of the ranks, got none",
    )
    target = (call.fraction * total - total * rounding).clamp(min=_SOME)
    digit, above, at = _descend(histogram, torch.zeros_like(histogram[:, :1]), target)
    prefix = digit - half
    exponent = _exponent(x.dtype, x.device, histogram, digit)

    for width in middle:
        shift -= width
        (histogram,) = _all_reduce(call, _histogram_within(keys, mass, prefix, shift, width))
        digit, above, at = _descend(histogram, above, target)
        prefix = (prefix << width) | digit

    # Before the last round only losses of its histogram are not known to be above the threshold or
    # not, and its bins are keys
    shift -= last
    assert shift == 0
    is_above = (keys >> last > prefix) & counts & x.isfinite()
    scaled = torch.where(is_above, _times_power_of_two(x.double(), -exponent), 0.0)
    sums = _to_limbs(scaled if w is None else scaled * w).sum(1)
    special = torch.stack([x == torch.inf, x.isnan()]).logical_and(counts).sum(1)
    histogram, sums, special = _all_reduce(
        call, _histogram_within(keys, mass, prefix, shift, last), sums, special
    )
    digit, above, at = _descend(histogram, above, target)

    bins = torch.arange(1 << last, device=x.device)
    values = _from_keys((prefix << last) | bins, x.dtype)
    threshold = values.index_select(0, digit)
    is_above = (bins > digit) & values.isfinite()
    scaled = torch.where(is_above, _times_power_of_two(values.double(), -exponent), 0.0)
    sums = sums + _to_limbs(scaled * _real(histogram)).sum(1)

    above, at = _real(above), _real(at)
    k = torch.minimum(torch.maximum(call.fraction * total, above), above + at)
    rest = k - above
    at_threshold = rest * _times_power_of_two(threshold.double(), -exponent)
    value = (_real(sums) + torch.where(rest > 0, at_threshold, 0.0)) / k
    value = _times_power_of_two(value, exponent).to(x.dtype)
    value = torch.where(above == 0, threshold, value)  # the maximum, exactly
    infinite, nan = special > 0
    value = torch.where(infinite & (threshold < torch.inf), torch.inf, value)  # -inf at it or not
    value = torch.where(nan, torch.nan, value)
    masses = torch.cat([above, at, k])
    if unit is not None:
        masses = _times_power_of_two(masses, unit)
    return _Tail(value.squeeze(), threshold.squeeze(), masses)


def _scaled_weights(
    call: _Call, losses: Tensor, weight: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights below 1 in double, 2^unit of them being 1, and what sums of them may be off by.

    A round of its own: the unit is that of the largest weight of all ranks.
    """
    w = weight.detach().reshape(-1).double()
    if mask is not None:
        w = torch.where(mask.reshape(-1), w, 0.0)
    valid = (w >= 0) & w.isfinite()
    w = torch.where(valid, w, 0.0)
    lowest = 1 - (1 << _FIRST >> 1)  # of the exponents that have a bin; lower ones share it
    exponents = torch.frexp(w).exponent.long().clamp(min=lowest)
    histogram = _histogram(exponents - lowest, (w > 0).long().unsqueeze(0), _FIRST)
    n = torch.ones_like(w, dtype=torch.int64).sum()
    histogram, invalid, n = _agreeing(call, losses, weight, histogram, (~valid).sum(), n)
    require(invalid == 0, f"{call.function}: weight: expected finite values >= 0")
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
    return (high.double() + (middle.double() + low.double() * scale) * scale) * scale


def _times_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """x * 2^exponent for exponents up to 2,000, where 2^exponent may be out of range."""
    half = exponent >> 1
    return x * _power_of_two(half) * _power_of_two(exponent - half)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in double; functions of torch may round it."""
    return ((exponent + 1023) << 52).view(torch.float64)
