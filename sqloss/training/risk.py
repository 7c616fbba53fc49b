"""A *risk* turns a vector of losses into the scalar to train on: their mean, or their tail.

An *objective* says of which losses the risk is taken. Any model whose losses are per sample can
be trained on any risk: the model never averages, and the risk never knows the model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from sqloss import distributed
from sqloss.nn import CVaR
from sqloss.training import ranks

Risk = Callable[[Tensor], Tensor]
OfLosses = Callable[[Mapping[str, Tensor]], Tensor]

TAILS = ("elbo", "reconstruction")


def risk(alpha: float) -> Risk:
    """The mean of the worst 1 - alpha share of the losses."""
    return mean if alpha == 0 else CVaR(alpha)


def risk_over_ranks(alpha: float) -> Risk:
    """The risk of the losses of all ranks, of which each gives its own."""
    return risk(alpha) if ranks.count() == 1 else partial(distributed.cvar, alpha=alpha)


def mean(losses: Tensor) -> Tensor:
    """The literal mean, so that alpha = 0 is bit for bit the plain training."""
    return losses.mean()


def risk_name(alpha: float) -> str:
    """What ``risk`` computes, in words."""
    return "mean" if alpha == 0 else f"CVaR {alpha:g}"


@dataclass(frozen=True)
class Objective:
    """The risk of one loss for each sample, and what is added to it."""

    alpha: float  # of the risk
    risked: OfLosses
    """From a model's losses to those that the risk is taken of, [B]."""
    added: Callable[[Mapping[str, Tensor], Risk], Tensor] | None = None
    """To a scalar, from a model's losses and what takes their mean."""
    risks: Callable[[float], Risk] = risk
    """From an alpha to the risk, whose alpha 0 is the mean."""

    @property
    def is_of_tail_alone(self) -> bool:
        """Whether samples outside the tail have no part in the gradient."""
        return self.alpha > 0 and self.added is None

    def __call__(self, losses: Mapping[str, Tensor]) -> Tensor:
        value = self.risks(self.alpha)(self.risked(losses))
        return value if self.added is None else value + self.added(losses, self.risks(0.0))


def vae_objective(alpha: float, tail: str, beta: float, iwae_samples: int) -> Objective:
    """The objective of a VAE, whose tail is that of the whole bound or of one of its terms.

    With iwae_samples > 0 the bound is the importance-weighted one, which has no such terms.
    """
    if iwae_samples:
        return Objective(alpha, lambda losses: losses["negative_iw_bound"])
    return {
        "elbo": Objective(alpha, lambda losses: losses["reconstruction"] + beta * losses["kl"]),
        "reconstruction": Objective(
            alpha,
            lambda losses: losses["reconstruction"],
            lambda losses, mean_of: beta * mean_of(losses["kl"]),
        ),
    }[tail]


def objective_name(alpha: float, tail: str, beta: float, iwae_samples: int) -> str:
    """What ``vae_objective`` computes, in words."""
    if iwae_samples:
        return f"{risk_name(alpha)} of -IW-{iwae_samples} bound"
    kl = "KL" if beta == 1 else f"{beta:g} KL"
    loss = "-ELBO" if beta == 1 else f"(reconstruction + {kl})"
    if alpha > 0 and tail == "reconstruction":
        return f"{risk_name(alpha)} of reconstruction + mean of {kl}"
    return f"{risk_name(alpha)} of {loss}"
