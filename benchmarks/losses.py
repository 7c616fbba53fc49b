"""The fused losses beside torch's mean of the same loss, and beside the tail without fusion."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measure import BOTH, FLOOR, Case, Contender, Operation, in_graph
from superquantile import tail_size
from torch import Tensor

import sqloss
from sqloss import reference

ALPHA = 0.8
PIXELS = 784
CLASSES = 1000
# Where rounding makes two losses trade places at the threshold, one sample's gradient differs.
TOLERANCE = 1e-3
EXTRA_BYTES_PER_SAMPLE = 32
EXTRA_BYTES = 2**12

FUSED, MEAN, UNFUSED, HALF_FUSED = "sqloss", "torch", "torch + topk().mean()", "torch + sqloss.cvar"


def case(
    loss: Callable[..., Tensor],
    fused: Callable[..., Tensor],
    twin: Callable[..., Sequence[Tensor]],
    make: Callable[[], Sequence[Tensor]],
    shape: Sequence[int],
    samples: int,
    price: str = "mean",
    alpha: float = ALPHA,
    bars: dict[str, float] | None = None,
    gpu_bars: dict[str, float] | None = None,
    leaves: Sequence[int] = (0,),
    capturable: bool = True,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Case:
    """``loss(*inputs, reduction=)`` of F; ``price`` also reduces the elements of a sample, and
    ``capturable`` is of F's loss.
    """
    gpu = device.type == "cuda"

    def losses(*inputs: Tensor) -> Tensor:
        elements = loss(*inputs, reduction="none").reshape(samples, -1)
        return elements.sum(1) if price == "sum" else elements.mean(1)

    k = tail_size(samples, alpha)
    # in halves torch rounds every step, and overflows: shown, not judged
    peer = partial(Contender, exact=False, capturable=capturable)
    return Case(
        shape=shape,
        inputs=make,
        contenders=[
            peer(MEAN, partial(loss, reduction=price)),
            Contender(
                FUSED,
                fused,
                twin,
                bars={in_graph(BOTH): gpu_bars or {}} if gpu else {BOTH: bars or {}},
                extra_bytes=EXTRA_BYTES + EXTRA_BYTES_PER_SAMPLE * samples,
            ),
            peer(UNFUSED, lambda *x: losses(*x).topk(k).values.mean(), twin),
            peer(HALF_FUSED, lambda *x: sqloss.cvar(losses(*x), alpha), twin),
        ],
        leaves=leaves,
        modes=[BOTH, in_graph(BOTH)] if gpu else [BOTH],
        tolerance=TOLERANCE,
        reads=2 - alpha if gpu else 1,  # forward, and in the tail again
    )


def binary_cross_entropy_with_logits(n: int, **like: Any) -> Case:
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return case(
        F.binary_cross_entropy_with_logits,
        partial(sqloss.cvar_binary_cross_entropy_with_logits, alpha=ALPHA, reduction="sum"),
        partial(pointwise_twin, "binary_cross_entropy_with_logits", mean=False),
        lambda: [torch.randn(n, PIXELS, **like), torch.rand(n, PIXELS, **like)],
        [n, PIXELS],
        n,
        price="sum",
        bars={MEAN: 0.13 if wide else 0.25, UNFUSED: 0.25},
        gpu_bars={FLOOR: 1.3, UNFUSED: 0.5},
        **like,
    )


def mse_loss(n: int, **like: Any) -> Case:
    return case(
        F.mse_loss,
        partial(sqloss.cvar_mse_loss, alpha=ALPHA),
        partial(pointwise_twin, "mse"),
        lambda: [torch.randn(n, PIXELS, **like) for _ in range(2)],
        [n, PIXELS],
        n,
        **like,
    )


def smooth_l1_loss(n: int, **like: Any) -> Case:
    return case(
        F.smooth_l1_loss,
        partial(sqloss.cvar_smooth_l1_loss, alpha=ALPHA),
        partial(pointwise_twin, "smooth_l1", parameter=1.0),
        lambda: [torch.randn(n, PIXELS, **like) for _ in range(2)],
        [n, PIXELS],
        n,
        **like,
    )


def gaussian_nll_loss(n: int, **like: Any) -> Case:
    def make() -> list[Tensor]:
        return [
            *(torch.randn(n, PIXELS, **like) for _ in range(2)),
            torch.rand(n, PIXELS, **like) + 0.5,
        ]

    return case(
        F.gaussian_nll_loss,
        partial(sqloss.cvar_gaussian_nll_loss, alpha=ALPHA),
        partial(pointwise_twin, "gaussian_nll", parameter=1e-6),
        make,
        [n, PIXELS],
        n,
        leaves=[0, 2],
        capturable=False,  # F looks for a negative var in Python
        **like,
    )


def cross_entropy(n: int, **like: Any) -> Case:
    return classification([n, CLASSES], ALPHA, {MEAN: 0.7}, **like)


def segmentation(n: int, **like: Any) -> Case:
    side = 512 if like["device"].type == "cuda" else 256
    bars, gpu_bars = {UNFUSED: 0.6}, {UNFUSED: 0.4}
    return classification([n, 21, side, side], 0.9, bars, gpu_bars, **like)


def classification(
    shape: list[int],
    alpha: float,
    bars: dict[str, float],
    gpu_bars: dict[str, float] | None = None,
    **like: Any,
) -> Case:
    n, classes, *pixels = shape

    def make() -> list[Tensor]:
        target = torch.randint(classes, (n, *pixels), device=like["device"])
        return [torch.randn(shape, **like), target]

    return case(
        F.cross_entropy,
        partial(sqloss.cvar_cross_entropy, alpha=alpha),
        partial(cross_entropy_twin, alpha),
        make,
        shape,
        n * torch.Size(pixels).numel(),
        alpha=alpha,
        bars=bars,
        gpu_bars=gpu_bars,
        **like,
    )


OPERATIONS = {
    "binary_cross_entropy_with_logits": Operation(
        "binary_cross_entropy_with_logits, summed over pixels",
        binary_cross_entropy_with_logits,
        [512],
        gpu_sizes=[4096, 65536],
        plot="bars",
    ),
    "cross_entropy": Operation(
        "cross_entropy", cross_entropy, [1024], gpu_sizes=[16384], plot="bars"
    ),
    "segmentation": Operation(
        "cross_entropy of pixels, alpha = 0.9", segmentation, [2], gpu_sizes=[8], plot="bars"
    ),
    "mse_loss": Operation("mse_loss", mse_loss, [512], gpu_sizes=[65536], plot="bars"),
    "smooth_l1_loss": Operation(
        "smooth_l1_loss", smooth_l1_loss, [512], gpu_sizes=[65536], plot="bars"
    ),
    "gaussian_nll_loss": Operation(
        "gaussian_nll_loss, gradients of input and var",
        gaussian_nll_loss,
        [512],
        gpu_sizes=[65536],
        plot="bars",
    ),
}


def pointwise_twin(
    loss: str,
    input: Tensor,
    target: Tensor,
    other: Tensor | None = None,
    parameter: float = 0.0,
    mean: bool = True,
) -> list[Tensor]:
    arguments = (loss, input, target, None, other, parameter, False, 1, mean)
    value, grad_losses = tail(reference.pointwise_losses(*arguments), ALPHA)
    wanted = [True, False, other is not None]
    gradients = reference.pointwise_losses_backward(grad_losses, *arguments, wanted)
    return [value, *(g for g, want in zip(gradients, wanted, strict=True) if want)]


def cross_entropy_twin(alpha: float, input: Tensor, target: Tensor) -> list[Tensor]:
    losses, log_sum_exp = reference.cross_entropy_losses(input, target, None, -100, 0.0)
    value, grad_losses = tail(losses, alpha)
    gradient, _ = reference.cross_entropy_losses_backward(
        grad_losses, input, target, None, log_sum_exp, -100, 0.0, [True, False]
    )
    return [value, gradient]


def tail(losses: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The value, and its gradient in the losses."""
    value, threshold, counts = reference.superquantile(losses, 1 - alpha)
    grad_losses = reference.superquantile_backward(
        torch.ones_like(value), None, losses, None, None, threshold, counts
    )
    return value, grad_losses
