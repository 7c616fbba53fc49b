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
        values_each = x.new_tensor([x.numel() / self.num_features], dtype=torch.float64)
        sums = torch.cat([x.sum((0, 2, 3), dtype=torch.float64), values_each])
        sums = ranks.summed(sums)
        count = sums[-1]
        mean = (sums[:-1] / count).to(x.dtype)
        centred = x - mean[:, None, None]
        variance = ranks.summed(centred.square().sum((0, 2, 3), dtype=torch.float64)) / count
        self._track(mean, variance * count / (count - 1))
        scale = self.weight * (variance + self.eps).rsqrt().to(x.dtype)
        return torch.addcmul(self.bias[:, None, None], centred, scale[:, None, None])

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance.to(mean.dtype), self.momentum)


def over_ranks(model: Model) -> Model:
    """The model, where there are several ranks with these batch norms in the place of its own."""
    if ranks.count() > 1:
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = BatchNorm2d
    return model
