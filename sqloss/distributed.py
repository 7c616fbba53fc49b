r"""The superquantile of a batch that is spread over the processes of torch.distributed.

The tail of a distributed batch is not made of the tails of its parts: the mean of the ranks' own
superquantiles is too low, and gives no gradient to a part of the true tail (docs/distributed.md).
Here the tail is that of all losses together, exactly, without gathering them: the ranks add up
histograms of the losses' bits, a digit at a time from the leading one, and with each digit all
know that of the threshold. Everything that is added up between ranks is an integer, so that the
result does not depend on an order, or on which rank has which losses.
"""

import contextlib
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sqloss._checks import DTYPES, resolve_tail_fraction
from sqloss._ops import distributed as _op
from sqloss._ops.superquantile import out_of_autocast
from sqloss.superquantile import checked_arguments
from sqloss.tail import LossFunction, Selection, Tail, backward_of_tail, loss_of_tail

GRAD_REDUCTIONS = ("mean", "sum")
FUNCTIONS = ("cvar", "tail_indices", "tail_loss", "tail_backward")  # by which ranks compare theirs


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

    There are three all-reduces of up to 2,066 int64 for losses of float32, two for float16 and
    bfloat16, six for float64, and with weights one more, whose histograms are three times as long;
    none in backward. Tensors of a device stay on it, and the host waits for nothing. Under
    torch.compile this breaks the graph; forward mode and torch.func are not implemented.

    The threshold is bit for bit that of one process with all losses (with weights: unless sums of
    them are within rounding of k), and so is, up to the rounding of that process, the value. It is
    the same bits however the losses are spread over ranks: each loss above the threshold counts to
    2^-84 of the largest, and these numbers are added up as integers, exactly.

    Raises:
        TypeError, ValueError: as :func:`sqloss.cvar`, on the rank with that argument alone: the
            others then wait until the group's time-out.
        ValueError: torch.distributed without this rank in the group; on every rank: ``alpha``,
            dtype, ``grad_reduction`` or the presence of weights differ between ranks, no losses on
            any rank or more than 2^34 on all, or weights that are negative, not finite or sum to 0.
            (On devices other than the CPU these last ones are assertions of the device.)
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
    call = _call(function, group, alpha, tail_fraction, fraction, grad_reduction)
    losses = out_of_autocast(losses)
    value, threshold, counts = _select(call, losses, weight, mask)
    return _op.with_gradient(value, losses, weight, mask, threshold, counts)


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
        call = _call(function, group, alpha, tail_fraction, fraction, grad_reduction)
        losses = out_of_autocast(losses)
        tail = _rows_of_tail(call, losses, weight, mask)
        return tail.indices, tail.weights.to(losses.dtype)


def tail_loss(
    fn: LossFunction,
    *tensors: Tensor,
    alpha: float | None = None,
    tail_fraction: float | None = None,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    grad_reduction: str = "mean",
    check: bool | None = None,
) -> Tensor:
    r"""The superquantile of all ranks' losses, with a graph for this rank's rows of its tail alone.

    What :func:`sqloss.tail_loss` is for one process: with :math:`t^r` the tensors of rank r, the
    value and the gradient of

    .. math::
        \mathrm{cvar}_\alpha(\mathrm{fn}(t^1_1, t^1_2, \dots), \mathrm{fn}(t^2_1, t^2_2, \dots),
        \dots)

    by two passes, whose second takes the rows of :func:`tail_indices`. All ranks of the group must
    call this, with equal ``alpha`` and ``check``, and with gradients enabled on all or none; they
    may have any numbers of rows, also none, in the batch and in the tail. ``fn`` then gets tensors
    of no rows, with a graph in the second pass: so it runs as often on all ranks, and so does
    backward, in which DistributedDataParallel and FSDP reduce.

    Args:
        fn, tensors, alpha, tail_fraction, mask, check: as in :func:`sqloss.tail_loss`.
        group, grad_reduction: as in :func:`cvar`.

    Returns:
        Tensor: as :func:`cvar`, the same bits on all ranks; the gradient is that of the second
        pass. Losses that tie with the value-at-risk share its mass evenly, as in :func:`cvar`.

    How many rows a rank has in the tail, and so how long its second pass takes, depends on the
    losses: batches drawn at random are even, but for sqrt(n). The host waits for the losses. Beside
    the all-reduces of :func:`cvar` there is one of a number after the first pass, and with
    ``check`` two after the second, by which ranks tell each other of errors and of losses that
    differ (then one more). Noise, and what is refused, are as in :func:`sqloss.tail_loss`, for
    modules within DistributedDataParallel too; forward mode and torch.func are not implemented.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`sqloss.tail_loss` and :func:`cvar`.
        RuntimeError: on the other ranks, where ``fn`` raised an error on one of them in the first
            pass or, with ``check``, in the second. (Without, and where ``fn`` runs collectives
            itself, the others wait in theirs until the group's time-out.)

    Example::

        >>> import tempfile, torch, sqloss
        >>> torch.distributed.init_process_group(
        ...     "gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1
        ... )
        >>> model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(10, 3))
        >>> x, y = torch.randn(128, 10), torch.randint(3, (128,))  # of this rank
        >>> def losses(x, y):
        ...     return torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        >>> loss = sqloss.distributed.tail_loss(losses, x, y, alpha=0.8)
        >>> loss.backward()
        >>> torch.distributed.destroy_process_group()
    """
    selection = _of_all_ranks(
        "distributed.tail_loss", alpha, tail_fraction, mask, group, grad_reduction
    )
    return loss_of_tail(selection, fn, tensors, check)


def tail_backward(
    fn: LossFunction,
    *tensors: Tensor,
    alpha: float | None = None,
    tail_fraction: float | None = None,
    mask: Tensor | None = None,
    chunk_size: int,
    gradient: Tensor | float = 1.0,
    group: dist.ProcessGroup | None = None,
    grad_reduction: str = "mean",
    no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
    check: bool | None = None,
) -> Tensor:
    r"""Backward through the superquantile of all ranks' batches of any size, in chunks.

    What :func:`sqloss.tail_backward` is for one process: adds to the ``grad`` of parameters and
    other leaves what ``tail_loss(fn, *tensors, ...).backward(gradient)`` would, with no more than
    ``chunk_size`` rows at once. All ranks run as many chunks as the one that has most, the last of
    them on tensors of no rows, so that collectives in ``fn`` and in backward find each other: the
    gathering of parameters by FSDP, or the reduction of their gradients.

    Args:
        fn, tensors, alpha, tail_fraction, mask, group, grad_reduction, check: as in
            :func:`tail_loss`.
        chunk_size, gradient: as in :func:`sqloss.tail_backward`.
        no_sync: makes the context in which all chunks of the second pass but the last one run: the
            method of that name of DistributedDataParallel, which then reduces gradients once.
            ``None``: it reduces them in each chunk, with the same result.

    Returns:
        Tensor: the value, without a graph; the same bits on all ranks.

    Beside the all-reduces of :func:`tail_loss` there is one of a number before each pass is cut
    into chunks. ``fn`` must not close over tensors that have a graph of their own, as in
    :func:`sqloss.tail_backward`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`tail_loss`; ``chunk_size`` as
            :func:`sqloss.tail_backward`.

    Example::

        >>> import tempfile, torch, sqloss
        >>> torch.distributed.init_process_group(
        ...     "gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1
        ... )
        >>> model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(10, 3))
        >>> x, y = torch.randn(2048, 10), torch.randint(3, (2048,))  # of this rank
        >>> def losses(x, y):
        ...     return torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        >>> loss = sqloss.distributed.tail_backward(
        ...     losses, x, y, alpha=0.8, chunk_size=128, no_sync=model.no_sync
        ... )
        >>> loss.requires_grad, model.module.weight.grad.shape
        (False, torch.Size([3, 10]))
        >>> torch.distributed.destroy_process_group()
    """
    selection = _of_all_ranks(
        "distributed.tail_backward", alpha, tail_fraction, mask, group, grad_reduction
    )
    return backward_of_tail(
        selection, fn, tensors, chunk_size, gradient, check, no_sync or contextlib.nullcontext
    )


def _of_all_ranks(
    function: str,
    alpha: float | None,
    tail_fraction: float | None,
    mask: Tensor | None,
    group: dist.ProcessGroup | None,
    grad_reduction: str,
) -> Selection:
    fraction = resolve_tail_fraction(function, alpha, tail_fraction)
    call = _call(function, group, alpha, tail_fraction, fraction, grad_reduction)

    def select(losses: Tensor) -> Tail:
        _, _, kept, _ = checked_arguments(
            function, losses, None, fraction, None, None, mask, may_be_empty=True
        )
        return _rows_of_tail(call, out_of_autocast(losses), None, kept)

    # Of a device that the group has collectives for, if it can be without a wait for that
    devices = [each.partition(":")[0] for each in dist.get_backend_config(group).split(",")]
    device = "cpu" if "cpu" in devices else devices[0]

    def most(number: int) -> int:
        numbers = torch.tensor([number], device=device)
        _all_reduce(call, numbers, dist.ReduceOp.MAX)
        return int(numbers.item())

    @contextlib.contextmanager
    def together() -> Iterator[None]:
        try:
            yield
        except Exception:
            most(dist.get_rank(group) + 1)
            raise
        failed = most(0)
        if failed:
            raise RuntimeError(
                f"{function}: fn: expected no error on any rank, got one on rank {failed - 1}"
            )

    return Selection(function, mask, select, most, together, of_ranks=True)


def _rows_of_tail(
    call: "_Call", losses: Tensor, weight: Tensor | None, mask: Tensor | None
) -> Tail:
    """This rank's rows of the tail of all ranks."""
    value, threshold, counts = _select(call, losses, weight, mask)
    # In double: in half precision the smallest would be 0
    weights = _op.tail_weights(losses.double(), weight, mask, threshold.double(), counts)
    indices = weights.nonzero().squeeze(1)
    return Tail(value, indices, weights[indices])


class _Call(NamedTuple):
    """What all ranks of a group must agree on, and with whom."""

    function: str
    group: dist.ProcessGroup | None
    ranks: int
    given: str  # alpha=0.8
    fraction: float
    grad_reduction: str


# --- what ranks tell each other -------------------------------------------------------------------


def _call(
    function: str,
    group: dist.ProcessGroup | None,
    alpha: float | None,
    tail_fraction: float | None,
    fraction: float,
    grad_reduction: str,
) -> _Call:
    if grad_reduction not in GRAD_REDUCTIONS:
        raise ValueError(
            f"{function}: grad_reduction: expected one of {GRAD_REDUCTIONS}, got {grad_reduction!r}"
        )
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"{function}: group: expected torch.distributed to be initialised "
            f"(torch.distributed.init_process_group), but it is not"
        )
    ranks = dist.get_world_size(group)
    if ranks < 0:
        raise ValueError(f"{function}: group: expected one of which this rank is, got {group}")
    given = f"tail_fraction={tail_fraction}" if alpha is None else f"alpha={alpha}"
    return _Call(function, group, ranks, given, fraction, grad_reduction)


def _select(
    call: _Call, losses: Tensor, weight: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, threshold and counts (of csrc/superquantile/distributed.h) of all ranks' losses."""
    bits = struct.unpack("4H", struct.pack("d", call.fraction))
    config = (
        FUNCTIONS.index(call.function.removeprefix("distributed.")),
        DTYPES.index(losses.dtype),
        int(weight is not None),
        GRAD_REDUCTIONS.index(call.grad_reduction),
        *bits,
    )

    def all_reduce(sums: Tensor) -> None:
        _all_reduce(call, sums, dist.ReduceOp.SUM)

    def check(equal: Tensor) -> None:
        if equal.device.type != "cpu":
            for i, what in enumerate(_COMPARED):
                agree = equal[i:].all() if what == _COMPARED[-1] else equal[i]
                torch._assert_async(agree, f"{call.function}: {what}: {_SAME}")
        elif not equal.all():
            raise _disagreement(call, losses, weight)

    scale = call.ranks if call.grad_reduction == "mean" else 1
    return _op.distributed_superquantile(
        losses,
        call.fraction,
        weight,
        mask,
        config,
        call.ranks,
        scale,
        all_reduce,
        check,
        call.function,
    )


def _all_reduce(call: _Call, tensor: Tensor, operation: "dist.ReduceOp.RedOpType") -> None:
    try:
        dist.all_reduce(tensor, op=operation, group=call.group)
    except RuntimeError as error:
        raise type(error)(
            f"{call.function}: expected all {call.ranks} ranks of the group to call it, but "
            f"torch.distributed.all_reduce failed on rank {dist.get_rank(call.group)}: {error}"
        ) from error


_COMPARED = "the function", "losses", "weight", "grad_reduction", "alpha, tail_fraction"
_SAME = "expected the same on all ranks"


def _disagreement(call: _Call, losses: Tensor, weight: Tensor | None) -> ValueError:
    """What the ranks do not agree about, once all know that there is something."""
    given = (
        call.function,
        str(losses.dtype),
        "none" if weight is None else "a tensor",
        call.grad_reduction,
        call.given,
    )
    own = dict(zip(_COMPARED, given, strict=True))
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
