"""The nearest neighbours of every sample, and their graph."""

import torch
from torch import Tensor

from sqloss.groups.features import check_features, check_whole

ROWS, COLUMNS = 1024, 1024  # of a tile of distances: 4 MB, which stay in the cache
PER_BLOCK = 8  # distances of a tile that one minimum stands for
MARGIN = 4  # more blocks than neighbours: what rounding may exchange
EDGES_AT_ONCE = 200_000


def nearest_neighbours(features: Tensor, neighbours: int = 10) -> tuple[Tensor, Tensor]:
    r"""The ``neighbours`` nearest other samples of each sample, by Euclidean distance.

    Args:
        features: a row per sample, [N, D], of float16, bfloat16, float32 or float64.
        neighbours: how many, from 1 up; all others where there are fewer, :math:`k = \min(k, N-1)`.

    Returns:
        tuple[Tensor, Tensor]: the numbers of the neighbours, int64 [N, k], nearest first, equally
        near ones by their number; and their distances, [N, k], float64 for float64, else float32.

    Exact but for rounding: every distance is computed, in float32 (float64 for float64), and those
    of the nearest by differences, so that of equal rows it is 0. Of more equally near ones than
    there is room for, which are taken is repeatable, but not by their numbers. The time is
    quadratic in N, the memory is not. Takes no gradient.

    Raises:
        TypeError: ``features`` is no tensor of these dtypes.
        ValueError: it is not [N, D], is empty or not finite; ``neighbours`` below 1.

    Example::

        >>> import torch
        >>> from sqloss.groups import nearest_neighbours
        >>> nearest_neighbours(torch.tensor([[0.0], [1.0], [3.0]]), 1)[0].tolist()
        [[1], [0], [1]]
    """
    check_features("nearest_neighbours", features)
    check_whole("nearest_neighbours", "neighbours", neighbours, 1)
    wide = features.detach()
    wide = wide if wide.dtype == torch.float64 else wide.float()
    return search(wide - wide.mean(0), min(neighbours, len(wide) - 1))


@torch.no_grad()
def search(points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest others of each point, and their distances, both [N, k].

    For each tile of rows:
    1. The distances to a tile of points; of each block of PER_BLOCK of them the least is kept.
    2. The k nearest others and the point itself lie in the k + 1 blocks of the least minima.
    3. The distances of these blocks' points anew, by differences; the k least.
    Step 1 passes over N^2 distances while they are in the cache. torch.topk over whole rows, or
    scikit-learn's brute force, took twice as long at N = 60,000.
    """
    count, size = points.shape
    columns = min(COLUMNS, -(-count // PER_BLOCK) * PER_BLOCK)
    tiles, blocks = -(-count // columns), columns // PER_BLOCK
    padding = tiles * columns - count
    squares = points.square().sum(1)
    padded = torch.cat([points, points.new_zeros(padding, size)])
    of_tiles = padded.view(tiles, columns, size).transpose(1, 2).contiguous()
    squares = torch.cat([squares, squares.new_full((padding,), torch.inf)]).view(tiles, columns)
    wanted = min(k + 1 + MARGIN, tiles * blocks)
    strides = torch.arange(PER_BLOCK, device=points.device) * blocks
    nearest, distances = [], []
    for first in range(0, count, ROWS):
        rows = points[first : first + ROWS]
        minima = points.new_empty(len(rows), tiles, blocks)
        for tile in range(tiles):
            block = torch.addmm(squares[tile], rows, of_tiles[tile], alpha=-2)
            minima[:, tile] = block.view(len(rows), PER_BLOCK, blocks).amin(1)
        chosen = minima.flatten(1).topk(wanted, largest=False, sorted=False).indices
        starts = chosen // blocks * columns + chosen % blocks
        candidates = (starts[:, :, None] + strides).flatten(1).sort(1).values
        at_once = max(1, 2**24 // (candidates.shape[1] * size))  # rows: 64 MB of differences
        for part in range(0, len(rows), at_once):
            of_part, own = candidates[part : part + at_once], rows[part : part + at_once]
            differences = padded[of_part] - own[:, None]
            apart = differences.square_().sum(2)
            itself = torch.arange(len(own), device=points.device) + first + part
            apart[(of_part == itself[:, None]) | (of_part >= count)] = torch.inf
            least, at = apart.sort(dim=1, stable=True)
            nearest.append(of_part.gather(1, at[:, :k]))
            distances.append(least[:, :k].sqrt())
    return torch.cat(nearest), torch.cat(distances)


def neighbour_graph(nearest: Tensor) -> tuple[Tensor, Tensor]:
    r"""The undirected graph that joins every sample to its nearest neighbours.

    With :math:`\bar N(i)` the sample i and its neighbours, the edge {i, j} is there if j is among
    the neighbours of i or i among those of j, and weighs their share in common (Jaccard):

    .. math::
        w_{ij} = \frac{|\bar N(i) \cap \bar N(j)|}{|\bar N(i) \cup \bar N(j)|} > 0.

    Args:
        nearest: the numbers of the neighbours, int64 [N, k], as of :func:`nearest_neighbours`.

    Returns:
        tuple[Tensor, Tensor]: the edges, int64 [E, 2], the smaller number first, in ascending
        order; their weights, float64 [E]. Repeatable.

    Raises:
        ValueError: ``nearest`` is not int64 [N, k] of numbers of other samples, in any row twice.

    Source: J. H. Levine et al., "Data-driven phenotypic dissection of AML reveals progenitor-like
    cells that correlate with prognosis", Cell 162(1), 2015 (PhenoGraph).

    Example::

        >>> import torch
        >>> from sqloss.groups import neighbour_graph
        >>> edges, weights = neighbour_graph(torch.tensor([[1], [0], [1]]))
        >>> edges.tolist(), [round(weight, 2) for weight in weights.tolist()]
        ([[0, 1], [1, 2]], [1.0, 0.33])
    """
    if nearest.dtype != torch.int64 or nearest.dim() != 2:
        raise ValueError(
            f"neighbour_graph: nearest: expected int64 [N, k], got {nearest.dtype} "
            f"{tuple(nearest.shape)}"
        )
    nearest = nearest.cpu()
    count, k = nearest.shape
    itself = torch.arange(count)
    closed = torch.cat([itself[:, None], nearest], 1).sort(1).values
    in_range = not nearest.numel() or (nearest.min() >= 0 and nearest.max() < count)
    if not in_range or (closed.diff(dim=1) == 0).any():
        raise ValueError(
            "neighbour_graph: nearest: expected the numbers of different other samples in each "
            "row, got one that is its own, twice there or out of range"
        )
    source, target = itself.repeat_interleave(k), nearest.flatten()
    low, high = torch.minimum(source, target), torch.maximum(source, target)
    keys = torch.unique(low * count + high)
    edges = torch.stack([keys // max(count, 1), keys % max(count, 1)], 1)
    weights = [shares_in_common(closed, part) for part in edges.split(EDGES_AT_ONCE)]
    return edges, torch.cat(weights) if weights else torch.zeros(0, dtype=torch.float64)


def shares_in_common(closed: Tensor, edges: Tensor) -> Tensor:
    """|A and B| / |A or B| of the neighbourhoods of the two ends of each edge, float64 [E]."""
    first, second = closed[edges[:, 0]], closed[edges[:, 1]]
    common = (first[:, :, None] == second[:, None, :]).sum((1, 2))
    return common.double() / (2 * closed.shape[1] - common)
