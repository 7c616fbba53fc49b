"""Batch norm by the statistics of a whole batch whose images are spread over ranks.

torch.nn.SyncBatchNorm is for GPUs alone, and for ranks that all have images.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sqloss.training import ranks

Model = TypeVar("Model", bound=nn.Module)


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d of the images of all ranks, which differs from it by rounding alone.

    A rank may have no image. Gradients flow through the statistics to the images of all ranks.
    Out of training, and with one rank, it is nn.BatchNorm2d itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or ranks.count() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        normed, mean, variance = _Normalise.apply(x, self.eps)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        return torch.addcmul(self.bias[:, None, None], normed, self.weight[:, None, None])


class _Normalise(torch.autograd.Function):
    """The standard scores of x; and its mean and unbiased variance, without gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.double()  # in which a mean square minus a squared mean loses nothing
        (values, square), count = _means(wide, wide.square())
        variance = square - values.square()
        scale = (variance + eps).rsqrt()
        normed = ((wide - _spread(values)) * _spread(scale)).to(x.dtype)
        mean, unbiased = values.to(x.dtype), (variance * count / (count - 1)).to(x.dtype)
        ctx.save_for_backward(normed, scale)
        ctx.mark_non_differentiable(mean, unbiased)
        return normed, mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        normed, scale = ctx.saved_tensors
        (mean, slope), _count = _means(gradient, gradient * normed)
        rest = gradient - _spread(mean) - normed * _spread(slope)
        return (_spread(scale) * rest).to(gradient.dtype), None


def _means(*values: Tensor) -> tuple[Tensor, Tensor]:
    """The means of such values over all ranks, for each channel, and of how many they are."""
    sums = [each.sum((0, 2, 3), dtype=torch.float64) for each in values]
    own_count = sums[0].new_tensor([values[0].numel() / values[0].shape[1]])
    totals = ranks.summed(torch.cat([*sums, own_count]))
    return (totals[:-1] / totals[-1]).view(len(sums), -1), totals[-1]


def _spread(of_channels: Tensor) -> Tensor:
    return of_channels[:, None, None]


def over_ranks(model: Model) -> Model:
    """The model, where there are several ranks with these batch norms in the place of its own."""
    if ranks.count() > 1:
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = BatchNorm2d
    return model
