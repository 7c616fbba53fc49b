"""Checks of arguments that the public functions share, in one wording."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STRIDED = torch.strided


def check_tensor(function: str, argument: str, given: object) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{function}: {argument}: expected a tensor, got {type(given).__name__}")


def check_floating(function: str, argument: str, tensor: Tensor) -> None:
    check_tensor(function, argument, tensor)
    if type(tensor) is not Tensor and hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"{function}: {argument}: expected a tensor of this process, got a DTensor: "
            f"full_tensor() is all of it on every rank, to_local() the part of this one (for "
            f"sqloss.distributed; docs/distributed.md)"
        )
    if tensor.dtype not in DTYPES or tensor.layout is not _STRIDED:
        raise TypeError(
            f"{function}: {argument}: expected a dense tensor of float16, bfloat16, float32 or "
            f"float64, got {tensor.dtype}, {tensor.layout}"
        )


def check_device(function: str, argument: str, tensor: Tensor, of: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{function}: {argument}: expected the device of {of}, {like.device}, got "
            f"{tensor.device}"
        )


def check_broadcasts(function: str, argument: str, tensor: Tensor, of: str, like: Tensor) -> None:
    missing = like.dim() - tensor.dim()
    if missing < 0 or any(
        size not in (1, of_like)
        for size, of_like in zip(tensor.shape, like.shape[missing:], strict=True)
    ):
        raise ValueError(
            f"{function}: {argument}: expected a shape that broadcasts to that of {of}, "
            f"{tuple(like.shape)}, got {tuple(tensor.shape)}"
        )


def check_no_gradient(function: str, argument: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        got = "requires_grad=True"
    elif not is_compiling() and forward_ad.unpack_dual(tensor).tangent is not None:
        got = "a tangent"
    else:
        return
    raise ValueError(
        f"{function}: {argument}: expected a tensor without gradient (the derivative in it is not "
        f"implemented; detach() it), got {got}"
    )


def resolve_tail_fraction(function: str, alpha: float | None, tail_fraction: float | None) -> float:
    """The size of the tail that one of alpha and tail_fraction gives.

    torch.compile traces no errors: one out of range is then left to the operator.
    """
    if (alpha is None) == (tail_fraction is None):
        got = "neither" if alpha is None else "both"
        raise TypeError(f"{function}: alpha, tail_fraction: expected one of them, got {got}")
    if alpha is not None:
        if not isinstance(alpha, float):
            alpha = number(function, "alpha", alpha)
        if not 0 <= alpha < 1 and not is_compiling():
            raise ValueError(
                f"{function}: alpha: expected a confidence level in [0, 1) (the tail is the worst "
                f"1 - alpha), got {alpha}"
            )
        return 1 - alpha
    fraction = number(function, "tail_fraction", tail_fraction)
    if not 0 < fraction <= 1 and not is_compiling():
        raise ValueError(f"{function}: tail_fraction: expected a number in (0, 1], got {fraction}")
    return fraction


def number(function: str, argument: str, given: object) -> float:
    if isinstance(given, (float, int)):
        return float(given)
    if isinstance(given, Tensor) or not hasattr(given, "__float__"):
        raise TypeError(f"{function}: {argument}: expected a number, got {type(given).__name__}")
    return float(given)
