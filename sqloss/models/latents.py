"""The distributions of latent variables: those that an encoder gives, and what a prior is.

What is random here is a function of a seed (``sqloss.draw_seed``) and of the rows of a batch:
the same seed gives the same draws, and ``rows`` names the rows of a larger draw that a batch has.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sqloss.student_t import normal_rsample_kl, student_t_rsample, student_t_rsample_kl


class Prior(Protocol):
    """A distribution of the latent variables in the place of the model's own."""

    def log_prob(self, z: Tensor, /) -> Tensor:
        """The log density at z [..., latent]: [...]."""

    def sample(self, count: int, seed: Tensor, temperature: float, /) -> Tensor:
        """Draws [count, latent] with the standard deviations times ``temperature``."""


class Normal(NamedTuple):
    """The normal posterior of each sample, with mean loc and variance exp(logvar), against the
    prior with mean 0 and variance 1."""

    loc: Tensor  # [B, latent]
    logvar: Tensor  # [B, latent]

    def log_prob(self, z: Tensor) -> Tensor:
        """The log density at z [..., B, latent], summed over the latents: [..., B] in float64."""
        scale = (self.logvar.double() / 2).exp()
        q = torch.distributions.Normal(self.loc.double(), scale, validate_args=False)
        density: Tensor = q.log_prob(z.double()).sum(-1)
        return density

    def rsample(
        self, seed: Tensor, num_samples: int | None = None, *, rows: Tensor | None = None
    ) -> Tensor:
        """Reparameterised draws: [B, latent], or [S, B, latent] where num_samples = S is given."""
        seed = seed.to(self.loc.device)
        return student_t_rsample(
            math.inf,
            self.loc,
            logvar=self.logvar,
            num_samples=num_samples,
            seed=seed,
            rows=rows,
        )

    def rsample_kl(
        self,
        seed: Tensor,
        num_samples: int = 1,
        *,
        estimator: str = "closed_form",
        reduction: str = "mean",
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``sqloss.normal_rsample_kl``: the draws of ``rsample`` and the KL to the prior."""
        return normal_rsample_kl(
            self.loc,
            logvar=self.logvar,
            num_samples=num_samples,
            estimator=estimator,
            reduction=reduction,
            seed=seed.to(self.loc.device),
            rows=rows,
        )


class StudentT(NamedTuple):
    """The t posterior of each sample, with location loc, scale exp(logvar / 2) and df in every
    dimension, against the prior with location 0, scale 1 and the same df."""

    loc: Tensor  # [B, latent]
    logvar: Tensor  # [B, latent]
    df: Tensor | float

    def log_prob(self, z: Tensor) -> Tensor:
        """The log density at z [..., B, latent], summed over the latents: [..., B] in float64."""
        scale = (self.logvar.double() / 2).exp()
        df = torch.as_tensor(self.df).double()  # of a large one float32 has too few digits
        q = torch.distributions.StudentT(df, self.loc.double(), scale, validate_args=False)
        density: Tensor = q.log_prob(z.double()).sum(-1)
        return density

    def rsample(
        self, seed: Tensor, num_samples: int | None = None, *, rows: Tensor | None = None
    ) -> Tensor:
        """Reparameterised draws: [B, latent], or [S, B, latent] where num_samples = S is given."""
        seed = seed.to(self.loc.device)
        return student_t_rsample(
            self.df,
            self.loc,
            logvar=self.logvar,
            num_samples=num_samples,
            seed=seed,
            rows=rows,
        )

    def rsample_kl(
        self,
        seed: Tensor,
        num_samples: int = 1,
        *,
        estimator: str = "mc",
        reduction: str = "mean",
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``sqloss.student_t_rsample_kl``: the draws of ``rsample`` and their KL to the prior."""
        return student_t_rsample_kl(
            self.df,
            self.loc,
            logvar=self.logvar,
            num_samples=num_samples,
            estimator=estimator,
            reduction=reduction,
            seed=seed.to(self.loc.device),
            rows=rows,
        )
