"""The operators of csrc/superquantile for every way torch calls them.

Eager calls take the pybind11 binding. torch.compile and torch.export trace the same operator
through torch.ops. torch.func transforms refuse C++ autograd Functions, so under one the call goes
through the Python Functions below. Devices without a kernel get the reference.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as transformed
from torch.compiler import is_compiling

from sqloss import _C, reference
from sqloss._ops import cuda_build

Outputs = tuple[Tensor, Tensor, Tensor]


def cvar(
    losses: Tensor,
    tail_fraction: float,
    weight: Tensor | None,
    mask: Tensor | None,
    dim: Sequence[int],
    keepdim: bool,
) -> Tensor:
    """The value of csrc/superquantile/superquantile.h."""
    if is_compiling() or transformed():
        return superquantile(losses, tail_fraction, weight, mask, dim, keepdim)[0]
    return _C.cvar(losses, tail_fraction, weight, mask, dim, keepdim)


def value_at_risk(
    losses: Tensor,
    tail_fraction: float,
    weight: Tensor | None,
    mask: Tensor | None,
    dim: Sequence[int],
    keepdim: bool,
) -> Tensor:
    """The threshold of csrc/superquantile/superquantile.h."""
    if is_compiling() or transformed():
        return superquantile(losses, tail_fraction, weight, mask, dim, keepdim)[1]
    return _C.value_at_risk(losses, tail_fraction, weight, mask, dim, keepdim)


def superquantile(
    losses: Tensor,
    tail_fraction: float,
    weight: Tensor | None,
    mask: Tensor | None,
    dim: Sequence[int],
    keepdim: bool,
) -> Outputs:
    """(value, threshold, counts) of csrc/superquantile/superquantile.h."""
    if is_compiling():
        # A tensor made by arithmetic: a float argument would be a constant of the graph, compiled
        # again for every new alpha. On the device, so that the graph stays on one.
        fraction = torch.ones((), dtype=torch.float64, device=losses.device) * tail_fraction
    else:
        fraction = torch.tensor(tail_fraction, dtype=torch.float64)
    return _forward(_autocast(losses), fraction, weight, mask, dim, keepdim)


def tail_weights(
    losses: Tensor,
    tail_fraction: float,
    weight: Tensor | None,
    mask: Tensor | None,
    dim: Sequence[int],
) -> Tensor:
    """The gradient of the value in the losses."""
    losses = _autocast(losses)
    outputs = superquantile(losses, tail_fraction, weight, mask, dim, False)
    value, threshold, counts = outputs
    one = torch.ones_like(value)
    return _backward(one, None, losses, weight, mask, threshold, counts, dim, False)


def _autocast(losses: Tensor) -> Tensor:
    """What the operator's autocast kernel does, where more than that call needs its result."""
    half = losses.dtype in (torch.float16, torch.bfloat16)
    return losses.float() if half and torch.is_autocast_enabled(losses.device.type) else losses


def _forward(*inputs: Any) -> Outputs:
    """The operator on a tensor tail_fraction, by the route that the transforms in force allow."""
    call = _Superquantile.apply if transformed() else torch.ops.sqloss.superquantile
    outputs: Outputs = call(*inputs)
    return outputs


def _backward(*inputs: Any) -> Tensor:
    call = (
        _SuperquantileBackward.apply if transformed() else torch.ops.sqloss.superquantile_backward
    )
    grad_losses: Tensor = call(*inputs)
    return grad_losses


# --- torch.func -----------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], threshold: Tensor, counts: Tensor) -> None:
    losses, weight, mask, dim, keepdim = inputs
    ctx.save_for_backward(losses, weight, mask, threshold, counts)
    ctx.save_for_forward(losses, weight, mask, threshold, counts)
    ctx.dim, ctx.keepdim = dim, keepdim
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_value: Tensor | None, grad_threshold: Tensor | None) -> Tensor:
    return _backward(grad_value, grad_threshold, *ctx.saved_tensors, ctx.dim, ctx.keepdim)


def _change(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """How value and threshold move with the losses: the adjoint of the gradient."""
    ones = torch.ones_like(ctx.saved_tensors[3])
    value = (_gradient(ctx, ones, None) * tangent).sum(ctx.dim, ctx.keepdim)
    threshold = (_gradient(ctx, None, ones) * tangent).sum(ctx.dim, ctx.keepdim)
    return value, threshold


class _Superquantile(torch.autograd.Function):
    @staticmethod
    def forward(
        losses: Tensor,
        tail_fraction: Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        dim: Sequence[int],
        keepdim: bool,
    ) -> Outputs:
        outputs: Outputs = torch.ops.sqloss.superquantile(
            losses, tail_fraction, weight, mask, dim, keepdim
        )
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Outputs) -> None:
        losses, _tail_fraction, weight, mask, dim, keepdim = inputs
        _, threshold, counts = output
        ctx.mark_non_differentiable(counts)
        _save(ctx, (losses, weight, mask, dim, keepdim), threshold, counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad_value, grad_threshold, _ = grads
        if grad_value is None and grad_threshold is None:
            return (None,) * 6
        return _gradient(ctx, grad_value, grad_threshold), *(None,) * 5

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return *_change(ctx, tangents[0]), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return _superquantile_vmap(info, in_dims, *inputs)


class _SuperquantileBackward(torch.autograd.Function):
    """Linear in the two gradients, constant in the losses."""

    @staticmethod
    def forward(
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
        grad_losses: Tensor = torch.ops.sqloss.superquantile_backward(
            grad_value, grad_threshold, losses, weight, mask, threshold, counts, dim, keepdim
        )
        return grad_losses

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, _, losses, weight, mask, threshold, counts, dim, keepdim = inputs
        _save(ctx, (losses, weight, mask, dim, keepdim), threshold, counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (grad,) = grads
        if grad is None:
            return (None,) * 9
        of_inputs = _change(ctx, grad)
        needed = ctx.needs_input_grad[:2]
        gradients = [of if need else None for of, need in zip(of_inputs, needed, strict=True)]
        return *gradients, *(None,) * 7

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _gradient(ctx, tangents[0], tangents[1])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return _superquantile_backward_vmap(info, in_dims, *inputs)


class _Batch:
    """The operators' arguments with vmap's dimension in front, as one more kept dimension."""

    def __init__(self, info: Any, losses_ndim: int, dim: Sequence[int], keepdim: bool) -> None:
        self.size = info.batch_size
        self.scalars = losses_ndim == 0  # each reduction is of a single loss
        self.dim = tuple(d + 1 for d in (dim or range(max(losses_ndim, 1))))
        self.keepdim = keepdim and not self.scalars

    def __call__(self, tensor: Tensor | None, bdim: int | None) -> Tensor | None:
        if tensor is None:
            return None
        if bdim is None:
            return tensor.expand(self.size, *tensor.shape)
        return tensor.movedim(bdim, 0)

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
) -> Any:
    batch = _Batch(info, _ndim(losses, in_dims[0]), dim, keepdim)
    outputs = _forward(
        batch.losses(losses, in_dims[0]),
        tail_fraction,
        batch.losses(weight, in_dims[2]),
        batch.losses(mask, in_dims[3]),
        batch.dim,
        batch.keepdim,
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
    grad_losses = _backward(
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
) -> Outputs:
    reduced = set(dim or range(losses.dim()))
    shape = [
        1 if d in reduced else size
        for d, size in enumerate(losses.shape)
        if keepdim or d not in reduced
    ]
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

_warned: set[str] = set()


def _warn_once(operator: str, device: torch.device) -> None:
    if operator not in _warned:
        _warned.add(operator)
        why = f"sqloss was built {cuda_build()}" if device.type == "cuda" else "none is planned"
        warnings.warn(
            f"sqloss: {operator} has no kernel for device type {device.type}: it runs in plain "
            f"PyTorch, correct but slower ({why})",
            stacklevel=2,
        )


def _reference_forward(losses: Tensor, *args: Any) -> Outputs:
    _warn_once("superquantile", losses.device)
    return reference.superquantile(losses, *args)


def _reference_backward(
    grad_value: Tensor | None, grad_threshold: Tensor | None, losses: Tensor, *args: Any
) -> Tensor:
    _warn_once("superquantile_backward", losses.device)
    gradient = reference.superquantile_backward(grad_value, grad_threshold, losses, *args)
    return torch.empty_like(losses).copy_(gradient)  # with the strides that the fake tensor has


_library = torch.library.Library("sqloss", "IMPL")
_library.impl("superquantile", _reference_forward, "CompositeExplicitAutograd")
_library.impl("superquantile_backward", _reference_backward, "CompositeExplicitAutograd")
