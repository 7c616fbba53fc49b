"""The superquantile over ranks, by its kernel or, on devices without one, by the reference.

It is no operator of torch's dispatcher: it runs collectives, which no transform of torch.func and
no fake tensor can.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sqloss import _C, reference


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
    """That of the reference, whose docstring tells the arguments."""
    losses = _in_memory(losses)
    weight = None if weight is None else _in_memory(weight)
    mask = None if mask is None else _in_memory(mask)
    on_cpu = losses.device.type == "cpu"
    select = _C.distributed_superquantile if on_cpu else reference.distributed_superquantile
    return select(
        losses, tail_fraction, weight, mask, config, ranks, scale, all_reduce, check, function
    )


def _in_memory(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one whose memory does not hold its elements: a negative view, a
    tensor of zeros without memory, a result of a collective that has not been waited for. For
    operators the dispatcher does this.
    """
    is_lazy = type(tensor) is not Tensor or tensor.is_neg() or tensor._is_zerotensor()
    return tensor.clone() if is_lazy else tensor


def with_gradient(
    value: Tensor,
    losses: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    threshold: Tensor,
    counts: Tensor,
) -> Tensor:
    """That value as a function of the losses of this rank, with a gradient in them."""
    return _C.distributed_superquantile_with_gradient(
        value, losses, weight, mask, threshold, counts
    )


def tail_weights(
    losses: Tensor, weight: Tensor | None, mask: Tensor | None, threshold: Tensor, counts: Tensor
) -> Tensor:
    """That gradient."""
    weights: Tensor = torch.ops.sqloss.superquantile_backward(
        torch.ones_like(threshold), None, losses, weight, mask, threshold, counts, (), False
    )
    return weights
