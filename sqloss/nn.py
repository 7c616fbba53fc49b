"""Losses as modules."""

from collections.abc import Sequence

from torch import Tensor, nn

from sqloss.superquantile import cvar, resolve_tail_fraction


class CVaR(nn.Module):
    """Reduces losses to the mean of their worst ``1 - alpha``: :func:`sqloss.cvar` as a module.

    Args:
        alpha: the confidence level in [0, 1), a plain attribute that may be set at any step.
        tail_fraction: the size of the tail, in (0, 1], instead of ``alpha``.
        dim: the dimension or dimensions to reduce; ``None`` for all.
        keepdim: whether reduced dimensions stay, with size 1.

    Shapes, dtypes and errors are those of :func:`sqloss.cvar`.

    Example::

        >>> import torch, sqloss
        >>> criterion = sqloss.nn.CVaR(alpha=0.5)
        >>> criterion(torch.tensor([1., 2., 3., 4.]))
        tensor(3.5000)
    """

    def __init__(
        self,
        alpha: float | None = None,
        *,
        tail_fraction: float | None = None,
        dim: int | Sequence[int] | None = None,
        keepdim: bool = False,
    ) -> None:
        super().__init__()
        resolve_tail_fraction("CVaR", alpha, tail_fraction)
        self.alpha = alpha
        self.tail_fraction = tail_fraction
        self.dim = dim
        self.keepdim = keepdim

    def forward(
        self, losses: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        return cvar(
            losses,
            self.alpha,
            tail_fraction=self.tail_fraction,
            dim=self.dim,
            weight=weight,
            mask=mask,
            keepdim=self.keepdim,
        )

    def extra_repr(self) -> str:
        shown = {name: getattr(self, name) for name in ("alpha", "tail_fraction", "dim")}
        shown["keepdim"] = self.keepdim or None
        return ", ".join(f"{name}={value}" for name, value in shown.items() if value is not None)
