"""Scores of rarity: the controls that communities are compared with.

Both measure how much room a sample has, so they lift what is spread out, and not a compact class.
"""

import torch
from torch import Tensor

from sqloss.groups.features import (
    canonical,
    check_features,
    check_number,
    check_whole,
    restored,
    scaled,
)
from sqloss.groups.neighbours import search


def leverage(features: Tensor, *, ridge: float = 1e-3, standardise: bool = True) -> Tensor:
    r"""The ridge leverage score of each sample: how far the others are from explaining it.

    With the standardised features as the rows :math:`f_i` of F,

    .. math:: l_i = f_i^T (F^T F + \lambda N I)^{-1} f_i \in [0, 1).

    Args:
        features: a row per sample, [N, D], of float16, bfloat16, float32 or float64.
        ridge: :math:`\lambda` > 0.
        standardise: whether each feature is brought to variance 1; without it they keep their
            proportions, as those that have one unit should, such as pixels.

    Returns:
        Tensor: float64 [N] on the CPU. Repeatable; a permutation of the rows permutes it.

    Raises:
        TypeError: ``features`` is no tensor of these dtypes.
        ValueError: it is not [N, D], is empty or not finite; ``ridge`` out of range.

    Source: A. Alaoui and M. W. Mahoney, "Fast randomized kernel ridge regression with statistical
    guarantees", NeurIPS 2015.

    Example::

        >>> import torch
        >>> from sqloss.groups import leverage
        >>> leverage(torch.tensor([[0.0], [0.0], [0.0], [9.0]])).argmax()
        tensor(3)
    """
    check_features("leverage", features)
    check_number("leverage", "ridge", ridge, ridge > 0, "a number above 0")
    rows, order = canonical(features)
    points = scaled(rows, standardise).double()
    ridges = ridge * len(points) * torch.eye(points.shape[1], dtype=torch.float64)
    half = torch.linalg.cholesky(points.T @ points + ridges)
    solved = torch.linalg.solve_triangular(half, points.T, upper=False)
    return restored(solved.square().sum(0), order)


def density(features: Tensor, *, neighbours: int = 10, standardise: bool = True) -> Tensor:
    r"""The distance from each sample to its k-th nearest neighbour: large where few lie.

    Args:
        features: a row per sample, [N, D], of float16, bfloat16, float32 or float64.
        neighbours: k, from 1 up; the farthest where there are fewer.
        standardise: whether each feature is brought to variance 1; without it they keep their
            proportions, as those that have one unit should, such as pixels.

    Returns:
        Tensor: float64 [N] on the CPU; 0 for a single sample. Repeatable; a permutation of the rows
        permutes it.

    Raises:
        TypeError: ``features`` is no tensor of these dtypes.
        ValueError: it is not [N, D], is empty or not finite; ``neighbours`` out of range.

    Source: D. O. Loftsgaarden and C. P. Quesenberry, "A nonparametric estimate of a multivariate
    density function", Ann. Math. Statist. 36(3), 1965.

    Example::

        >>> import torch
        >>> from sqloss.groups import density
        >>> density(torch.tensor([[0.0], [1.0], [2.0], [9.0]]), neighbours=1).argmax()
        tensor(3)
    """
    check_features("density", features)
    check_whole("density", "neighbours", neighbours, 1)
    rows, order = canonical(features)
    if len(rows) == 1:
        return torch.zeros(1, dtype=torch.float64)
    _, distances = search(scaled(rows, standardise), min(neighbours, len(rows) - 1))
    return restored(distances[:, -1].double(), order)
