"""Batch norm by the statistics of a whole batch whose images are spread over ranks.

torch.nn.SyncBatchNorm is for GPUs alone, and for ranks that all have images.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

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
        assert self.running_mean is not None
        # Near 0, so that squares lose nothing; a copy, as the average moves before backward.
        origin = self.running_mean.clone()[:, None, None]
        x = x - origin
        count = x.new_tensor([x.numel() / self.num_features], dtype=torch.float64)
        sums = (each.sum((0, 2, 3), dtype=torch.float64) for each in (x, x.square()))
        *moments, count = ranks.summed(torch.cat([*sums, count])).split(self.num_features)
        mean, square = (moment / count for moment in moments)
        variance = square - mean.square()
        self._track(mean, variance * count / (count - 1))
        scale = self.weight * (variance + self.eps).rsqrt().to(x.dtype)
        centred = x - mean.to(x.dtype)[:, None, None]
        return torch.addcmul(self.bias[:, None, None], centred, scale[:, None, None])

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean += self.momentum * mean  # which is the distance from it
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)


def over_ranks(model: Model) -> Model:
    """The model, where there are several ranks with these batch norms in the place of its own."""
    if ranks.count() > 1:
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = BatchNorm2d
    return model
