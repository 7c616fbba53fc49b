"""Training on a risk: data, the loop, checkpoints, runs, reports and pictures."""

from sqloss.training.errors import UserError

__all__ = ["UserError"]
