"""Mixtures fitted to the aggregate posterior: that of the latents of all images together.

The posterior of image i is loc_i + scale_i * noise, in every dimension by itself, where the noise
is normal or Student's t. One component of the mixture stands for each group of images:

1. Its location is the mean of the group's loc_i.
2. Its covariance is that of the group's loc_i, plus the mean variance of their posteriors: by the
   law of total variance that of a latent drawn from the posterior of a random image of the group.
   For noise of a df above 2 the variance is scale^2 * df / (df - 2).
3. Of the covariance of n locations the correlations are shrunk, by n / (n + ``SHRINKAGE``): those
   of a few locations are mostly chance.
4. Its size is n.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sqloss.models.mixture import Mixture
from sqloss.models.seeding import generator
from sqloss.student_t import draw_seed, student_t_rsample

SHRINKAGE = 20  # images
# The least variance of a component beside its largest one: what a Cholesky factor in float64
# can tell from singular, with room, and too little to be seen in an image.
LEAST_VARIANCE = 1e-8
# Of each ten images one is held out where components of several families are compared.
HELD_OUT = 10


class Moments(NamedTuple):
    """Of the groups of some images."""

    sizes: Tensor  # [m]
    loc: Tensor  # [m, d]
    between: Tensor  # the covariance of the posteriors' locations, shrunk, [m, d, d]
    within: Tensor  # the mean of their squared scales, [m, d]


def fit_mixture(
    loc: Tensor, scale: Tensor, groups: Tensor, *, df: float = math.inf, seed: int = 0
) -> Mixture:
    """The mixture of one component per group that the module describes.

    Components are normal where the posteriors are. For Student-t posteriors several families are
    fitted to nine tenths of the images, and the one that gives draws from the posteriors of the
    last tenth the highest mean log density is fitted to all: normal components, and t ones of one,
    two and four times the posteriors' df with the same covariance; and t ones of the posteriors'
    df whose squared scale is the covariance of the locations plus the mean squared scale. Of a df
    of 2 or less, whose variance is infinite, it is always the last.

    Args:
        loc, scale: of each image's posterior, [n, d]; the scales are above 0.
        groups: the number of each image's group, int64 [n], from 0 up; every number has an image.
        df: of the posteriors, inf where they are normal.
        seed: of which images are held out, and of their draws.

    Raises:
        ValueError: arguments of other shapes or ranges.
    """
    check_posteriors("fit_mixture", loc, scale)
    if groups.shape != loc.shape[:1] or groups.dtype != torch.int64:
        raise ValueError(
            f"fit_mixture: groups: expected int64 of shape [{len(loc)}], got {groups.dtype} of "
            f"shape {list(groups.shape)}"
        )
    if len(groups.unique()) != groups.max() + 1 or groups.min() < 0:
        raise ValueError("fit_mixture: groups: expected the numbers from 0 up, each of an image")
    loc, scale, groups = loc.double().cpu(), scale.double().cpu(), groups.cpu()
    fits = families(df)
    best = 0
    if len(fits) > 1 and len(loc) >= HELD_OUT:
        best = best_family(loc, scale, groups, df, seed)
    return component_fit(moments(loc, scale, groups), df, *fits[best])


def check_posteriors(function: str, loc: Tensor, scale: Tensor) -> None:
    if loc.ndim != 2 or not len(loc) or scale.shape != loc.shape:
        raise ValueError(
            f"{function}: expected loc and scale [n, d] of one image or more, got "
            f"{list(loc.shape)} and {list(scale.shape)}"
        )
    if not (loc.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
        raise ValueError(f"{function}: expected finite loc, and finite scale above 0, got others")


def families(df: float) -> list[tuple[float, bool]]:
    """The df of components, and whether they have the covariance of the aggregate posterior."""
    if math.isinf(df):
        return [(df, True)]
    with_covariance = [(math.inf, True), *((times * df, True) for times in (1, 2, 4))]
    return [*(with_covariance if df > 2 else ()), (df, False)]


def moments(loc: Tensor, scale: Tensor, groups: Tensor) -> Moments:
    sizes, centres, between, within = [], [], [], []
    for group in range(int(groups.max()) + 1):
        chosen = groups == group
        members, size = loc[chosen], int(chosen.sum())
        centred = members - members.mean(0)
        covariance = centred.T @ centred / size
        variances = covariance.diagonal().diag()
        shrunk = variances + size / (size + SHRINKAGE) * (covariance - variances)
        sizes.append(size)
        centres.append(members.mean(0))
        between.append(shrunk)
        within.append(scale[chosen].square().mean(0))
    return Moments(
        torch.tensor(sizes, dtype=torch.float64),
        *map(torch.stack, (centres, between, within)),
    )


def component_fit(
    of_groups: Moments, df: float, component_df: float, by_covariance: bool
) -> Mixture:
    """Components of a family of ``families``, for posteriors of this df."""
    sizes, loc, between, within = of_groups
    squares = between
    if by_covariance:
        within = within * variance_of_t(df)
    # Nothing but images that are the same, with posteriors that are points, comes near this
    largest = (between.diagonal(dim1=1, dim2=2) + within).amax(1, keepdim=True)
    within = within.maximum(LEAST_VARIANCE * largest)
    squares = between + within.diag_embed()
    if by_covariance:
        squares = squares / variance_of_t(component_df)
    return Mixture(sizes, loc, torch.linalg.cholesky(squares), component_df)


def variance_of_t(df: float) -> float:
    """That of Student's t with scale 1."""
    return 1.0 if math.isinf(df) else df / (df - 2)


def best_family(loc: Tensor, scale: Tensor, groups: Tensor, df: float, seed: int) -> int:
    """The number of the family that explains the draws of held-out images best."""
    order = torch.randperm(len(loc), generator=generator(seed, "held out"))
    held, kept = order[::HELD_OUT], order.reshape(-1)[torch.arange(len(order)) % HELD_OUT > 0]
    draws = aggregate_draws(loc[held], scale[held], df=df, seed=seed)
    _, kept_groups = groups[kept].unique(return_inverse=True)
    of_groups = moments(loc[kept], scale[kept], kept_groups)
    found = [
        component_fit(of_groups, df, *family).log_prob(draws).mean().item()
        for family in families(df)
    ]
    return found.index(max(found))


def aggregate_draws(loc: Tensor, scale: Tensor, *, df: float = math.inf, seed: int = 0) -> Tensor:
    """A draw from the posterior of each image, [n, d] in float64."""
    draw = draw_seed(generator=generator(seed, "aggregate posterior"))
    return student_t_rsample(df, loc.double(), scale.double(), seed=draw)
