"""Losses as modules: where torch.nn has one of the same name, with its arguments and a tail."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sqloss._checks import resolve_tail_fraction
from sqloss.losses import (
    cvar_binary_cross_entropy_with_logits,
    cvar_cross_entropy,
    cvar_gaussian_nll_loss,
    cvar_mse_loss,
    cvar_smooth_l1_loss,
)
from sqloss.superquantile import cvar


class _Options(nn.Module):
    """Keeps the options of a function as attributes that may be set at any step."""

    alpha: float | None
    tail_fraction: float | None

    def __init__(self, **options: Any) -> None:
        super().__init__()
        resolve_tail_fraction(type(self).__name__, options["alpha"], options["tail_fraction"])
        for name, value in options.items():
            setattr(self, name, value)
        self._names = tuple(options)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        parameters = inspect.signature(type(self)).parameters
        return ", ".join(
            f"{name}={value!r}"
            for name, value in self._options().items()
            if value != parameters[name].default
        )


class CVaR(_Options):
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
        super().__init__(alpha=alpha, tail_fraction=tail_fraction, dim=dim, keepdim=keepdim)

    def forward(
        self, losses: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        return cvar(losses, weight=weight, mask=mask, **self._options())


class BCEWithLogitsLoss(_Options):
    """:func:`sqloss.cvar_binary_cross_entropy_with_logits` as a module, with its arguments.

    ``weight`` and ``pos_weight`` are buffers: they move with the module and are in its state_dict.
    ``extra`` is given with each call. Every other option is an attribute that may be set at any
    step.

    Example::

        >>> import torch, sqloss
        >>> criterion = sqloss.nn.BCEWithLogitsLoss(alpha=0.5, reduction="sum")
        >>> criterion(torch.tensor([[0., 0.], [9., 9.]]), torch.ones(2, 2))
        tensor(1.3863)
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        alpha: float | None = None,
        tail_fraction: float | None = None,
        pos_weight: Tensor | None = None,
        reduction: str = "mean",
        sample_dims: int = 1,
        return_losses: bool = False,
    ) -> None:
        super().__init__(
            alpha=alpha,
            tail_fraction=tail_fraction,
            reduction=reduction,
            sample_dims=sample_dims,
            return_losses=return_losses,
        )
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)

    def forward(
        self, input: Tensor, target: Tensor, *, extra: Tensor | None = None
    ) -> Tensor | Any:
        return cvar_binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            pos_weight=self.pos_weight,
            extra=extra,
            **self._options(),
        )


class CrossEntropyLoss(_Options):
    """:func:`sqloss.cvar_cross_entropy` as a module, with its arguments.

    ``weight`` is a buffer: it moves with the module and is in its state_dict. ``extra`` is given
    with each call. Every other option is an attribute that may be set at any step.

    Example::

        >>> import torch, sqloss
        >>> criterion = sqloss.nn.CrossEntropyLoss(alpha=0.5)
        >>> criterion(torch.tensor([[0., 0.], [9., 0.]]), torch.tensor([1, 0]))
        tensor(0.6931)
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        alpha: float | None = None,
        tail_fraction: float | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        return_losses: bool = False,
    ) -> None:
        super().__init__(
            alpha=alpha,
            tail_fraction=tail_fraction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            return_losses=return_losses,
        )
        self.register_buffer("weight", weight)

    def forward(
        self, input: Tensor, target: Tensor, *, extra: Tensor | None = None
    ) -> Tensor | Any:
        return cvar_cross_entropy(input, target, self.weight, extra=extra, **self._options())


class MSELoss(_Options):
    """:func:`sqloss.cvar_mse_loss` as a module, with its arguments; ``extra`` and ``weight`` are
    given with each call. Every other option is an attribute that may be set at any step.

    Example::

        >>> import torch, sqloss
        >>> criterion = sqloss.nn.MSELoss(alpha=0.5)
        >>> criterion(torch.tensor([[1.], [2.]]), torch.zeros(2, 1))
        tensor(4.)
    """

    def __init__(
        self,
        *,
        alpha: float | None = None,
        tail_fraction: float | None = None,
        reduction: str = "mean",
        sample_dims: int = 1,
        return_losses: bool = False,
    ) -> None:
        super().__init__(
            alpha=alpha,
            tail_fraction=tail_fraction,
            reduction=reduction,
            sample_dims=sample_dims,
            return_losses=return_losses,
        )

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> Tensor | Any:
        return cvar_mse_loss(input, target, weight, extra=extra, **self._options())


class SmoothL1Loss(_Options):
    """:func:`sqloss.cvar_smooth_l1_loss` as a module, with its arguments; ``extra`` and ``weight``
    are given with each call. Every other option is an attribute that may be set at any step.

    Example::

        >>> import torch, sqloss
        >>> criterion = sqloss.nn.SmoothL1Loss(alpha=0.5, delta=2.0)  # Huber
        >>> criterion(torch.tensor([[1.], [4.]]), torch.zeros(2, 1))
        tensor(6.)
    """

    def __init__(
        self,
        *,
        alpha: float | None = None,
        tail_fraction: float | None = None,
        beta: float = 1.0,
        delta: float | None = None,
        reduction: str = "mean",
        sample_dims: int = 1,
        return_losses: bool = False,
    ) -> None:
        super().__init__(
            alpha=alpha,
            tail_fraction=tail_fraction,
            beta=beta,
            delta=delta,
            reduction=reduction,
            sample_dims=sample_dims,
            return_losses=return_losses,
        )

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> Tensor | Any:
        return cvar_smooth_l1_loss(input, target, weight=weight, extra=extra, **self._options())


class GaussianNLLLoss(_Options):
    """:func:`sqloss.cvar_gaussian_nll_loss` as a module, with its arguments; ``extra`` is given
    with each call. Every other option is an attribute that may be set at any step.

    Example::

        >>> import torch, sqloss
        >>> criterion = sqloss.nn.GaussianNLLLoss(alpha=0.5)
        >>> criterion(torch.tensor([[1.], [2.]]), torch.zeros(2, 1), var=torch.ones(2, 1))
        tensor(2.)
    """

    def __init__(
        self,
        *,
        alpha: float | None = None,
        tail_fraction: float | None = None,
        full: bool = False,
        eps: float = 1e-6,
        reduction: str = "mean",
        sample_dims: int = 1,
        return_losses: bool = False,
    ) -> None:
        super().__init__(
            alpha=alpha,
            tail_fraction=tail_fraction,
            full=full,
            eps=eps,
            reduction=reduction,
            sample_dims=sample_dims,
            return_losses=return_losses,
        )

    def forward(
        self, input: Tensor, target: Tensor, var: Tensor | float, *, extra: Tensor | None = None
    ) -> Tensor | Any:
        return cvar_gaussian_nll_loss(input, target, var, extra=extra, **self._options())
