"""How often to draw each sample, from its group or from its score."""

import math

import torch
from torch import Tensor

from sqloss.groups.communities import check_groups
from sqloss.groups.features import check_number, check_whole

MOST_POWER = 100.0  # that a target may take
HALVINGS = 60  # of the range of powers: to one part in 1e16


def probabilities(
    groups: Tensor,
    power: float = 1.0,
    *,
    lift: bool = True,
    min_size: int = 1,
    lifted: Tensor | None = None,
    min_draw: float = 0.0,
) -> Tensor:
    r"""The probability of drawing each sample, which lifts those of small groups.

    With :math:`n_j` the size of the group j of sample i and :math:`\bar n` the mean size,

    .. math::
        w_i = (\bar n / n_j)^{\text{power}}, \text{ with lift }
        w_i = \max(1, \bar n / n_j)^{\text{power}}; \qquad p_i = w_i \big/ \textstyle\sum_k w_k.

    So a group is drawn in proportion to :math:`n_j^{1 - \text{power}}` without lift: at 0 samples
    are equally likely, at 1 groups are. With lift no sample of a large group has a smaller weight
    than at power 0. But all weights add up to more then, so that its share of the draws is smaller;
    ``min_draw`` bounds this: see :func:`keep_min_draw`.

    Args:
        groups: the number of each sample's group, int64 [N], from 0 up; numbers may be without a
            sample.
        power: from 0 up.
        lift: whether weights never go below 1.
        min_size: groups with fewer samples have the weight 1.
        lifted: bool, one per group: where it is False the group has a weight of 1 at most, as what
            is not stable enough to be lifted. ``None``: all may be lifted.
        min_draw: in [0, 1]: the least share of its draws at power 0 that a sample keeps.

    Returns:
        Tensor: float64 [N], which sums to 1. Repeatable; a permutation of the samples permutes it.

    Raises:
        ValueError: ``groups`` is not int64 [N] from 0 up; ``power``, ``min_size`` or ``min_draw``
            out of range; ``lifted`` is not bool with an entry for each group.

    Example::

        >>> import torch
        >>> from sqloss.groups import probabilities
        >>> probabilities(torch.tensor([0, 0, 0, 1]), lift=False)
        tensor([0.1667, 0.1667, 0.1667, 0.5000], dtype=torch.float64)
        >>> probabilities(torch.tensor([0, 0, 0, 1]))
        tensor([0.2000, 0.2000, 0.2000, 0.4000], dtype=torch.float64)
    """
    check_groups("probabilities", groups)
    check_number("probabilities", "power", power, power >= 0, "a number from 0 up")
    check_min_draw("probabilities", min_draw)
    sizes = torch.bincount(groups)
    ratio = ratios("probabilities", sizes, lift, min_size, lifted)
    return per_sample(ratio, power, sizes, min_draw)[groups]


def ratios(
    function: str, sizes: Tensor, lift: bool, min_size: int, lifted: Tensor | None
) -> Tensor:
    """What the weight of a sample of each group is a power of, float64: 1 of empty groups."""
    check_whole(function, "min_size", min_size, 1)
    ratio = sizes.sum() / (sizes > 0).sum() / sizes.double().clamp_min(1)
    if lift:
        ratio = ratio.clamp_min(1)
    ratio[(sizes < min_size) | (sizes == 0)] = 1
    if lifted is not None:
        if lifted.dtype != torch.bool or lifted.shape != sizes.shape:
            raise ValueError(
                f"{function}: lifted: expected bool [{len(sizes)}], got {lifted.dtype} "
                f"{tuple(lifted.shape)}"
            )
        ratio = ratio.where(lifted.to(ratio.device), ratio.clamp_max(1))
    return ratio


def per_sample(ratio: Tensor, power: float, sizes: Tensor, min_draw: float) -> Tensor:
    """The probability of a sample of each group, from the ratios and the sizes of the groups."""
    weights = powers(ratio, power)
    return raised(weights / (weights * sizes).sum(), sizes, min_draw)


def power_of_share(
    groups: Tensor,
    target_min_share: float,
    *,
    lift: bool = True,
    min_size: int = 1,
    lifted: Tensor | None = None,
    min_draw: float = 0.0,
) -> tuple[float, float]:
    r"""The least power at which every group that may be lifted has this share of the draws.

    The share of the draws of the group that has least of them, among those that may be lifted,
    rises with the power up to some power, as the smallest groups gain, and falls after it, as they
    take from the others: it is the least of functions whose logarithms are concave, or that stay at
    what ``min_draw`` leaves them. So the power is found by bisection, between 0 and where it is
    largest. Without lift this is at 1, where all groups are drawn alike.

    Args:
        groups: the number of each sample's group, int64 [N], from 0 up.
        target_min_share: in (0, 1).
        lift, min_size, lifted, min_draw: as of :func:`probabilities`.

    Returns:
        tuple[float, float]: the power, from 0 to 100, and the least share of the draws that a group
        which may be lifted has then. Where no power reaches the target, the one that comes nearest;
        where no group may be lifted, 0 and infinity. Repeatable.

    Raises:
        ValueError: as ``probabilities``; ``target_min_share`` out of range.

    Example::

        >>> import torch
        >>> from sqloss.groups import power_of_share
        >>> power, reached = power_of_share(torch.tensor([0] * 64 + [1] * 16 + [2]), 0.1)
        >>> round(power, 3), round(reached, 3)
        (0.688, 0.1)
    """
    function = "power_of_share"
    check_groups(function, groups)
    valid = 0 < target_min_share < 1
    check_number(function, "target_min_share", target_min_share, valid, "a number in (0, 1)")
    check_min_draw(function, min_draw)
    sizes = torch.bincount(groups)
    ratio = ratios(function, sizes, lift, min_size, lifted)
    may_be_lifted = sizes >= min_size
    if lifted is not None:
        may_be_lifted &= lifted.to(may_be_lifted.device)
    if not may_be_lifted.any():
        return 0.0, math.inf

    def least(power: float) -> float:
        drawn = per_sample(ratio, power, sizes, min_draw) * sizes
        return float(drawn[may_be_lifted].min())

    low, high = 0.0, MOST_POWER
    for _ in range(2 * HALVINGS):  # thirds: where it is largest, the first such power
        first, second = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, second) if least(first) >= least(second) else (first, high)
    top, low = high, 0.0
    if least(low) >= min(target_min_share, least(top)):
        return low, least(low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        reached = least(middle) >= min(target_min_share, least(top))
        low, high = (low, middle) if reached else (middle, high)
    return high, least(high)


def keep_min_draw(p: Tensor, min_draw: float) -> Tensor:
    r"""Probabilities at which every sample keeps this share of its draws.

    .. math::
        p'_i = \max(f / N, \, c \, p_i), \quad c \text{ such that } \textstyle\sum_i p'_i = 1.

    So each sample is drawn f times as often as equally likely ones are, or more; those above it pay
    for it in proportion, and keep their order. At 0 nothing changes, at 1 all are equally likely.

    Args:
        p: probabilities, float64 [N].
        min_draw: f in [0, 1].

    Raises:
        ValueError: ``p`` is not [N] of finite numbers from 0 up, not all 0; ``min_draw`` out of
            range.

    Example::

        >>> import torch
        >>> from sqloss.groups import keep_min_draw
        >>> keep_min_draw(torch.tensor([0.1, 0.1, 0.2, 0.6]).double(), 0.8)
        tensor([0.2000, 0.2000, 0.2000, 0.4000], dtype=torch.float64)
    """
    check_min_draw("keep_min_draw", min_draw)
    wide = checked_weights("keep_min_draw", p)
    return raised(normalised(wide / wide.max()), torch.ones_like(wide), min_draw)


def check_min_draw(function: str, min_draw: float) -> None:
    check_number(function, "min_draw", min_draw, 0 <= min_draw <= 1, "a number in [0, 1]")


def raised(p: Tensor, counts: Tensor, min_draw: float) -> Tensor:
    """``keep_min_draw`` of probabilities of which each is that of so many samples, exactly.

    With the probabilities in ascending order, c is known for each number of them that is raised;
    the least number is right at which the next one needs no raising.
    """
    if min_draw == 0:
        return p
    values, at = p[counts > 0].unique(return_inverse=True)
    of_value = torch.zeros_like(values).index_add(0, at, counts[counts > 0].to(values))
    bound = min_draw / of_value.sum()
    before = of_value.cumsum(0) - of_value
    rest = (of_value * values).flip(0).cumsum(0).flip(0)
    factor = (1 - bound * before) / rest
    enough = factor * values >= bound
    enough[-1] = True  # the largest ones, but for rounding
    return torch.maximum(factor[enough.nonzero()[0]] * p, bound)


def score_probabilities(
    scores: Tensor, power: float = 1.0, *, lift: bool = True, min_draw: float = 0.0
) -> Tensor:
    r"""The probability of drawing each sample, in proportion to a power of its score of rarity.

    :math:`w_i = (s_i / \bar s)^{\text{power}}`, with lift
    :math:`w_i = \max(1, s_i / \bar s)^{\text{power}}`, and :math:`p_i = w_i / \sum_k w_k`, where
    :math:`\bar s` is the mean score.

    Args:
        scores: non-negative and finite, floating [N].
        power: from 0 up.
        lift: whether weights never go below 1.
        min_draw: as of :func:`probabilities`.

    Returns:
        Tensor: float64 [N], which sums to 1; equal for equal scores, so for scores that are all 0.

    Raises:
        ValueError: ``scores`` is not [N] with an entry at least, or negative or not finite;
            ``power`` or ``min_draw`` out of range.

    Example::

        >>> import torch
        >>> from sqloss.groups import score_probabilities
        >>> score_probabilities(torch.tensor([1.0, 1.0, 2.0]), lift=False)
        tensor([0.2500, 0.2500, 0.5000], dtype=torch.float64)
    """
    check_number("score_probabilities", "power", power, power >= 0, "a number from 0 up")
    check_min_draw("score_probabilities", min_draw)
    wide = scores.detach().double()
    if wide.dim() != 1 or not len(wide) or not (wide.isfinite() & (wide >= 0)).all():
        raise ValueError(
            "score_probabilities: scores: expected finite numbers from 0 up, [N] with N from 1 up, "
            f"got {tuple(scores.shape)} with "
            f"{int((~(wide.isfinite() & (wide >= 0))).sum())} others"
        )
    if not wide.any():
        wide = torch.ones_like(wide)
    ratio = wide / wide.max()  # the sum of large scores may overflow
    ratio = ratio / ratio.mean()
    p = normalised(powers(ratio.clamp_min(1) if lift else ratio, power))
    return raised(p, torch.ones_like(p), min_draw)


def powers(ratio: Tensor, power: float) -> Tensor:
    """The powers of these ratios, scaled so that the largest is 1 and none overflows."""
    return (ratio / ratio.max()).pow(power)


def normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum()


def effective_sample_size(p: Tensor) -> float:
    r"""The share of the samples that draws with probabilities p are worth, in (0, 1].

    .. math:: \frac{(\sum_i p_i)^2}{N \sum_i p_i^2}

    1 for equal probabilities, 1 / N where one sample has them all.

    Args:
        p: weights or probabilities, non-negative and finite, floating [N], not all 0.

    Raises:
        ValueError: ``p`` is anything else.

    Source: L. Kish, "Survey Sampling", Wiley, 1965.

    Example::

        >>> import torch
        >>> from sqloss.groups import effective_sample_size
        >>> effective_sample_size(torch.tensor([0.5, 0.5, 0.0, 0.0]))
        0.5
    """
    wide = checked_weights("effective_sample_size", p)
    wide = wide / wide.max()
    return float(wide.sum().square() / (len(wide) * wide.square().sum()))


def checked_weights(function: str, p: Tensor) -> Tensor:
    wide = p.detach().double()
    if wide.dim() != 1 or not (wide.isfinite() & (wide >= 0)).all() or not wide.any():
        raise ValueError(
            f"{function}: p: expected finite numbers from 0 up, [N], not all 0, got "
            f"{tuple(p.shape)}"
        )
    return wide
