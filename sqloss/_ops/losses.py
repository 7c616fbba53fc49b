"""The operators of csrc/pointwise_losses and csrc/cross_entropy_losses for every way torch calls
them, and with them the superquantile of their losses. As in superquantile.py: eager calls take the
pybind11 binding, torch.compile traces the operators; here are the rules of vmap, the shapes of fake
tensors, and the reference for devices without a kernel.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from sqloss import _C, reference
from sqloss._ops import in_front, warn_without_kernel
from sqloss._ops.superquantile import superquantile
from sqloss.reference import NONE_COUNTS

_ops = torch.ops.sqloss


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
    """The losses of csrc/pointwise_losses/pointwise_losses.h."""
    if is_compiling():
        losses: Tensor = _ops.pointwise_losses(
            loss, input, target, weight, other, parameter, full, sample_dims, mean
        )
        return losses
    return _C.pointwise_losses(
        loss, input, target, weight, other, parameter, full, sample_dims, mean
    )


def cross_entropy_losses(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    function: str,
) -> Tensor:
    """The losses of csrc/cross_entropy_losses/cross_entropy_losses.h."""
    if is_compiling():
        losses: Tensor
        losses, _ = _ops.cross_entropy_losses(
            input, target, weight, ignore_index, label_smoothing, function
        )
        return losses
    return _C.cross_entropy_losses(input, target, weight, ignore_index, label_smoothing, function)


def cvar_pointwise(
    tail_fraction: float,
    extra: Tensor | None,
    loss: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    other: Tensor | None,
    parameter: float,
    full: bool,
    sample_dims: int,
    mean: bool,
    return_losses: bool,
    function: str,
) -> tuple[Tensor, Tensor | None]:
    """The superquantile of all pointwise losses + extra; and these, detached, if they are wanted:
    every tensor that reaches Python costs.
    """
    if is_compiling():
        losses = pointwise_losses(
            loss, input, target, weight, other, parameter, full, sample_dims, mean
        )
        return _cvar(tail_fraction, extra, losses, None, return_losses, function, NONE_COUNTS)
    return _C.cvar_pointwise(
        tail_fraction,
        extra,
        loss,
        input,
        target,
        weight,
        other,
        parameter,
        full,
        sample_dims,
        mean,
        return_losses,
        function,
    )


def cvar_cross_entropy(
    tail_fraction: float,
    extra: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    return_losses: bool,
    function: str,
) -> tuple[Tensor, Tensor | None]:
    """As cvar_pointwise; targets equal to ignore_index are no losses."""
    none_counts = "target, ignore_index: expected at least one target that is not ignored, got none"
    if is_compiling():
        losses = cross_entropy_losses(
            input, target, weight, ignore_index, label_smoothing, function
        )
        mask = None if target.is_floating_point() else target != ignore_index
        return _cvar(tail_fraction, extra, losses, mask, return_losses, function, none_counts)
    return _C.cvar_cross_entropy(
        tail_fraction,
        extra,
        input,
        target,
        weight,
        ignore_index,
        label_smoothing,
        return_losses,
        function,
        none_counts,
    )


def _cvar(
    tail_fraction: float,
    extra: Tensor | None,
    losses: Tensor,
    mask: Tensor | None,
    return_losses: bool,
    function: str,
    none_counts: str,
) -> tuple[Tensor, Tensor | None]:
    if extra is not None:
        losses = losses + extra
    value, _, _ = superquantile(losses, tail_fraction, None, mask, (), False, function, none_counts)
    return value, losses.detach() if return_losses else None


# --- torch.func.vmap ------------------------------------------------------------------------------


def _pointwise_losses_vmap(
    info: Any,
    in_dims: Any,
    loss: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    other: Tensor | None,
    parameter: float,
    full: bool,
    sample_dims: int,
    mean: bool,
) -> Any:
    tensors = zip((input, target, weight, other), in_dims[1:5], strict=True)
    batched = (in_front(info.batch_size, tensor, bdim) for tensor, bdim in tensors)
    return _ops.pointwise_losses(loss, *batched, parameter, full, sample_dims + 1, mean), 0


def _pointwise_losses_backward_vmap(
    info: Any,
    in_dims: Any,
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
) -> Any:
    tensors = zip((input, target, weight, other), in_dims[2:6], strict=True)
    batched = (in_front(info.batch_size, tensor, bdim) for tensor, bdim in tensors)
    gradients = _ops.pointwise_losses_backward(
        in_front(info.batch_size, grad_losses, in_dims[0]),
        loss,
        *batched,
        parameter,
        full,
        sample_dims + 1,
        mean,
        output_mask,
    )
    return gradients, tuple(0 if wanted else None for wanted in output_mask)


class _Folded:
    """vmap's dimension as part of the first one, N of the cross-entropy."""

    def __init__(self, info: Any, input: Tensor, bdim: int | None) -> None:
        self.info = info
        self.n = input.shape[0 if bdim is None or bdim > 0 else 1]

    def __call__(self, tensor: Tensor, bdim: int | None) -> Tensor:
        return in_front(self.info.batch_size, tensor, bdim).flatten(0, 1)

    def unfold(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.info.batch_size, self.n, *tensor.shape[1:])


def _check_weight(function: str, bdim: int | None) -> None:
    if bdim is not None:
        raise ValueError(
            f"{function}: weight: expected one for all of vmap's batch, got a batched tensor"
        )


def _cross_entropy_losses_vmap(
    info: Any,
    in_dims: Any,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    function: str = "cross_entropy_losses",
) -> Any:
    _check_weight(function, in_dims[2])
    folded = _Folded(info, input, in_dims[0])
    outputs = _ops.cross_entropy_losses(
        folded(input, in_dims[0]),
        folded(target, in_dims[1]),
        weight,
        ignore_index,
        label_smoothing,
        function,
    )
    return tuple(map(folded.unfold, outputs)), (0, 0)


def _cross_entropy_losses_backward_vmap(
    info: Any,
    in_dims: Any,
    grad_losses: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    log_sum_exp: Tensor,
    ignore_index: int,
    label_smoothing: float,
    output_mask: Sequence[bool],
) -> Any:
    _check_weight("cross_entropy_losses_backward", in_dims[3])
    folded = _Folded(info, input, in_dims[1])
    gradients = _ops.cross_entropy_losses_backward(
        folded(grad_losses, in_dims[0]),
        folded(input, in_dims[1]),
        folded(target, in_dims[2]),
        weight,
        folded(log_sum_exp, in_dims[4]),
        ignore_index,
        label_smoothing,
        output_mask,
    )
    unfolded = (
        folded.unfold(gradient) if wanted else gradient
        for gradient, wanted in zip(gradients, output_mask, strict=True)
    )
    return tuple(unfolded), tuple(0 if wanted else None for wanted in output_mask)


torch.library.register_vmap("sqloss::pointwise_losses", _pointwise_losses_vmap)
torch.library.register_vmap("sqloss::pointwise_losses_backward", _pointwise_losses_backward_vmap)
torch.library.register_vmap("sqloss::cross_entropy_losses", _cross_entropy_losses_vmap)
torch.library.register_vmap(
    "sqloss::cross_entropy_losses_backward", _cross_entropy_losses_backward_vmap
)


# --- fake tensors ---------------------------------------------------------------------------------


def _pointwise_losses_fake(
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
    dtype = reference.losses_dtype(input, target, weight, other)
    return input.new_empty(input.shape[:sample_dims], dtype=dtype)


def _pointwise_losses_backward_fake(
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
) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(tensor) if wanted and tensor is not None else input.new_empty(0)
        for tensor, wanted in zip((input, target, other), output_mask, strict=True)
    )


def _cross_entropy_losses_fake(
    input: Tensor, target: Tensor, weight: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    shape = (input.shape[0], *input.shape[2:])
    dtype = reference.losses_dtype(input, target, weight)
    return input.new_empty(shape, dtype=dtype), input.new_empty(shape, dtype=torch.float64)


def _cross_entropy_losses_backward_fake(
    grad_losses: Tensor, input: Tensor, target: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(tensor) if wanted else input.new_empty(0)
        for tensor, wanted in zip((input, target), args[-1], strict=True)
    )


torch.library.register_fake("sqloss::pointwise_losses", _pointwise_losses_fake)
torch.library.register_fake("sqloss::pointwise_losses_backward", _pointwise_losses_backward_fake)
torch.library.register_fake("sqloss::cross_entropy_losses", _cross_entropy_losses_fake)
torch.library.register_fake(
    "sqloss::cross_entropy_losses_backward", _cross_entropy_losses_backward_fake
)


# --- devices without a kernel ---------------------------------------------------------------------


def _as_empty_like(gradient: Tensor, tensor: Tensor) -> Tensor:
    """With the strides that the fake tensor has."""
    return torch.empty_like(tensor).copy_(gradient)


def _pointwise_losses_reference(loss: str, input: Tensor, *args: Any) -> Tensor:
    warn_without_kernel("losses", input.device)
    return reference.pointwise_losses(loss, input, *args).contiguous()


def _pointwise_losses_backward_reference(
    grad_losses: Tensor,
    loss: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    other: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    warn_without_kernel("losses", input.device)
    gradients = reference.pointwise_losses_backward(
        grad_losses, loss, input, target, weight, other, *args
    )
    output_mask = args[-1]
    return tuple(
        _as_empty_like(gradient, tensor) if wanted and tensor is not None else gradient
        for gradient, tensor, wanted in zip(
            gradients, (input, target, other), output_mask, strict=True
        )
    )


def _cross_entropy_losses_reference(input: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    warn_without_kernel("losses", input.device)
    losses, log_sum_exp = reference.cross_entropy_losses(input, *args)
    return losses.contiguous(), log_sum_exp.contiguous()


def _cross_entropy_losses_backward_reference(
    grad_losses: Tensor, input: Tensor, target: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    warn_without_kernel("losses", input.device)
    gradients = reference.cross_entropy_losses_backward(grad_losses, input, target, *args)
    return tuple(
        _as_empty_like(gradient, tensor) if wanted else gradient
        for gradient, tensor, wanted in zip(gradients, (input, target), args[-1], strict=True)
    )


_library = torch.library.Library("sqloss", "IMPL")
for _name, _twin in {
    "pointwise_losses": _pointwise_losses_reference,
    "pointwise_losses_backward": _pointwise_losses_backward_reference,
    "cross_entropy_losses": _cross_entropy_losses_reference,
    "cross_entropy_losses_backward": _cross_entropy_losses_backward_reference,
}.items():
    _library.impl(_name, _twin, "CompositeExplicitAutograd")
