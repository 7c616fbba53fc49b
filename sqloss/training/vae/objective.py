"""The objective of a VAE: a risk of its bound, or of one term of it and the mean of the other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from sqloss.training.risks import Risk

TAIL_TERMS = ("elbo", "reconstruction")  # what the risk may be of

OfLosses = Callable[[Mapping[str, Tensor]], Tensor]
Reduction = Callable[..., Tensor]  # losses [B], and what else a risk needs of them, to a scalar


@dataclass(frozen=True)
class Objective:
    """The risk of one loss for each sample, and what is added to it."""

    risk: Reduction
    risked: OfLosses
    """From a model's losses to those that the risk is taken of, [B]."""
    mean: Reduction = Tensor.mean
    added: Callable[[Mapping[str, Tensor], Reduction], Tensor] | None = None
    """To a scalar, from a model's losses and ``mean``."""

    def __call__(self, losses: Mapping[str, Tensor], **needed: Tensor) -> Tensor:
        value = self.risk(self.risked(losses), **needed)
        return value if self.added is None else value + self.added(losses, self.mean)


def vae_objective(risk: Reduction, tail_term: str, beta: float, iwae_samples: int) -> Objective:
    """The objective of a VAE, whose tail is that of the whole bound or of one of its terms.

    With iwae_samples > 0 the bound is the importance-weighted one, which has no such terms.
    """
    if iwae_samples:
        return Objective(risk, lambda losses: losses["negative_iw_bound"])
    return {
        "elbo": Objective(risk, lambda losses: losses["reconstruction"] + beta * losses["kl"]),
        "reconstruction": Objective(
            risk,
            lambda losses: losses["reconstruction"],
            added=lambda losses, mean_of: beta * mean_of(losses["kl"]),
        ),
    }[tail_term]


def regrets(losses: Mapping[str, Tensor], of_reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each image loses against a reference model, term by term.

    A term of which an objective takes the mean loses a constant: its gradient stays.
    """
    return {name: values - of_reference[name] for name, values in losses.items()}


def objective_name(
    risk: Risk, tail_term: str, beta: float, iwae_samples: int, reference: str = ""
) -> str:
    """The objective that ``vae_objective`` makes, in words.

    ``reference`` is the run whose model's losses are taken off those that a risk, other than the
    mean, is of.
    """
    kl = "KL" if beta == 1 else f"{beta:g} KL"
    loss = "-ELBO" if beta == 1 else f"(reconstruction + {kl})"
    loss = f"-IW-{iwae_samples} bound" if iwae_samples else loss
    if risk.is_mean:
        return f"{risk.words} of {loss}"
    is_split = tail_term == "reconstruction"
    of_risk = "reconstruction" if is_split else loss
    against = f"regret against {reference}, by {of_risk}" if reference else of_risk
    return f"{risk.words} of {against}{f' + mean of {kl}' if is_split else ''}"
