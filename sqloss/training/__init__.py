"""Training on a risk: data, the loop, checkpoints, runs, reports and pictures."""

from sqloss.training.custom.own import Callback
from sqloss.training.door import TrainedRun, train
from sqloss.training.errors import UserError

__all__ = ["Callback", "TrainedRun", "UserError", "train"]
