"""What the functions of this package take: a row of features per sample, finite and alike in scale.

The order of the rows is made the same for all permutations of them before anything is computed, and
undone at the end: so a permutation of the rows permutes the groups, and changes nothing else.
"""

import math

import torch
from torch import Tensor

from sqloss._checks import check_floating


def check_features(function: str, features: Tensor) -> None:
    """Raise for what is no matrix of finite floating-point numbers with a row at least."""
    check_floating(function, "features", features)
    if features.dim() != 2 or features.numel() == 0:
        raise ValueError(
            f"{function}: features: expected a row of numbers for each sample, [N, D] with N and D "
            f"from 1 up, got {tuple(features.shape)}"
        )
    wrong = int((~features.isfinite().all(1)).sum())
    if wrong:
        raise ValueError(
            f"{function}: features: expected finite numbers, got NaN or infinities in {wrong} of "
            f"{len(features)} rows"
        )


def check_whole(function: str, argument: str, given: object, least: int) -> None:
    if not isinstance(given, int) or isinstance(given, bool) or given < least:
        raise ValueError(
            f"{function}: {argument}: expected a whole number from {least} up, got {given!r}"
        )


def check_number(function: str, argument: str, given: float, valid: bool, expected: str) -> None:
    if not valid or not math.isfinite(given):
        raise ValueError(f"{function}: {argument}: expected {expected}, got {given!r}")


def canonical(features: Tensor) -> tuple[Tensor, Tensor]:
    """The rows on the CPU in an order that depends on their set alone, and that order, [N].

    ``canonical[i]`` is ``features[order[i]]``. The key of a row is a weighted sum of its numbers,
    in float64: rows of equal keys are equal but for coincidences, and keep their order.
    """
    wide = features.detach().cpu().double()
    weights = torch.arange(1, wide.shape[1] + 1, dtype=torch.float64).sqrt().sin()
    order = (wide * weights).sum(1).argsort(stable=True)
    return wide[order], order


def scaled(features: Tensor, standardise: bool = True) -> Tensor:
    """Features with mean 0 and variance 1, in float32; those that do not vary are 0.

    Without ``standardise`` it is their mean variance that is 1, and they keep their proportions.

    float64 [N, D] in, so that a large mean costs no digits.
    """
    centred = features - features.mean(0)
    # Features divided by their largest size: squares neither overflow nor vanish.
    sizes = centred.abs().amax(0)
    sizes = sizes if standardise else sizes.max()
    centred = centred / sizes.clamp_min(torch.finfo(torch.float64).tiny)
    variance = centred.square().mean(0)
    deviation = (variance if standardise else variance.mean()).sqrt()
    return (centred / deviation.where(deviation > 0, 1)).float()


def restored(values: Tensor, order: Tensor) -> Tensor:
    """Values of the rows in ``canonical`` order, in the order in which the rows were given."""
    given = torch.empty_like(values)
    given[order] = values
    return given
