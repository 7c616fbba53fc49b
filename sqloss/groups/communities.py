"""Communities of the graph of nearest neighbours, and how sure they are."""

import random
from typing import NamedTuple

import torch
from torch import Tensor

from sqloss.common.errors import require
from sqloss.groups.features import (
    canonical,
    check_features,
    check_number,
    check_whole,
    restored,
    scaled,
)
from sqloss.groups.merging import check_overlap, merge_groups
from sqloss.groups.neighbours import neighbour_graph, search

TRIALS = 4  # other partitions that a community is looked for in
KEPT = 0.8  # share of the samples of each trial


def communities(
    features: Tensor,
    *,
    neighbours: int = 10,
    resolution: float = 1.0,
    merge_overlap: float = 1.0,
    seed: int = 0,
    standardise: bool = True,
) -> Tensor:
    r"""Groups of samples that are one another's neighbours, found without labels or their number.

    The features are standardised; each sample is joined to its nearest neighbours, with weights
    :math:`w_{ij}` (:func:`neighbour_graph`). Louvain's method moves samples between groups
    :math:`g` while that raises the modularity, with :math:`k_i = \sum_j w_{ij}` and
    :math:`2m = \sum_i k_i`,

    .. math::
        Q = \frac{1}{2m} \sum_{ij} \Big( w_{ij} - \gamma \frac{k_i k_j}{2m} \Big) [g_i = g_j].

    Every sample has as many neighbours however dense its surroundings are. So what counts is
    whether neighbours are alike, and not how much room a class takes.

    Args:
        features: a row per sample, [N, D], of float16, bfloat16, float32 or float64, such as the
            means of an encoder.
        neighbours: how many each sample is joined to, from 1 up; fewer where there are fewer.
        resolution: :math:`\gamma` > 0; larger: more and smaller groups.
        merge_overlap: in (0, 1]; groups that overlap so much are joined, as
            :func:`merge_groups` tells, unless one is small; 1: none.
        seed: of the order in which samples are visited.
        standardise: whether each feature is brought to variance 1; without it they keep their
            proportions, as those that have one unit should, such as pixels.

    Returns:
        Tensor: the number of each sample's group, int64 [N] on the CPU, from 0 for the largest
        group; of equally large ones that of the first sample comes first.

    Repeatable: the same features, seed and library give the same groups, and a permutation of the
    rows permutes them (of equal rows in different groups, either may be in either). scikit-network
    computes where it is installed (``pip install 'sqloss[communities]'``), about fifty times as
    fast, otherwise networkx, which comes with torch. Each visits samples in an order of its own, so
    the groups of one are not those of the other. Takes no gradient.

    Raises:
        TypeError: ``features`` is no tensor of these dtypes.
        ValueError: it is not [N, D], is empty or not finite; another argument out of range.

    Source: V. D. Blondel et al., "Fast unfolding of communities in large networks", J. Stat. Mech.
    P10008, 2008; the graph as in Levine et al., 2015.

    Example::

        >>> import torch
        >>> from sqloss.groups import communities
        >>> draws = torch.Generator().manual_seed(0)
        >>> many, few = torch.randn(90, 2, generator=draws), torch.randn(9, 2, generator=draws)
        >>> groups = communities(torch.cat([many, few + 20]), neighbours=5, resolution=0.2)
        >>> sorted(set(groups[90:].tolist()) & set(groups[:90].tolist()))
        []
    """
    given = Given(neighbours, resolution, merge_overlap, seed, standardise)
    return communities_and_parts("communities", features, given)[0]


class Given(NamedTuple):
    """How communities are found: the arguments of ``communities``."""

    neighbours: int = 10
    resolution: float = 1.0
    merge_overlap: float = 1.0
    seed: int = 0
    standardise: bool = True

    def check(self, function: str, features: Tensor) -> None:
        check_features(function, features)
        check_whole(function, "neighbours", self.neighbours, 1)
        above = self.resolution > 0
        check_number(function, "resolution", self.resolution, above, "a number above 0")
        check_overlap(function, self.merge_overlap)
        check_whole(function, "seed", self.seed, 0)


def communities_and_parts(function: str, features: Tensor, given: Given) -> tuple[Tensor, Tensor]:
    """The communities, int64 [N], and how many groups were joined to each, int64 [groups]."""
    given.check(function, features)
    rows, order = canonical(features)
    found, merged = partition(rows, given)
    groups = by_size(restored(merged, order))
    count = int(groups.max()) + 1
    pairs = torch.unique(groups[order] + count * found)
    return groups, torch.bincount(pairs % count)


def partition(rows: Tensor, given: Given) -> tuple[Tensor, Tensor]:
    """Groups of rows in canonical order, float64 [N, D]: as they are found, and then joined.

    Both int64 [N], the former numbered by size, the latter in any numbering.
    """
    if len(rows) == 1:
        return (torch.zeros(1, dtype=torch.int64),) * 2
    nearest, _ = search(scaled(rows, given.standardise), min(given.neighbours, len(rows) - 1))
    edges, weights = neighbour_graph(nearest)
    found = by_size(louvain(edges, weights, len(rows), given.resolution, given.seed))
    merged = merge_groups(found, edges, weights, given.merge_overlap, resolution=given.resolution)
    return found, merged


def library() -> str:
    """Which one finds the communities here: groups of another are other groups."""
    try:
        import sknetwork.clustering  # noqa: F401
    except ImportError:
        return "networkx"
    return "scikit-network"


def louvain(edges: Tensor, weights: Tensor, count: int, resolution: float, seed: int) -> Tensor:
    """The groups of so many nodes by Louvain's method, int64 [N]."""
    if library() == "networkx":
        return louvain_of_networkx(edges, weights, count, resolution, seed)
    fast = require("sknetwork.clustering")
    ends = torch.cat([edges, edges.flip(1)]).T.numpy()
    matrix = require("scipy.sparse").csr_matrix(
        (weights.repeat(2).numpy(), (ends[0], ends[1])), (count, count)
    )
    # The shuffle is of the canonical order, and the library's; the seed is one of 32 bits there.
    method = fast.Louvain(resolution, shuffle_nodes=True, random_state=seed % 2**32)
    return torch.from_numpy(method.fit_predict(matrix)).long()


def louvain_of_networkx(
    edges: Tensor, weights: Tensor, count: int, resolution: float, seed: int
) -> Tensor:
    networkx = require("networkx")
    graph = networkx.Graph()
    graph.add_nodes_from(range(count))
    ends = edges.tolist()
    graph.add_weighted_edges_from(
        (i, j, w) for (i, j), w in zip(ends, weights.tolist(), strict=True)
    )
    found = networkx.community.louvain_communities(
        graph, resolution=resolution, seed=random.Random(seed)
    )
    groups = torch.empty(count, dtype=torch.int64)
    for number, members in enumerate(found):
        groups[list(members)] = number
    return groups


def by_size(groups: Tensor) -> Tensor:
    """The same groups, numbered from the largest; equally large ones by their first sample."""
    numbers, groups = groups.unique(return_inverse=True)
    sizes = torch.bincount(groups)
    first = torch.full((len(numbers),), len(groups)).scatter_reduce(
        0, groups, torch.arange(len(groups)), "amin"
    )
    by_first = first.argsort(stable=True)
    ranked = by_first[(-sizes[by_first]).argsort(stable=True)]
    return ranked.argsort()[groups]


def stability(
    features: Tensor,
    groups: Tensor,
    *,
    neighbours: int = 10,
    resolution: float = 1.0,
    merge_overlap: float = 1.0,
    seed: int = 0,
    standardise: bool = True,
    trials: int = TRIALS,
) -> Tensor:
    r"""How surely each group comes back: 1 where it always does, near 0 where it never does.

    Each trial partitions a random share of .8 of the samples anew, :math:`B_t`, under another seed
    and with other neighbours (from half as many up to one and a half times). With
    :math:`A_j` the samples of group j that are in the trial and the groups :math:`C` of it,

    .. math::
        s_j = \frac{1}{T} \sum_t \max_{C \in B_t} \frac{|A_j \cap C|}{|A_j \cup C|} \in [0, 1].

    A group of which a trial has no sample counts 0 there.

    Args:
        features: as of :func:`communities`, [N, D].
        groups: the number of each sample's group, int64 [N], as ``communities`` gives them.
        neighbours, resolution, merge_overlap, seed, standardise: with which ``groups`` were found.
        trials: how many, from 1 up; each costs what :func:`communities` does, or a little less.

    Returns:
        Tensor: the score of each group, float64 [largest number + 1]; 0 for numbers without a
        sample. Repeatable, and unchanged by a permutation of the rows.

    Raises:
        TypeError: ``features`` is no tensor of these dtypes.
        ValueError: it is not [N, D], is empty or not finite; ``groups`` is not int64 [N] from 0 up;
            another argument out of range.

    Source: C. Hennig, "Cluster-wise assessment of cluster stability", Computational Statistics &
    Data Analysis 52(1), 2007.
    """
    given = Given(neighbours, resolution, merge_overlap, seed, standardise)
    given.check("stability", features)
    check_whole("stability", "trials", trials, 1)
    check_groups("stability", groups, len(features))
    rows, order = canonical(features)
    groups = groups.cpu()[order]
    scores = torch.zeros(int(groups.max()) + 1, dtype=torch.float64)
    for trial in range(trials):
        draws = torch.Generator().manual_seed(seed + trial + 1)
        kept = torch.randperm(len(rows), generator=draws)[: max(1, round(KEPT * len(rows)))].sort()
        share = 0.5 + trial / max(trials - 1, 1)
        of_trial = given._replace(
            neighbours=max(1, round(share * neighbours)), seed=seed + trial + 1
        )
        _, found = partition(rows[kept.values], of_trial)
        scores += best_overlaps(groups[kept.values], found, len(scores))
    return scores / trials


def best_overlaps(groups: Tensor, found: Tensor, count: int) -> Tensor:
    """Of each of so many groups the best Jaccard overlap with any group found, float64."""
    others = int(found.max()) + 1
    common = torch.bincount(groups * others + found, minlength=count * others).view(count, others)
    either = common.sum(1, keepdim=True) + common.sum(0) - common
    return (common.double() / either.clamp_min(1)).amax(1)


def check_groups(function: str, groups: Tensor, count: int | None = None) -> None:
    """Raise for what does not number the group of each sample."""
    if not isinstance(groups, Tensor) or groups.dtype != torch.int64 or groups.dim() != 1:
        got = f"{groups.dtype} {tuple(groups.shape)}" if isinstance(groups, Tensor) else groups
        raise ValueError(f"{function}: groups: expected a number per sample, int64 [N], got {got}")
    if not len(groups) or groups.min() < 0:
        raise ValueError(f"{function}: groups: expected numbers from 0 up, got {least(groups)}")
    if count is not None and len(groups) != count:
        raise ValueError(
            f"{function}: groups: expected one for each of {count} samples, got {len(groups)}"
        )


def least(groups: Tensor) -> str:
    return str(int(groups.min())) if len(groups) else "none"
