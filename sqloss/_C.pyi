"""The compiled part, bound by csrc/sqloss.cpp."""

from collections.abc import Sequence

from torch import Tensor

def cpu_capability() -> str: ...
def cvar(
    losses: Tensor,
    tail_fraction: float,
    weight: Tensor | None,
    mask: Tensor | None,
    dim: Sequence[int],
    keepdim: bool,
) -> Tensor: ...
def value_at_risk(
    losses: Tensor,
    tail_fraction: float,
    weight: Tensor | None,
    mask: Tensor | None,
    dim: Sequence[int],
    keepdim: bool,
) -> Tensor: ...
