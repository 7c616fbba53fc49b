"""A mixture of normal or Student-t components: a prior of latent variables that is fitted to them.

A VAE is trained so that the posteriors of all images together look like its prior, and they never
quite do. A mixture fitted to these posteriors (``sqloss.models.mixture_fit``) is the prior to
sample from: its draws lie where the decoder has been trained.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sqloss.groups.sampler import drawn
from sqloss.models.seeding import generator


class Mixture(nn.Module):
    r"""The density of m components with locations loc_j and scales L_j,

    .. math::
        p(z) = \sum_j w_j\, p_j(z), \qquad
        w_j = \frac{n_j^{1 - \mathrm{power}}}{\sum_i n_i^{1 - \mathrm{power}}}

    with sizes n_j. With df = inf, p_j is normal with covariance :math:`L_j L_j^T`; with a finite
    df it is the multivariate Student t of that df, whose scale matrix is :math:`L_j L_j^T`.

    With ``power`` 0 a component weighs what its size is: the mixture is a fit of the data. With 1
    all weigh the same; above 1 the small ones weigh most. Nothing else depends on the power, so
    ``with_power`` gives the mixture another one.

    The parameters are buffers in float64: ``Mixture(**mixture.state_dict())`` is a copy, with
    power 0. All that is computed is computed in float64.

    Args:
        sizes: numbers above 0, [m].
        loc: [m, d].
        scale_tril: lower triangles with a positive diagonal, [m, d, d].
        df: a number or a tensor of one, above 0.
        power: a finite number.

    Raises:
        ValueError: an argument of another shape or range.

    Source: the mixture of t distributions is that of Peel & McLachlan (2000).

    Example::

        >>> import torch, sqloss
        >>> from sqloss.models import VAE
        >>> from sqloss.models.mixture import Mixture
        >>> sizes, loc = torch.tensor([96.0, 32.0]), torch.tensor([[0.0, 0.0], [3.0, 3.0]])
        >>> prior = Mixture(sizes, loc, 0.5 * torch.eye(2).expand(2, 2, 2))
        >>> [round(w, 4) for w in prior.weights.tolist()]
        [0.75, 0.25]
        >>> [round(w, 4) for w in prior.with_power(1).weights.tolist()]
        [0.5, 0.5]
        >>> prior.log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
        >>> model = VAE((1, 8, 8), hidden=(32,), latent=2)
        >>> model.sample(4, sqloss.draw_seed(), prior=prior.with_power(1.5)).shape
        torch.Size([4, 1, 8, 8])
    """

    sizes: Tensor
    loc: Tensor
    scale_tril: Tensor
    df: Tensor

    def __init__(
        self,
        sizes: Tensor,
        loc: Tensor,
        scale_tril: Tensor,
        df: Tensor | float = math.inf,
        *,
        power: float = 0.0,
    ) -> None:
        super().__init__()
        self.power = float(power)
        parameters = {"sizes": sizes, "loc": loc, "scale_tril": scale_tril, "df": df}
        for name, given in parameters.items():
            self.register_buffer(name, torch.as_tensor(given, dtype=torch.float64))
        self._check()

    def _check(self) -> None:
        m, d = self.loc.shape if self.loc.ndim == 2 else (-1, -1)
        for name, expected in (("loc", (m, d)), ("sizes", (m,)), ("scale_tril", (m, d, d))):
            shape = tuple(getattr(self, name).shape)
            if shape != expected or not self.loc.numel():
                raise ValueError(
                    "Mixture: expected sizes [m], loc [m, d] and scale_tril [m, d, d] of one "
                    f"component or more, got {name} {list(shape)}"
                )
        diagonal = self.scale_tril.diagonal(dim1=1, dim2=2)
        for name, valid, needed in (
            ("sizes", self.sizes > 0, "finite numbers above 0"),
            ("loc", self.loc == self.loc, "finite numbers"),
            ("scale_tril", diagonal > 0, "finite numbers, above 0 on the diagonal"),
        ):
            if not (valid.all() and getattr(self, name).isfinite().all()):
                raise ValueError(f"Mixture: {name}: expected {needed}, got others")
        if self.df.numel() != 1 or not self.df > 0:
            raise ValueError(f"Mixture: df: expected a number above 0, got {self.df.tolist()}")
        if not math.isfinite(self.power):
            raise ValueError(f"Mixture: power: expected a finite number, got {self.power}")

    def with_power(self, power: float) -> "Mixture":
        """The same components with the weights of another power."""
        return Mixture(**self.state_dict(), power=power)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def log_weights(self) -> Tensor:
        """[m]."""
        return ((1 - self.power) * self.sizes.log()).log_softmax(0)

    @property
    def weights(self) -> Tensor:
        """[m], with sum 1."""
        return self.log_weights.exp()

    @property
    def effective_share(self) -> float:
        """The effective sample size of drawing members of the components by these weights, as a
        share of all members: 1 at power 0, and smaller the more some members are preferred."""
        shares = self.sizes / self.sizes.sum()
        return (1 / (self.weights.square() / shares).sum()).item()

    def log_prob(self, z: Tensor) -> Tensor:
        """The log density at ``z`` [..., d]: [...], of the dtype of z."""
        flat = z.reshape(-1, z.shape[-1]).to(self.loc)
        logs = [
            log_weight + log_density
            for log_weight, log_density in zip(
                self.log_weights, self._log_densities(flat), strict=True
            )
        ]
        return torch.stack(logs).logsumexp(0).reshape(z.shape[:-1]).to(z)

    def _log_densities(self, z: Tensor) -> Iterator[Tensor]:
        """Those of each component at z [N, d]: one after the other, so in memory of N * d."""
        df, d = self.df, self.loc.shape[1]
        for loc, scale in zip(self.loc, self.scale_tril, strict=True):
            standard = torch.linalg.solve_triangular(scale, (z - loc).T, upper=False)
            squares = standard.square().sum(0)
            log_volume = scale.diagonal().log().sum()
            if df.isinf():
                yield -(squares + d * math.log(2 * math.pi)) / 2 - log_volume
            else:
                log_norm = torch.lgamma((df + d) / 2) - torch.lgamma(df / 2)
                log_norm = log_norm - d / 2 * (df * math.pi).log()
                yield log_norm - (df + d) / 2 * (squares / df).log1p() - log_volume

    def components(self, count: int, seed: Tensor) -> Tensor:
        """Random components by their weights, int64 [count]; ``seed`` as in ``draw_seed``."""
        return drawn(self.weights.cpu(), count, generator(int(seed), "components"))

    def draws(self, components: Tensor, seed: Tensor, temperature: float = 1.0) -> Tensor:
        """A draw of each of these components, [count, d] in float64.

        ``temperature`` scales their standard deviations: 0 gives their locations.
        """
        noise_draws = generator(int(seed), "latents")
        noise = torch.randn(
            len(components), self.loc.shape[1], dtype=torch.float64, generator=noise_draws
        )
        if self.df.isfinite():
            halves = (self.df.cpu() / 2).expand(len(components)).contiguous()
            chi_squares = 2 * torch._standard_gamma(halves, generator=noise_draws)
            noise *= (self.df.cpu() / chi_squares).sqrt()[:, None]
        noise, components = noise.to(self.loc), components.to(self.loc.device)
        z = self.loc[components]
        for component in components.unique():
            chosen = components == component
            z[chosen] += temperature * (noise[chosen] @ self.scale_tril[component].T)
        return z

    def sample(self, count: int, seed: Tensor, temperature: float = 1.0) -> Tensor:
        """Draws of the mixture, [count, d] in float64, which depend on nothing but the arguments.

        The same seed gives mixtures with different powers the same noise.
        """
        return self.draws(self.components(count, seed), seed, temperature)
