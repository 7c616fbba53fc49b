"""Batch norm by the statistics of a whole batch whose samples are spread over ranks.

torch.nn.SyncBatchNorm is for GPUs alone, and for ranks that all have samples.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sqloss.common import ranks
from sqloss.common.errors import UserError

Model = TypeVar("Model", bound=nn.Module)


class OverRanks(nn.modules.batchnorm._BatchNorm):
    """Batch norm of the samples of all ranks, which differs from torch's by rounding alone.

    A rank may have no sample. Gradients flow through the statistics to the samples of all ranks.
    Out of training, and with one rank, it is torch's own.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or ranks.count() == 1:
            return super().forward(x)
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        out: Tensor
        out, mean, variance = _Normalise.apply(x, self.eps)
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            share = self.momentum
            if share is None:  # the mean of all batches
                share = 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            self.running_var.lerp_(variance.to(self.running_var.dtype), share)
        if self.affine:
            out = torch.addcmul(_spread(self.bias, x), out, _spread(self.weight, x)).to(x.dtype)
        return out


class BatchNorm1d(OverRanks, nn.BatchNorm1d):
    pass


class BatchNorm2d(OverRanks, nn.BatchNorm2d):
    pass


class BatchNorm3d(OverRanks, nn.BatchNorm3d):
    pass


class SyncBatchNorm(OverRanks, nn.SyncBatchNorm):
    pass


KINDS: dict[type, type] = {
    kind.__bases__[1]: kind for kind in (BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)
}


class _Normalise(torch.autograd.Function):
    """The standard scores of x; and its mean and unbiased variance, without gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.double()  # in which a mean square minus a squared mean loses nothing
        (values, square), count = _means(wide, wide.square())
        variance = square - values.square()
        scale = (variance + eps).rsqrt()
        normed = ((wide - _spread(values, x)) * _spread(scale, x)).to(x.dtype)
        unbiased = variance * count / (count - 1)
        ctx.save_for_backward(normed, scale)
        ctx.mark_non_differentiable(values, unbiased)
        return normed, values, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        normed, scale = ctx.saved_tensors
        (mean, slope), _count = _means(gradient, gradient * normed)
        rest = gradient - _spread(mean, normed) - normed * _spread(slope, normed)
        return (_spread(scale, normed) * rest).to(gradient.dtype), None


def _means(*values: Tensor) -> tuple[Tensor, Tensor]:
    """The means of such values over all ranks, for each channel, and of how many they are."""
    others = [dim for dim in range(values[0].dim()) if dim != 1]
    sums = [each.sum(others, dtype=torch.float64) for each in values]
    own_count = sums[0].new_tensor([values[0].numel() / values[0].shape[1]])
    totals = ranks.summed(torch.cat([*sums, own_count]))
    return (totals[:-1] / totals[-1]).view(len(sums), -1), totals[-1]


def _spread(of_channels: Tensor, x: Tensor) -> Tensor:
    return of_channels.view(-1, *[1] * (x.dim() - 2))


def over_ranks(model: Model) -> Model:
    """The model, where there are several ranks with these batch norms in the place of its own.

    Raises:
        UserError: it has a batch norm of another kind.
    """
    if ranks.count() > 1:
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if isinstance(module, OverRanks):
                    continue
                if type(module) not in KINDS:
                    raise UserError(
                        "model: expected batch norms of torch's own kinds with several processes, "
                        "which become those of the whole batch, got "
                        f"{type(module).__name__} as {name}"
                    )
                module.__class__ = KINDS[type(module)]
    return model
