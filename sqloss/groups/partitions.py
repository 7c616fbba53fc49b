"""Groups by k-means: the control that communities are compared with."""

import warnings

from torch import Tensor, from_numpy

from sqloss.common.errors import require
from sqloss.groups.communities import by_size
from sqloss.groups.features import canonical, check_features, check_whole, restored, scaled


def clusters(
    features: Tensor, *, count: int = 50, seed: int = 0, standardise: bool = True
) -> Tensor:
    r"""Groups by k-means: each sample belongs to the nearest of ``count`` centres.

    The features are standardised; the centres c are a local minimum of
    :math:`\sum_i \min_j |f_i - c_j|^2`.

    Args:
        features: a row per sample, [N, D], of float16, bfloat16, float32 or float64.
        count: the number of centres, from 1 up; one per sample where there are fewer.
        seed: of the first centres.
        standardise: whether each feature is brought to variance 1; without it they keep their
            proportions, as those that have one unit should, such as pixels.

    Returns:
        Tensor: the number of each sample's group, int64 [N] on the CPU, from 0 for the largest.

    Repeatable, and a permutation of the rows permutes the groups. Needs scikit-learn.

    Raises:
        TypeError: ``features`` is no tensor of these dtypes.
        ValueError: it is not [N, D], is empty or not finite; ``count`` or ``seed`` out of range.

    Source: S. P. Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28(2), 1982;
    first centres by D. Arthur and S. Vassilvitskii, "k-means++", SODA 2007.

    Example::

        >>> import torch
        >>> from sqloss.groups import clusters
        >>> clusters(torch.tensor([[0.0], [0.1], [9.0], [0.2]]), count=2).tolist()
        [0, 0, 1, 0]
    """
    check_features("clusters", features)
    check_whole("clusters", "count", count, 1)
    check_whole("clusters", "seed", seed, 0)
    rows, order = canonical(features)
    points = scaled(rows, standardise)
    method = require("sklearn.cluster").KMeans(
        min(count, len(rows)), n_init=1, random_state=seed % 2**32
    )
    with warnings.catch_warnings():
        # Of more centres than there are different samples some have none: they make no group.
        warnings.simplefilter("ignore", require("sklearn.exceptions").ConvergenceWarning)
        found = from_numpy(method.fit_predict(points.numpy())).long()
    return by_size(restored(found, order))
