"""How often to draw each sample, from its group or from its score."""

import torch
from torch import Tensor

from sqloss.groups.communities import check_groups
from sqloss.groups.features import check_number, check_whole


def probabilities(
    groups: Tensor,
    power: float = 1.0,
    *,
    lift: bool = True,
    min_size: int = 1,
    lifted: Tensor | None = None,
) -> Tensor:
    r"""The probability of drawing each sample, which lifts those of small groups.

    With :math:`n_j` the size of the group j of sample i and :math:`\bar n` the mean size,

    .. math::
        w_i = (\bar n / n_j)^{\text{power}}, \text{ with lift }
        w_i = \max(1, \bar n / n_j)^{\text{power}}; \qquad p_i = w_i \big/ \textstyle\sum_k w_k.

    So a group is drawn in proportion to :math:`n_j^{1 - \text{power}}` without lift: at 0 samples
    are equally likely, at 1 groups are. With lift no sample of a large group has a smaller weight
    than at power 0.

    Args:
        groups: the number of each sample's group, int64 [N], from 0 up; numbers may be without a
            sample.
        power: from 0 up.
        lift: whether weights never go below 1.
        min_size: groups with fewer samples have the weight 1.
        lifted: bool, one per group: where it is False the group has a weight of 1 at most, as what
            is not stable enough to be lifted. ``None``: all may be lifted.

    Returns:
        Tensor: float64 [N], which sums to 1. Repeatable; a permutation of the samples permutes it.

    Raises:
        ValueError: ``groups`` is not int64 [N] from 0 up; ``power`` or ``min_size`` out of range;
            ``lifted`` is not bool with an entry for each group.

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
    check_whole("probabilities", "min_size", min_size, 1)
    sizes = torch.bincount(groups).double()
    ratio = len(groups) / (sizes > 0).sum() / sizes.clamp_min(1)
    if lift:
        ratio = ratio.clamp_min(1)
    ratio[sizes < min_size] = 1
    if lifted is not None:
        if lifted.dtype != torch.bool or lifted.shape != sizes.shape:
            raise ValueError(
                f"probabilities: lifted: expected bool [{len(sizes)}], got {lifted.dtype} "
                f"{tuple(lifted.shape)}"
            )
        ratio = ratio.where(lifted.to(ratio.device), ratio.clamp_max(1))
    return normalised(powers(ratio, power)[groups])


def score_probabilities(scores: Tensor, power: float = 1.0, *, lift: bool = True) -> Tensor:
    r"""The probability of drawing each sample, in proportion to a power of its score of rarity.

    :math:`w_i = (s_i / \bar s)^{\text{power}}`, with lift
    :math:`w_i = \max(1, s_i / \bar s)^{\text{power}}`, and :math:`p_i = w_i / \sum_k w_k`, where
    :math:`\bar s` is the mean score.

    Args:
        scores: non-negative and finite, floating [N].
        power: from 0 up.
        lift: whether weights never go below 1.

    Returns:
        Tensor: float64 [N], which sums to 1; equal for equal scores, so for scores that are all 0.

    Raises:
        ValueError: ``scores`` is not [N] with an entry at least, or negative or not finite;
            ``power`` out of range.

    Example::

        >>> import torch
        >>> from sqloss.groups import score_probabilities
        >>> score_probabilities(torch.tensor([1.0, 1.0, 2.0]), lift=False)
        tensor([0.2500, 0.2500, 0.5000], dtype=torch.float64)
    """
    check_number("score_probabilities", "power", power, power >= 0, "a number from 0 up")
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
    return normalised(powers(ratio.clamp_min(1) if lift else ratio, power))


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
    wide = p.detach().double()
    if wide.dim() != 1 or not (wide.isfinite() & (wide >= 0)).all() or not wide.any():
        raise ValueError(
            "effective_sample_size: p: expected finite numbers from 0 up, [N], not all 0, got "
            f"{tuple(p.shape)}"
        )
    wide = wide / wide.max()
    return float(wide.sum().square() / (len(wide) * wide.square().sum()))
