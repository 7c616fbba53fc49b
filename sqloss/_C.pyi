"""The compiled part, bound by csrc/sqloss.cpp."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

def cpu_capability() -> str: ...
def capability_of_cpu() -> str: ...
def lesser_capability(torchs: str, cpus: str) -> str: ...
def cvar(
    losses: Tensor,
    tail_fraction: float,
    weight: Tensor | None,
    mask: Tensor | None,
    dim: Sequence[int],
    keepdim: bool,
    function: str,
) -> Tensor: ...
def value_at_risk(
    losses: Tensor,
    tail_fraction: float,
    weight: Tensor | None,
    mask: Tensor | None,
    dim: Sequence[int],
    keepdim: bool,
    function: str,
) -> Tensor: ...
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
) -> Tensor: ...
def cross_entropy_losses(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    function: str,
) -> Tensor: ...
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
) -> tuple[Tensor, Tensor | None]: ...
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
    none_counts: str,
) -> tuple[Tensor, Tensor | None]: ...
def distributed_superquantile(
    losses: Tensor,
    tail_fraction: float,
    weight: Tensor | None,
    mask: Tensor | None,
    config: Sequence[int],
    ranks: int,
    scale: int,
    all_reduce: Callable[[Tensor], None],
    disagree: Callable[[Tensor], None],
    function: str,
) -> tuple[Tensor, Tensor, Tensor]: ...
def distributed_superquantile_with_gradient(
    value: Tensor,
    losses: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    threshold: Tensor,
    counts: Tensor,
) -> Tensor: ...
def draw_seed(generator: torch.Generator | None, device: torch.device) -> Tensor: ...
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
) -> tuple[Tensor | None, Tensor | None]: ...
