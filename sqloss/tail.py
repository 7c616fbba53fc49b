"""Backward through the tail alone: which samples it holds, and their losses with a graph.

A step on the superquantile that computes all losses with a graph multiplies most of them by zero in
backward. Where the loss of a sample does not depend on the other samples, the same gradient comes
from the samples of the tail: score all of them without a graph, select, then run forward and
backward on the rows of the tail.
"""

import contextlib
import functools
import inspect
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import (
    CellType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import _global_forward_pre_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sqloss._checks import DTYPES, check_floating, check_tensor, resolve_tail_fraction
from sqloss._ops import superquantile as _op
from sqloss.reference import ALPHA_ROUNDING
from sqloss.superquantile import checked_arguments, checked_mask

LossFunction = Callable[..., Tensor]


class Tail(NamedTuple):
    """The rows of this process in the tail; of its weights, the superquantile's gradient."""

    value: Tensor  # the superquantile
    indices: Tensor
    weights: Tensor  # in float64


class Selection(NamedTuple):
    """How the two passes find the tail: among this process's losses, or those of all ranks."""

    function: str
    mask: Tensor | None  # of the losses [N] of this process
    select: Callable[[Tensor], Tail]  # from these losses
    most: Callable[[int], int]  # of the numbers of all ranks
    together: Callable[[], AbstractContextManager[Any]]  # an error inside is one on all ranks
    of_ranks: bool  # so that this one may have no rows, and derivatives are sums over ranks


def tail_indices(
    losses: Tensor,
    alpha: float | None = None,
    *,
    tail_fraction: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Which losses make the tail, and how much each counts in it.

    With :math:`k = (1 - \alpha)\, n`, a real number, the tail of ``n`` losses is its
    :math:`\lceil k \rceil` worst, and for their ``indices`` and ``weights``

    .. math::
        \sum_j \mathrm{weights}_j \; l_{\mathrm{indices}_j} = \mathrm{cvar}_\alpha(l):

    ``1/k`` above the value-at-risk, and at it the remaining mass. The size of the results is known
    from ``n`` and ``alpha`` alone, so nothing waits for a device, and ``torch.compile`` and CUDA
    graphs take it.

    Where more losses tie with the value-at-risk than belong to the tail, those of the lowest
    indices are taken and share the remaining mass evenly. That is a subgradient of :func:`cvar`
    too, and the only one there is without ties; :func:`tail_weights`, whose size is ``n``, spreads
    the mass over all ties.

    Args:
        losses: ``[N]``, float16, bfloat16, float32 or float64.
        alpha, tail_fraction: as in :func:`cvar`.
        mask: bool, broadcastable to ``losses``; where it is False the loss does not count. The size
            is then still that of ``N`` losses: after the tail comes its first index, with weight 0.

    Returns:
        (Tensor, Tensor): indices, int64, ascending; weights, of the dtype of ``losses`` (float32
        under autocast). They carry no gradient.

    Sample weights are not an argument: with them the number of samples in the tail depends on their
    values. Take ``tail_weights(losses, alpha, weight=weight).nonzero()``.

    NaN, infinities, errors and repeatability are as in :func:`cvar`.

    Raises:
        TypeError, ValueError: as :func:`cvar`.
        ValueError: ``losses`` that are not ``[N]``.

    Example::

        >>> import torch, sqloss
        >>> losses = torch.tensor([0., 81., 4., 9., 16., 25., 36., 49., 64., 1.])
        >>> sqloss.tail_indices(losses, alpha=0.75)
        (tensor([1, 7, 8]), tensor([0.4000, 0.2000, 0.4000]))
    """
    with torch.no_grad():
        fraction, _, mask, _ = checked_arguments(
            "tail_indices", losses, alpha, tail_fraction, None, None, mask
        )
        if losses.dim() != 1:
            raise ValueError(f"tail_indices: losses: expected shape [N], got {tuple(losses.shape)}")
        tail = _select("tail_indices", losses, fraction, mask)
        return tail.indices, tail.weights.to(tail.value.dtype)


def tail_loss(
    fn: LossFunction,
    *tensors: Tensor,
    alpha: float | None = None,
    tail_fraction: float | None = None,
    mask: Tensor | None = None,
    check: bool | None = None,
) -> Tensor:
    r"""The superquantile of ``fn(*tensors)``, computed with a graph for the rows of its tail alone.

    The value and the gradient of

    .. math::
        \mathrm{cvar}_\alpha(\mathrm{fn}(t_1, t_2, \dots)),

    where row i of the result is a function of row i of each tensor. ``fn`` runs twice: without a
    graph on all rows, then with one on the rows of :func:`tail_indices`. If forward costs 1 and
    backward 2, that is :math:`1 + 3 (1 - \alpha)` instead of 3: half of a step on the mean at
    ``alpha=0.8``, and more than a step on all rows below ``alpha=1/3``.

    Use the result like any loss: gradients, of any order, reach the parameters of modules, tensors
    that ``fn`` closes over and ``tensors``. :func:`tail_backward` is for batches that are larger
    than memory.

    Args:
        fn: from tensors of some rows to their losses, ``[rows]``: a module or any other callable.
            What has no rows it may close over.
        tensors: of N rows each (their first dimension), at least one.
        alpha, tail_fraction: as in :func:`cvar`.
        mask: bool ``[N]``; where it is False the row does not count.
        check: whether to compare the losses of the second pass with those of the first; ``None``:
            on the CPU, since elsewhere the host would wait for the device. Losses that differ by
            more than 1 % of the largest (3 % in bfloat16), and by more than rounding explains, are
            an error. Where they differ, what rounding explains is measured: ``fn`` runs three more
            times on these rows, without a graph, on numbers that are moved by a few units in the
            last place, those in between included. So nothing depends on the scale of the losses,
            and a training may converge until its losses are rounding and nothing else.

    Returns:
        Tensor: what :func:`cvar` returns for the losses of the first pass, with the gradient of
        the second pass. Where more rows tie with the value-at-risk than the tail holds, it is the
        subgradient of :func:`tail_indices`. Where gradients are disabled (``torch.no_grad``,
        ``torch.inference_mode``) there is no second pass, and the value has no graph.

    A row must get the same noise in both passes: pass the noise as one of the tensors, or the
    numbers of the rows, from which this package's own samplers draw a row's noise again (see the
    second example). Random numbers from torch's default generators, as dropout takes them, are
    refused, and so are modules that let rows depend on each other: batch norms that use the
    statistics of the batch. These are found by name in the first pass, before they run; what else
    changes a row's loss, such as attention between the rows or a generator of your own, by
    ``check``. Under torch.compile nothing is checked: call the function once without. A module that
    changes its own state in forward does so twice.

    The tensors may be on another device than the losses, such as a batch that waits in the host's
    memory: then choosing rows waits for the losses.

    Raises:
        TypeError: ``fn`` not callable or not returning a tensor, no tensors, and as :func:`cvar`.
        ValueError: tensors of different numbers of rows, losses that are not one per row, a module
            or a function as above, and as :func:`cvar`.

    Example::

        >>> import torch, sqloss
        >>> model = torch.nn.Linear(10, 3)
        >>> x, y = torch.randn(128, 10), torch.randint(3, (128,))
        >>> def losses(x, y):
        ...     return torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        >>> loss = sqloss.tail_loss(losses, x, y, alpha=0.8)  # was: cvar(losses(x, y), alpha=0.8)
        >>> loss.backward()

    Noise by the numbers of the rows::

        >>> seed = sqloss.draw_seed()
        >>> def losses(x, rows):
        ...     z = sqloss.student_t_rsample(5.0, x, 1.0, seed=seed, rows=rows)
        ...     return model(z).square().sum(1)
        >>> loss = sqloss.tail_loss(losses, x, torch.arange(128), alpha=0.8)
        >>> loss.backward()
    """
    selection = _of_this_process("tail_loss", alpha, tail_fraction, mask)
    return loss_of_tail(selection, fn, tensors, check)


def tail_backward(
    fn: LossFunction,
    *tensors: Tensor,
    alpha: float | None = None,
    tail_fraction: float | None = None,
    mask: Tensor | None = None,
    chunk_size: int,
    gradient: Tensor | float = 1.0,
    check: bool | None = None,
) -> Tensor:
    r"""Backward through the superquantile of a batch of any size, in chunks.

    Adds to the ``grad`` of parameters and other leaves what ``tail_loss(fn, *tensors, ...)
    .backward(gradient)`` would, with no more than ``chunk_size`` rows at once: scores all rows
    without a graph, selects once, then runs forward and backward on the rows of the tail, chunk by
    chunk. So the tail is the exact one of a batch of any size, in the memory of ``chunk_size``
    rows, but for the losses, and the gradients of those ``tensors`` that require one. It costs what
    :func:`tail_loss` does, where as many steps on the tails of small batches would train on others:
    the mean of the tails of parts is below that of the whole.

    Args:
        fn, tensors, alpha, tail_fraction, mask, check: as in :func:`tail_loss`.
        chunk_size: the most rows at once.
        gradient: that of the value, as in :meth:`torch.Tensor.backward`, a number or a tensor
            without dimensions. With an AMP gradient scaler: ``scaler.scale(torch.ones(()))``, on
            the device of the losses.

    Returns:
        Tensor: the value, without a graph.

    ``fn`` must not close over tensors that have a graph of their own, which the first chunk's
    backward would free: give them as ``tensors``. Of those, the graph is gone through once. With
    DistributedDataParallel or FSDP use :func:`sqloss.distributed.tail_backward`, whose ranks run as
    many chunks.

    Raises:
        TypeError, ValueError: as :func:`tail_loss`; ``chunk_size`` not an int, or below 1;
            ``gradient`` neither a number nor a tensor without dimensions.
        RuntimeError: within ``torch.inference_mode``; torch's own, where nothing requires a
            gradient.

    Example::

        >>> import torch, sqloss
        >>> model = torch.nn.Linear(10, 3)
        >>> x, y = torch.randn(2048, 10), torch.randint(3, (2048,))
        >>> def losses(x, y):
        ...     return torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        >>> loss = sqloss.tail_backward(losses, x, y, alpha=0.8, chunk_size=128)
        >>> loss.requires_grad, model.weight.grad.shape
        (False, torch.Size([3, 10]))
    """
    selection = _of_this_process("tail_backward", alpha, tail_fraction, mask)
    return backward_of_tail(
        selection, fn, tensors, chunk_size, gradient, check, contextlib.nullcontext
    )


def _of_this_process(
    function: str, alpha: float | None, tail_fraction: float | None, mask: Tensor | None
) -> Selection:
    fraction = resolve_tail_fraction(function, alpha, tail_fraction)

    def select(losses: Tensor) -> Tail:
        _, _, kept, _ = checked_arguments(function, losses, None, fraction, None, None, mask)
        return _select(function, losses, fraction, kept)

    return Selection(
        function, mask, select, lambda number: number, contextlib.nullcontext, of_ranks=False
    )


def _select(function: str, losses: Tensor, fraction: float, mask: Tensor | None) -> Tail:
    """The tail of losses [N], of which there are as many as the mask says."""
    losses = _op.out_of_autocast(losses)
    none_counts = "mask: expected at least one row that counts, got none"
    value, threshold, counts = _op.superquantile(
        losses, fraction, None, mask, (), False, function, none_counts
    )
    above, _, k = counts.unbind()
    n = losses.shape[0]
    size = max(math.ceil(fraction * n - n * ALPHA_ROUNDING), 1)

    nan, threshold_is_nan = losses.isnan(), threshold.isnan()
    at = (losses == threshold) | (nan & threshold_is_nan)
    reached = at | (losses > threshold) | nan
    wanted: Tensor | int = size
    if mask is not None:
        at, reached = at & mask, reached & mask
        kept = mask.sum().double()
        wanted = (fraction * kept - kept * ALPHA_ROUNDING).ceil().clamp(min=1)
    ties = wanted - above  # that belong to the tail
    chosen = reached & ~(at & (at.cumsum(0) > ties))
    indices = torch.nonzero_static(chosen, size=size, fill_value=0).squeeze(1)
    weights = torch.where(at[indices], (k - above) / k / ties, 1 / k)
    if mask is not None:
        is_tail = torch.arange(size, device=losses.device) < wanted
        indices = torch.where(is_tail, indices, indices[0])
        weights = torch.where(is_tail, weights, 0.0)
    return Tail(value, indices, weights)


class _WithGradient(torch.autograd.Function):
    """The value, with the gradient of the weighted sum of the losses."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, losses: Tensor, weights: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _, losses, weights = inputs
        ctx.save_for_backward(weights)
        ctx.save_for_forward(weights)  # of _WithTangent
        ctx.dtypes = losses.dtype, output.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (weights,) = ctx.saved_tensors
        return None, torch.where(weights > 0, grad * weights, 0.0).to(ctx.dtypes[0]), None


class _WithTangent(_WithGradient):
    """The same in forward mode, too, which torch.compile does not take."""

    @staticmethod
    def jvp(ctx: Any, _value: None, losses: Tensor, _weights: None) -> Tensor:
        (weights,) = ctx.saved_tensors
        return torch.where(weights > 0, losses * weights, 0.0).sum().to(ctx.dtypes[1])


# --- the two passes -------------------------------------------------------------------------------


def loss_of_tail(
    selection: Selection, fn: LossFunction, tensors: tuple[Tensor, ...], check: bool | None
) -> Tensor:
    """tail_loss, of the tail that the selection finds."""
    losses, tail = _tail_of(selection, fn, tensors, None)
    if not torch.is_grad_enabled():
        return tail.value
    rows = [_rows(t, tail.indices) for t in tensors]
    again = _losses_again(selection, fn, rows, losses[tail.indices], tail.value, check)
    function = _WithGradient if is_compiling() or selection.of_ranks else _WithTangent
    loss: Tensor = function.apply(tail.value, again, tail.weights)
    return loss


def backward_of_tail(
    selection: Selection,
    fn: LossFunction,
    tensors: tuple[Tensor, ...],
    chunk_size: int,
    gradient: Tensor | float,
    check: bool | None,
    no_sync: Callable[[], AbstractContextManager[Any]],
) -> Tensor:
    """tail_backward, of the tail that the selection finds; the last chunk not under no_sync."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{selection.function}: expected to be called outside of torch.inference_mode, in "
            f"which torch records no graph (torch.no_grad is fine)"
        )
    _check_chunk_size(selection.function, chunk_size)
    _check_gradient(selection.function, gradient)
    losses, (value, indices, weights) = _tail_of(selection, fn, tensors, chunk_size)
    weights = torch.where(weights > 0, weights * gradient, 0.0).to(losses.dtype)
    losses = losses[indices]  # the others make room
    with torch.enable_grad():
        # Once: from each chunk they would get a gradient of the size of the tensor
        taken = {i: _rows(t, indices) for i, t in enumerate(tensors) if t.requires_grad}
    gradients = {i: torch.empty_like(rows) for i, rows in taken.items()}

    chunks = selection.most(_number_of_chunks(len(indices), chunk_size))
    for chunk in range(chunks):
        part = slice(chunk * chunk_size, (chunk + 1) * chunk_size)
        rows = [
            taken[i].detach()[part].requires_grad_() if i in taken else _rows(t, indices[part])
            for i, t in enumerate(tensors)
        ]
        with no_sync() if chunk + 1 < chunks else contextlib.nullcontext():
            with torch.enable_grad():
                again = _losses_again(selection, fn, rows, losses[part], value, check)
            again.backward(weights[part])
        for i, of_tail in gradients.items():
            of_part = rows[i].grad
            of_tail[part] = 0.0 if of_part is None else of_part
        del rows, again  # before there are those of the next chunk
    if taken:
        torch.autograd.backward(list(taken.values()), list(gradients.values()))
    return value


def _tail_of(
    selection: Selection, fn: LossFunction, tensors: tuple[Tensor, ...], chunk_size: int | None
) -> tuple[Tensor, Tail]:
    """The losses of all rows and their tail, from a pass without a graph."""
    function = selection.function
    n = _number_of_rows(function, fn, tensors, selection.of_ranks)
    _check_mask(function, selection.mask, n)
    chunks, size = 1, n
    if chunk_size is not None:
        chunks, size = selection.most(_number_of_chunks(n, chunk_size)), chunk_size
    with torch.no_grad():
        with (
            selection.together(),
            _refuses_coupling(function, fn),
            _refuses_random_numbers(function, tensors),
        ):
            parts = []
            for start in range(0, chunks * size, size) if chunks > 1 else [0]:
                rows = [t[start : start + size] for t in tensors] if chunks > 1 else tensors
                # Detached of a graph that fn may have made itself
                parts.append(_losses_of(function, fn, rows, len(rows[0])).detach())
        losses = torch.cat(parts) if chunks > 1 else parts[0]
        if not is_compiling():  # which caches nothing, and does not take this before torch 2.13
            # Weights that autocast has cast here would have no graph in the second pass
            torch.clear_autocast_cache()
        return losses, selection.select(losses)


def _losses_again(
    selection: Selection,
    fn: LossFunction,
    rows: Sequence[Tensor],
    first: Tensor,
    value: Tensor,
    check: bool | None,
) -> Tensor:
    """With a graph, of rows whose losses of the first pass are known."""
    checked = _is_checked(check, first)
    with selection.together() if checked else contextlib.nullcontext():
        losses = _losses_of(selection.function, fn, rows, len(first))
    if checked:
        _check_same(selection, fn, rows, losses.detach(), first, value)
    return losses


def _number_of_chunks(n: int, chunk_size: int) -> int:
    return max(math.ceil(n / chunk_size), 1)


def _losses_of(function: str, fn: LossFunction, rows: Sequence[Tensor], n: int) -> Tensor:
    losses = fn(*rows)
    if not isinstance(losses, Tensor):
        raise TypeError(
            f"{function}: fn: expected to return a tensor of losses, got {type(losses).__name__}"
        )
    check_floating(function, "fn", losses)
    if losses.shape != (n,):
        raise ValueError(
            f"{function}: fn: expected one loss for each row (reduction='none'), shape ({n},), "
            f"got {tuple(losses.shape)}"
        )
    return losses


def _rows(tensor: Tensor, indices: Tensor) -> Tensor:
    return tensor.index_select(0, indices.to(tensor.device))


# --- what is refused ------------------------------------------------------------------------------


def _number_of_rows(
    function: str, fn: object, tensors: tuple[object, ...], may_be_none: bool
) -> int:
    """How many rows each of the tensors has."""
    if not callable(fn):
        raise TypeError(f"{function}: fn: expected a callable, got {type(fn).__name__}")
    if not tensors:
        raise TypeError(f"{function}: tensors: expected at least one, got none")
    shapes = []
    for tensor in tensors:
        check_tensor(function, "tensors", tensor)
        assert isinstance(tensor, Tensor)
        shapes.append(tuple(tensor.shape))
    got = f"got shapes {', '.join(map(str, shapes))}"
    if any(not shape or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(f"{function}: tensors: expected the same number of rows, {got}")
    n: int = shapes[0][0]
    if n == 0 and not may_be_none:
        raise ValueError(f"{function}: tensors: expected at least one row, {got}")
    return n


def _check_mask(function: str, mask: Tensor | None, n: int) -> None:
    """But for its device, which is that of losses that are still to come."""
    if mask is not None:
        check_tensor(function, "mask", mask)
        checked_mask(function, torch.empty(n, device=mask.device), mask)


def _check_chunk_size(function: str, chunk_size: object) -> None:
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool):
        raise TypeError(f"{function}: chunk_size: expected an int, got {type(chunk_size).__name__}")
    if chunk_size < 1:
        raise ValueError(f"{function}: chunk_size: expected at least 1, got {chunk_size}")


def _check_gradient(function: str, gradient: object) -> None:
    expected = f"{function}: gradient: expected a number or a tensor without dimensions, got"
    if not isinstance(gradient, (int, float, Tensor)):
        raise TypeError(f"{expected} {type(gradient).__name__}")
    if isinstance(gradient, Tensor) and gradient.dim() > 0:
        raise ValueError(f"{expected} shape {tuple(gradient.shape)}")


def _is_checked(check: bool | None, losses: Tensor) -> bool:
    if is_compiling():
        return False
    return losses.device.type == "cpu" if check is None else check


def _check_same(
    selection: Selection,
    fn: LossFunction,
    rows: Sequence[Tensor],
    again: Tensor,
    first: Tensor,
    value: Tensor,
) -> None:
    """That the losses of rows do not depend on what other rows there are."""
    same = (again == first) | (again.isnan() & first.isnan())
    difference = torch.where(same, 0.0, (again.double() - first.double()).abs())
    # With the value: all of a chunk's may be close to 0
    largest = torch.cat([first.double(), value.detach().double()[None]]).abs()
    largest = largest.nan_to_num(0.0, 0.0, 0.0).max()
    allowed = max(0.01, 4 * torch.finfo(first.dtype).eps) * largest
    differs = not (difference <= allowed).all()
    if not selection.most(int(differs)):  # on all ranks, since fn may run collectives
        return
    with selection.together():
        rounding = _rounding_of(selection.function, fn, rows, len(first))
        if not (difference <= allowed + rounding).all():
            raise ValueError(
                f"{selection.function}: fn: expected the same loss of a row without the other rows "
                f"(its noise a tensor or drawn by the row's number, no dependence on the batch), "
                f"got losses of the tail that differ by up to {difference.max():.3g}, where the "
                f"largest is {largest:.3g} and rounding explains {rounding:.3g}"
            )


def _rounding_of(function: str, fn: LossFunction, rows: Sequence[Tensor], n: int) -> float:
    """By how much rounding may change these losses, which is measured: no bound is known of what fn
    computes, and losses near 0 are often the difference of large numbers.

    1. fn runs three times, and every number that an operation takes is moved at random, by up to
       16 of its roundings.
    2. The largest range of a loss over the three is what 16 roundings do. A quarter of it stands
       for those that sums in another order add up.

    Noise that fn draws itself counts for a quarter, too, and so is still found. Numbers move toward
    0, so that what has to lie in [0, 1] does.
    """
    losses = []
    # Compiled code is not looked into
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for seed in range(3):
            with _Moved(seed):
                losses.append(_losses_of(function, fn, rows, n).double())
    torch.clear_autocast_cache()  # of moved weights
    low, *_, high = torch.stack(losses).sort(0).values
    ranges = (high - low).nan_to_num(0.0, 0.0, 0.0)
    return float(ranges.max()) / 4 if n else 0.0


# Logarithms of sums that are 1 and little more, which are known to the roundings of 1
_LOGARITHMS = "aten::_log_softmax", "aten::logsumexp", "sqloss::cross_entropy_losses"


# Whose operators write into what they take, and do not say so
_COLLECTIVES = "c10d", "fsdp"


class _Moved(TorchDispatchMode):
    """Moves the numbers that operations take, by up to 16 roundings."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}  # not torch's own

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = args, kwargs or {}
        is_functional = all(each.alias_info is None for each in func._schema.arguments)
        if is_functional and func.namespace not in _COLLECTIVES:
            given = tree_map_only(Tensor, self._moved, given)
        results = func(*given[0], **given[1])
        if func._schema.name in _LOGARITHMS:
            results = tree_map_only(Tensor, lambda x: x - self._shares(x), results)
        return results

    def _moved(self, x: Tensor) -> Tensor:
        if type(x) not in (Tensor, nn.Parameter) or x.dtype not in DTYPES or x.is_meta:
            return x
        return x * (1 - self._shares(x))

    def _shares(self, x: Tensor) -> Tensor:
        """Up to 16 roundings of 1."""
        if x.device not in self.generators:
            self.generators[x.device] = torch.Generator(x.device).manual_seed(self.seed)
        generator = self.generators[x.device]
        share = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        return 16 * torch.finfo(x.dtype).eps * share


@contextlib.contextmanager
def _refuses_coupling(function: str, fn: LossFunction) -> Iterator[None]:
    """Stops a module whose rows depend on each other, or on chance, before it runs."""
    if is_compiling():
        yield
        return
    reached = list(_reached(fn))
    modules = [each for each in map(_plain, reached) if _is_module(each)]
    parts = [part for module in modules for part in module.modules()]
    if any(map(_is_compiled, (*reached, *parts))):  # it would be compiled again for every new hook
        for part in parts:
            _refuse(function, part, modules)
        yield
        return
    called: list[nn.Module] = []

    def refuse(module: nn.Module) -> None:
        called.append(module)
        for part in module.modules() if _is_compiled(module) else [module]:
            _refuse(function, part, called)

    thread = threading.get_ident()
    outer = _refusals.get(thread)
    with _lock:
        _refusals[thread] = refuse
        _global_forward_pre_hooks[_HOOK] = _before_forward
    try:
        yield
    finally:
        with _lock:
            if outer is None:
                del _refusals[thread]
            else:
                _refusals[thread] = outer
            if not _refusals:
                del _global_forward_pre_hooks[_HOOK]


# One hook, always the same: torch.compile's code for one with another would not be valid
_HOOK = -1  # its key, no number that torch gives
_refusals: dict[int, Callable[[nn.Module], None]] = {}  # by threads, which share the hook
_lock = threading.Lock()


def _before_forward(module: nn.Module, _args: Any) -> None:
    if is_compiling():
        return
    refuse = _refusals.get(threading.get_ident())
    if refuse is not None:
        refuse(module)


def _reached(fn: object) -> Iterator[object]:
    """What a function calls or closes over, as far as it can be told without a call.

    Objects of other people's classes are told by their type and by what lies in their dictionary.
    Nothing is asked of them: their attributes may be computed, have effects or raise any error.
    """
    seen: set[int] = set()
    left = [fn]
    while left:
        given = left.pop()
        if id(given) in seen:
            continue
        seen.add(id(given))
        yield given
        given = _plain(given)
        if type(given) is functools.partial:
            left += [given.func, *given.args, *given.keywords.values()]
        elif type(given) is MethodType:
            left += [given.__func__, given.__self__]
        elif type(given) is FunctionType:
            cells = [cell.cell_contents for cell in given.__closure__ or () if _is_set(cell)]
            of_file = [dict.get(given.__globals__, name) for name in given.__code__.co_names]
            left += [
                each
                for each in (*cells, *of_file, *(given.__defaults__ or ()))
                if _is_compiled(each) or _may_reach(each, given.__globals__)
            ]
        elif not _is_module(given):  # an object that may hold one
            held = _attributes(given).values()
            left += [each for each in held if _is_module(each) or _is_compiled(each)]


def _may_reach(given: object, file: dict[str, Any]) -> bool:
    """Whether it is an object, or a function of this file."""
    if type(given) is MethodType:
        given = given.__func__
    if type(given) is FunctionType:
        return given.__globals__ is file
    return not issubclass(type(given), (type, ModuleType))


def _is_set(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_module(given: object) -> TypeGuard[nn.Module]:
    return issubclass(type(given), nn.Module)  # isinstance would ask for __class__


def _is_compiled(given: object) -> bool:
    if _plain(given) is not given:
        return True
    return _is_module(given) and vars(given).get("_compiled_call_impl") is not None


def _plain(given: object) -> object:
    """What torch.compile was given."""
    if _is_module(given):
        return vars(given).get("_modules", {}).get("_orig_mod", given)
    if type(given) is FunctionType:
        return vars(given).get("_torchdynamo_orig_callable", given)
    return given


def _attributes(given: object) -> dict[str, Any]:
    """Those in an object's own dictionary, which no code of its class has a part in."""
    found = inspect.getattr_static(given, "__dict__", None)
    is_own = type(found) in (GetSetDescriptorType, MemberDescriptorType)
    if not is_own or issubclass(type(given), type):
        return {}  # none, something else by that name, or what is for all objects of a class
    own: dict[str, Any] = found.__get__(given)
    return own if type(own) is dict else dict(own)


def _refuse(function: str, module: nn.Module, called: list[nn.Module]) -> None:
    refusal = _refusal(module)
    if refusal is not None:
        raise ValueError(
            f"{function}: fn: expected rows that do not depend on each other or on chance, got "
            f"{_name(module, called)}, {refusal}"
        )


def _refusal(module: nn.Module) -> str | None:
    """Why a module can't run on rows of a batch alone."""
    if isinstance(module, _BatchNorm):
        if module.training:
            return "in training mode, which normalises by the statistics of the batch"
        if module.running_mean is None:
            return "with track_running_stats=False, which normalises by the statistics of the batch"
    if not module.training:
        return None
    if isinstance(module, _DropoutNd) and module.p > 0:
        return f"in training mode with p={module.p}, which draws random numbers"
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and module.dropout > 0:
        return f"in training mode with dropout={module.dropout}, which draws random numbers"
    if isinstance(module, nn.RReLU):
        return "in training mode, which draws random numbers"
    return None


def _name(module: nn.Module, called: list[nn.Module]) -> str:
    """The module as a part of the first one called that has it."""
    for outer in called:
        for name, inner in outer.named_modules(prefix=type(outer).__name__):
            if inner is module:
                return name if inner is outer else f"{name} ({type(module).__name__})"
    return type(module).__name__


@contextlib.contextmanager
def _refuses_random_numbers(function: str, tensors: tuple[Tensor, ...]) -> Iterator[None]:
    """An error after calls that have moved one of torch's own generators."""
    if is_compiling():
        yield
        return
    generators = [torch.default_generator]
    # While a graph is captured, their state can't be read
    if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        devices = {t.device.index for t in tensors if t.device.type == "cuda"}
        devices.add(torch.cuda.current_device())
        generators += [torch.cuda.default_generators[index] for index in devices]
    before = [generator.get_state() for generator in generators]
    yield
    for generator, state in zip(generators, before, strict=True):
        if not torch.equal(generator.get_state(), state):
            raise ValueError(
                f"{function}: fn: expected no random numbers from torch's own generators (a row's "
                f"noise is a tensor, or drawn by a seed and the row's number), but it took some "
                f"from that of {generator.device}"
            )
