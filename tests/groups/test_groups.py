"""Neighbours, communities, and the controls: laws, ends and refusals."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqloss import groups
from sqloss.groups.communities import Given, best_overlaps, by_size, communities_and_parts
from sqloss.groups.communities import library as library_used

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(params=["networkx", "sknetwork"])
def library(request, monkeypatch):
    """Louvain's method by each library."""
    pytest.importorskip(request.param)
    if request.param == "networkx":
        monkeypatch.setitem(sys.modules, "sknetwork.clustering", None)
    return {"networkx": "networkx", "sknetwork": "scikit-network"}[request.param]


def points(count, size, seed=0, dtype=torch.float64):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heaps(*sizes, apart=30.0):
    """Rows around centres far from one another, and the number of the centre of each."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    centres = points(len(sizes), 3, seed=9) * apart
    return points(len(labels), 3) + centres[labels], labels


def plainly_nearest(x, k):
    apart = (x[:, None] - x).square().sum(2)
    apart.fill_diagonal_(math.inf)
    k = min(k, len(x) - 1)
    distances, nearest = apart.sort(dim=1, stable=True)
    return nearest[:, :k], distances[:, :k].sqrt()


@pytest.mark.parametrize("count", [2, 9, 50, 1023, 1030])
@pytest.mark.parametrize("size", [1, 7, 40])
def test_neighbours_are_the_nearest(count, size):
    x = points(count, size)
    nearest, distances = groups.nearest_neighbours(x, 6)
    expected, apart = plainly_nearest(x, 6)
    assert torch.equal(nearest, expected)
    torch.testing.assert_close(distances, apart)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_of_every_dtype_and_any_strides(dtype):
    x = points(60, 8, dtype=dtype)[:, ::2]
    nearest, distances = groups.nearest_neighbours(x, 3)
    expected, apart = plainly_nearest(x.double(), 3)
    assert torch.equal(nearest, expected)
    assert distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(distances.double(), apart, rtol=1e-5, atol=1e-6)


def test_equally_near_ones_come_by_number_and_equal_rows_are_no_distance_apart():
    x = torch.tensor([[1e3], [1e3 + 1], [1e3 + 1], [1e3 - 1], [1e3]])
    nearest, distances = groups.nearest_neighbours(x, 4)
    assert nearest[0].tolist() == [4, 1, 2, 3]
    assert distances[0].tolist() == [0, 1, 1, 1]


def test_neighbours_survive_a_large_mean():
    x = points(200, 5)
    assert torch.equal(groups.nearest_neighbours(x + 1e6, 5)[0], groups.nearest_neighbours(x, 5)[0])


def test_the_graph_is_of_shares_in_common():
    nearest, _ = groups.nearest_neighbours(points(40, 3), 5)
    edges, weights = groups.neighbour_graph(nearest)
    near = [{i, *row} for i, row in enumerate(nearest.tolist())]
    expected = {
        (i, j): len(near[i] & near[j]) / len(near[i] | near[j])
        for i in range(40)
        for j in range(i + 1, 40)
        if j in near[i] or i in near[j]
    }
    assert dict(zip(map(tuple, edges.tolist()), weights.tolist(), strict=True)) == expected
    assert list(map(tuple, edges.tolist())) == sorted(expected)


@pytest.mark.parametrize("nearest", [[[0], [0]], [[1], [2]], [[1, 1], [0, 2], [0, 1]], [[-1], [0]]])
def test_a_graph_of_no_neighbours_is_refused(nearest):
    with pytest.raises(ValueError, match="neighbour_graph: nearest: expected the numbers of diff"):
        groups.neighbour_graph(torch.tensor(nearest))
    with pytest.raises(ValueError, match=r"neighbour_graph: nearest: expected int64 \[N, k\]"):
        groups.neighbour_graph(torch.tensor(nearest).float())


def test_communities_part_what_lies_apart_largest_first(library):
    x, labels = heaps(120, 80, 30)
    found = groups.communities(x, resolution=0.3)
    assert found.dtype == torch.int64
    for number in range(3):
        assert (
            len(set(found[labels == number].tolist()) & set(found[labels != number].tolist())) == 0
        )
    sizes = torch.bincount(found)
    assert torch.equal(sizes, sizes.sort(descending=True).values) and sizes.min() > 0


def test_a_larger_resolution_makes_more_communities(library):
    x = points(300, 2)
    counts = [int(groups.communities(x, resolution=r).max()) + 1 for r in (0.2, 1.0, 5.0)]
    assert counts[0] < counts[1] < counts[2]


def test_communities_are_repeatable_by_the_seed(library):
    x = points(300, 2)
    assert torch.equal(groups.communities(x), groups.communities(x))
    assert any(
        not torch.equal(groups.communities(x), groups.communities(x, seed=s)) for s in (1, 2, 3)
    )


PARTITIONS = {
    "communities": lambda x: groups.communities(x, neighbours=4),
    "merged": lambda x: groups.communities(x, neighbours=4, merge_overlap=0.3),
    "clusters": lambda x: groups.clusters(x, count=5),
    "leverage": groups.leverage,
    "density": lambda x: groups.density(x, neighbours=4),
}


@pytest.mark.parametrize("name", PARTITIONS)
@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 70), size=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_permutation_of_the_rows_permutes_what_they_get(name, count, size, seed):
    x = points(count, size, seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    of_x, permuted = PARTITIONS[name](x), PARTITIONS[name](x[order])
    if of_x.dtype == torch.int64:  # equally large groups are numbered by their first sample
        together, again = of_x[:, None] == of_x, permuted[:, None] == permuted
        assert torch.equal(together[order][:, order], again)
        assert torch.equal(torch.bincount(of_x), torch.bincount(permuted))
    else:
        assert torch.equal(of_x[order], permuted)


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_scale(name, dtype):
    x = points(50, 3, dtype=dtype)
    first = PARTITIONS[name](x)
    assert len(first) == 50 and torch.equal(first, PARTITIONS[name](x * 2 + 4 * (x.new_zeros(3))))
    assert torch.equal(first, PARTITIONS[name](x.double()))
    assert torch.equal(first, PARTITIONS[name](x.double() * 2.0**900))


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize(
    "x",
    [torch.zeros(1, 1), torch.zeros(40, 2), torch.eye(2), torch.ones(3, 5).repeat(30, 1)],
    ids=["one row", "equal rows", "two rows", "many equal rows"],
)
def test_few_and_equal_rows(name, x, recwarn):
    found = PARTITIONS[name](x)
    assert found.shape == (len(x),) and found.isfinite().all() and (found >= 0).all()
    assert not recwarn.list


def test_one_community_where_all_are_neighbours():
    assert groups.communities(points(8, 2), neighbours=99).tolist() == [0] * 8


@pytest.mark.parametrize("name", ["nearest_neighbours", *sorted(PARTITIONS.keys() - {"merged"})])
def test_features_are_refused_by_name(name):
    call = getattr(groups, name)
    for bad in (math.nan, math.inf):
        x = torch.tensor([[0.0, 1.0], [bad, bad], [1.0, 1.0]])
        with pytest.raises(
            ValueError, match=f"^{name}: features: expected finite numbers, got .* in 1 of 3 rows"
        ):
            call(x)
    for shape in ((0, 3), (3, 0), (4,), (2, 2, 2)):
        with pytest.raises(ValueError, match=f"^{name}: features: expected a row of numbers"):
            call(torch.zeros(shape))
    for wrong in (torch.zeros(3, 2, dtype=torch.int64), [[1.0]]):
        with pytest.raises(TypeError, match=f"^{name}: features: expected a"):
            call(wrong)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("nearest_neighbours", {"neighbours": 0}, "a whole number from 1 up, got 0"),
        ("communities", {"neighbours": 2.0}, "a whole number from 1 up, got 2.0"),
        ("communities", {"resolution": 0.0}, "a number above 0, got 0.0"),
        ("communities", {"resolution": math.nan}, "a number above 0, got nan"),
        ("communities", {"merge_overlap": 0.0}, r"a number in \(0, 1\], got 0.0"),
        ("communities", {"seed": -1}, "a whole number from 0 up, got -1"),
        ("clusters", {"count": True}, "a whole number from 1 up, got True"),
        ("leverage", {"ridge": math.inf}, "a number above 0, got inf"),
        ("density", {"neighbours": -3}, "a whole number from 1 up, got -3"),
    ],
)
def test_arguments_are_refused_by_name(name, arguments, message):
    (argument,) = arguments
    with pytest.raises(ValueError, match=f"^{name}: {argument}: expected {message}"):
        getattr(groups, name)(torch.zeros(3, 2), **arguments)


def test_without_standardising_features_keep_their_proportions():
    x = points(40, 2) * torch.tensor([1e3, 1.0]) + 7
    apart = groups.density(x, neighbours=3, standardise=False)
    scale = (x - x.mean(0)).square().mean().sqrt()
    _, expected = plainly_nearest(x / scale, 3)
    torch.testing.assert_close(apart, expected[:, 2], rtol=1e-4, atol=1e-5)
    assert not torch.equal(apart.argsort(), groups.density(x, neighbours=3).argsort())


def test_scores_are_what_their_formulas_say():
    x = points(30, 4)
    f = (x - x.mean(0)) / x.std(0, correction=0)
    inverse = torch.linalg.inv(f.T @ f + 0.1 * 30 * torch.eye(4, dtype=f.dtype))
    expected = (f @ inverse * f).sum(1)
    torch.testing.assert_close(groups.leverage(x, ridge=0.1), expected, rtol=1e-5, atol=1e-6)
    _, apart = plainly_nearest(f, 3)
    torch.testing.assert_close(groups.density(x, neighbours=3), apart[:, 2], rtol=1e-5, atol=1e-6)


def test_groups_are_numbered_by_size_and_then_by_their_first_sample():
    assert by_size(torch.tensor([7, 3, 3, 9, 9])).tolist() == [2, 0, 0, 1, 1]
    assert by_size(torch.tensor([4, 2, 4, 2, 8])).tolist() == [0, 1, 0, 1, 2]


def test_the_best_overlap():
    mine, found = torch.tensor([0, 0, 0, 2, 2]), torch.tensor([1, 1, 0, 0, 0])
    assert best_overlaps(mine, found, 3).tolist() == pytest.approx([2 / 3, 0, 2 / 3])


def test_a_heap_comes_back_and_a_part_of_one_does_not():
    x, labels = heaps(100, 60)
    halved = labels.clone()
    halved[:50] = 2  # half of the first heap at random: no community
    for seed in (0, 1):
        scores = groups.stability(x, halved, neighbours=20, resolution=0.2, seed=seed)
        assert scores[1] > 0.95 > 0.7 > scores[0] and scores[2] < 0.7
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    again = groups.stability(x[order], halved[order], neighbours=20, resolution=0.2, seed=1)
    assert torch.equal(scores, again)


def test_groups_of_other_samples_are_refused():
    with pytest.raises(ValueError, match="stability: groups: expected one for each of 3 samples"):
        groups.stability(torch.zeros(3, 1), torch.tensor([0, 1]))


# --- joining the parts of one


def path_of(*sizes, between):
    """Groups of so many nodes, each a ring of weight 1, joined by edges of these weights."""
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    ends, weights = [], []
    for first, size in zip(starts, sizes, strict=False):
        ends += [(first + i, first + (i + 1) % size) for i in range(size)]
        weights += [1.0] * size
    for (one, other), weight in between.items():
        ends.append((starts[one], starts[other]))
        weights.append(weight)
    edges = torch.tensor(ends).sort(1).values
    numbers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return numbers, edges, torch.tensor(weights, dtype=torch.float64)


def overlap(numbers, edges, weights, a, b, resolution=1.0):
    """By the definition, one edge at a time."""
    degrees, between = [0.0, 0.0], 0.0
    for (i, j), w in zip(numbers[edges].tolist(), weights.tolist(), strict=True):
        between += w * ({i, j} == {a, b})
        for k, group in enumerate((a, b)):
            degrees[k] += w * ((i == group) + (j == group))
    return 2 * weights.sum().item() * between / (resolution * degrees[0] * degrees[1])


def test_groups_are_joined_from_the_overlap_asked_for_on():
    graph = path_of(9, 9, 9, between={(0, 1): 3.0, (1, 2): 1.0})
    most = overlap(*graph, 0, 1)
    least = overlap(*graph, 1, 2)
    assert 0 < least < most < 1
    assert groups.merge_groups(*graph, 1.0).tolist() == graph[0].tolist()
    assert groups.merge_groups(*graph, most * 1.001).tolist() == graph[0].tolist()
    assert groups.merge_groups(*graph, most * 0.999).tolist() == [0] * 18 + [2] * 9
    finer = groups.merge_groups(*graph, most * 0.999, resolution=2.0)
    assert finer.tolist() == graph[0].tolist()
    # The overlap of two that were joined with the third is that of one group
    joined = (graph[0].where(graph[0] == 2, 0), *graph[1:])
    at = overlap(*joined, 0, 2)
    assert least / 2 < at < least
    assert groups.merge_groups(*graph, at * 1.001).tolist() == [0] * 18 + [2] * 9
    assert groups.merge_groups(*graph, at * 0.999).tolist() == [0] * 27


@pytest.mark.parametrize("count", [3, 8])
def test_a_small_group_is_never_joined_to_a_large_one(count):
    sizes = [30] * count + [8]
    graph = path_of(*sizes, between={(0, count): 30.0, (0, 1): 5.0})
    found = groups.merge_groups(*graph, 0.01)
    assert (found[-8:] == count).all() and (found[:-8] != count).all()
    assert (found[:60] == 0).all()
    large = path_of(*[30] * count, 20, between={(0, count): 30.0})
    assert (groups.merge_groups(*large, 0.01)[-20:] == 0).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), at=st.floats(0.05, 0.99), count=st.integers(2, 12))
def test_after_joining_no_two_that_may_be_joined_overlap_so_much(seed, at, count):
    draws = torch.Generator().manual_seed(seed)
    numbers = torch.randint(count, (40,), generator=draws)
    edges = torch.combinations(torch.arange(40))[torch.randperm(780, generator=draws)[:150]]
    weights = torch.rand(150, dtype=torch.float64, generator=draws)
    found = groups.merge_groups(numbers, edges, weights, at)
    sizes = torch.bincount(numbers)
    may = sizes >= 40 / (sizes > 0).sum() / 3
    for number in found.unique().tolist():
        parts = numbers[found == number].unique()
        assert number == parts.min() and (len(parts) == 1 or may[parts].all())
        for part in parts:  # whole groups are joined
            assert (found[numbers == part] == number).all()
        for other in found.unique().tolist():
            if number < other and may[number] and may[other]:
                assert overlap(found, edges, weights, number, other) < at + 1e-9
    assert torch.equal(found, groups.merge_groups(numbers, edges, weights, at))


def test_the_halves_of_a_heap_are_joined_and_a_rare_heap_is_not(library):
    x, labels = heaps(400, 400, 30)
    x[labels == 0] *= torch.tensor([20.0, 1, 1])  # long: communities are parts of it
    own = {"neighbours": 10, "standardise": False}
    fine, coarse = groups.communities(x, **own), groups.communities(x, merge_overlap=0.05, **own)
    assert len(fine[labels == 0].unique()) > 2 and coarse.max() < fine.max()
    found, parts = communities_and_parts("f", x, Given(**own, merge_overlap=0.05))
    assert torch.equal(found, coarse) and parts.sum() == fine.max() + 1
    for number in coarse.unique():
        assert len(labels[coarse == number].unique()) == 1
        assert len(fine[coarse == number].unique()) == parts[number]
    scores = groups.stability(x, coarse, merge_overlap=0.05, **own)
    assert scores.mean() > groups.stability(x, fine, **own).mean()


def test_the_library_that_finds_them(library):
    assert library_used() == library


@pytest.mark.parametrize("name", PARTITIONS)
def test_any_number_of_threads_gives_the_same_bits(name):
    x = points(2100, 5)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(PARTITIONS[name](x))
        assert torch.equal(*found)
    finally:
        torch.set_num_threads(before)
