"""Training on a risk: data, the loop, checkpoints, runs, reports and pictures."""

from sqloss.common.errors import UserError
from sqloss.groups import CommunitySampler
from sqloss.training.custom.own import Callback
from sqloss.training.door import TrainedRun, train

__all__ = ["Callback", "CommunitySampler", "TrainedRun", "UserError", "train"]
