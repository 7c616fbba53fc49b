"""Training on a risk: data, the loop, checkpoints, runs, reports and pictures."""

from sqloss.training.errors import UserError
from sqloss.training.risk import risk

__all__ = ["UserError", "risk"]
