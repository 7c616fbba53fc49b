"""Training on a risk: data, the loop, checkpoints, runs, reports and pictures."""

from sqloss.groups import CommunitySampler
from sqloss.training.custom.own import Callback
from sqloss.training.door import TrainedRun, train
from sqloss.training.errors import UserError

__all__ = ["Callback", "CommunitySampler", "TrainedRun", "UserError", "train"]
