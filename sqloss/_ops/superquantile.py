"""The operators of csrc/superquantile for every way torch calls them.

Eager calls take the pybind11 binding; torch.compile traces the same operator through torch.ops.
Autograd is in csrc. Here is what the dispatcher takes from Python: the rules of vmap, the shapes of
fake tensors, and the reference for devices without a kernel.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from sqloss import _C, reference
from sqloss._ops import in_front, warn_without_kernel
from sqloss.reference import NONE_COUNTS

Outputs = tuple[Tensor, Tensor, Tensor]


def cvar(
    losses: Tensor,
    tail_fraction: float,
    weight: Tensor | None,
    mask: Tensor | None,
    dim: Sequence[int],
    keepdim: bool,
    function: str,
) -> Tensor:
    """The value of csrc/superquantile/superquantile.h."""
    if is_compiling():
        return superquantile(losses, tail_fraction, weight, mask, dim, keepdim, function)[0]
    return _C.cvar(losses, tail_fraction, weight, mask, dim, keepdim, function)


def value_at_risk(
    losses: Tensor,
    tail_fraction: float,
    weight: Tensor | None,
    mask: Tensor | None,
    dim: Sequence[int],
    keepdim: bool,
    function: str,
) -> Tensor:
    """The threshold of csrc/superquantile/superquantile.h."""
    if is_compiling():
        return superquantile(losses, tail_fraction, weight, mask, dim, keepdim, function)[1]
    return _C.value_at_risk(losses, tail_fraction, weight, mask, dim, keepdim, function)


def tail_weights(
    losses: Tensor,
    tail_fraction: float,
    weight: Tensor | None,
    mask: Tensor | None,
    dim: Sequence[int],
    function: str,
) -> Tensor:
    """The gradient of the value in the losses."""
    losses = out_of_autocast(losses)  # out of sight of the next operator's
    value, threshold, counts = superquantile(
        losses, tail_fraction, weight, mask, dim, False, function
    )
    grad_losses: Tensor = torch.ops.sqloss.superquantile_backward(
        torch.ones_like(value), None, losses, weight, mask, threshold, counts, dim, False
    )
    return grad_losses


def out_of_autocast(losses: Tensor) -> Tensor:
    """Losses as the operator's autocast makes them."""
    half = losses.dtype in (torch.float16, torch.bfloat16)
    return losses.float() if half and torch.is_autocast_enabled(losses.device.type) else losses


def superquantile(
    losses: Tensor,
    tail_fraction: float,
    weight: Tensor | None,
    mask: Tensor | None,
    dim: Sequence[int],
    keepdim: bool,
    function: str = "superquantile",
    none_counts: str = NONE_COUNTS,
) -> Outputs:
    """(value, threshold, counts) of csrc/superquantile/superquantile.h, through torch.ops."""
    if is_compiling():
        # A tensor made by arithmetic: a float argument would be a constant of the graph, compiled
        # again for every new alpha. On the device, so that the graph stays on one; but the operator
        # refuses a number out of range, which while tracing cannot be refused, on the CPU.
        device = losses.device if 0 < tail_fraction <= 1 else torch.device("cpu")
        fraction = torch.ones((), dtype=torch.float64, device=device) * tail_fraction
    else:
        fraction = torch.tensor(tail_fraction, dtype=torch.float64, device="cpu")
    outputs: Outputs = torch.ops.sqloss.superquantile(
        losses, fraction, weight, mask, dim, keepdim, function, none_counts
    )
    return outputs


# --- torch.func.vmap ------------------------------------------------------------------------------


class _Batch:
    """The operators' arguments with vmap's dimension in front, as one more kept dimension."""

    def __init__(self, info: Any, losses_ndim: int, dim: Sequence[int], keepdim: bool) -> None:
        self.size = info.batch_size
        self.scalars = losses_ndim == 0  # each reduction is of a single loss
        self.dim = tuple(d + 1 for d in (dim or range(max(losses_ndim, 1))))
        self.keepdim = keepdim and not self.scalars

    def __call__(self, tensor: Tensor | None, bdim: int | None) -> Tensor | None:
        return in_front(self.size, tensor, bdim)

    def losses(self, tensor: Tensor | None, bdim: int | None) -> Tensor | None:
        tensor = self(tensor, bdim)
        return tensor.unsqueeze(-1) if self.scalars and tensor is not None else tensor


def _ndim(tensor: Tensor, bdim: int | None) -> int:
    return tensor.dim() - (bdim is not None)


def _superquantile_vmap(
    info: Any,
    in_dims: Any,
    losses: Tensor,
    tail_fraction: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    dim: Sequence[int],
    keepdim: bool,
    function: str = "superquantile",
    none_counts: str = NONE_COUNTS,
) -> Any:
    batch = _Batch(info, _ndim(losses, in_dims[0]), dim, keepdim)
    outputs = torch.ops.sqloss.superquantile(
        batch.losses(losses, in_dims[0]),
        tail_fraction,
        batch.losses(weight, in_dims[2]),
        batch.losses(mask, in_dims[3]),
        batch.dim,
        batch.keepdim,
        function,
        none_counts,
    )
    return outputs, (0, 0, 0)


def _superquantile_backward_vmap(
    info: Any,
    in_dims: Any,
    grad_value: Tensor | None,
    grad_threshold: Tensor | None,
    losses: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    threshold: Tensor,
    counts: Tensor,
    dim: Sequence[int],
    keepdim: bool,
) -> Any:
    batch = _Batch(info, _ndim(losses, in_dims[2]), dim, keepdim)
    grad_losses = torch.ops.sqloss.superquantile_backward(
        batch(grad_value, in_dims[0]),
        batch(grad_threshold, in_dims[1]),
        batch.losses(losses, in_dims[2]),
        batch.losses(weight, in_dims[3]),
        batch.losses(mask, in_dims[4]),
        batch(threshold, in_dims[5]),
        batch(counts, in_dims[6]),
        batch.dim,
        batch.keepdim,
    )
    return grad_losses.squeeze(-1) if batch.scalars else grad_losses, 0


torch.library.register_vmap("sqloss::superquantile", _superquantile_vmap)
torch.library.register_vmap("sqloss::superquantile_backward", _superquantile_backward_vmap)


# --- fake tensors ---------------------------------------------------------------------------------


def _superquantile_fake(
    losses: Tensor,
    tail_fraction: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    dim: Sequence[int],
    keepdim: bool,
    function: str = "superquantile",
    none_counts: str = NONE_COUNTS,
) -> Outputs:
    shape = reference.output_shape(losses, dim, keepdim)
    return (
        losses.new_empty(shape),
        losses.new_empty(shape),
        losses.new_empty([*shape, 3], dtype=torch.float64),
    )


def _superquantile_backward_fake(
    grad_value: Tensor | None,
    grad_threshold: Tensor | None,
    losses: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    threshold: Tensor,
    counts: Tensor,
    dim: Sequence[int],
    keepdim: bool,
) -> Tensor:
    return torch.empty_like(losses)


torch.library.register_fake("sqloss::superquantile", _superquantile_fake)
torch.library.register_fake("sqloss::superquantile_backward", _superquantile_backward_fake)


# --- devices without a kernel ---------------------------------------------------------------------


def _reference_forward(losses: Tensor, *args: Any) -> Outputs:
    warn_without_kernel("superquantile", losses.device)
    return reference.superquantile(losses, *args)


def _reference_backward(
    grad_value: Tensor | None, grad_threshold: Tensor | None, losses: Tensor, *args: Any
) -> Tensor:
    warn_without_kernel("superquantile", losses.device)
    gradient = reference.superquantile_backward(grad_value, grad_threshold, losses, *args)
    return torch.empty_like(losses).copy_(gradient)  # with the strides that the fake tensor has


_library = torch.library.Library("sqloss", "IMPL")
_library.impl("superquantile", _reference_forward, "CompositeExplicitAutograd")
_library.impl("superquantile_backward", _reference_backward, "CompositeExplicitAutograd")
