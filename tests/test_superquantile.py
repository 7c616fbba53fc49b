"""The superquantile against its definition, its twin, its laws, and every way torch calls it."""

import math
import warnings
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import sqloss
from sqloss import _ops, reference
from sqloss._ops import superquantile as op

ALPHAS = [0.0, 0.1, 0.3, 0.5, 0.7, 0.75, 0.8, 0.9, 0.95, 0.999, 1 - 2**-53]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan


def by_definition(losses, alpha, weights=None):
    """(cvar, value-at-risk, weights q) of a list, in exact rational arithmetic.

    alpha is taken for the decimal that it prints as; the tail takes weight from the top until it
    holds k, and ties share in proportion to their weight.
    """
    w = [Fraction(x) for x in (weights or [1] * len(losses))]
    k = (1 - Fraction(repr(float(alpha)))) * sum(w)
    above, value, q = Fraction(0), Fraction(0), [Fraction(0)] * len(losses)
    for t in sorted({x for x, v in zip(losses, w, strict=True) if v > 0}, reverse=True):
        ties = [i for i, x in enumerate(losses) if x == t]
        at = sum(w[i] for i in ties)
        mass = min(at, k - above)
        for i in ties:
            q[i] = mass * w[i] / at / k
        value += mass * Fraction(t) / k
        above += at
        if above >= k:
            return float(value), t, [float(x) for x in q]
    raise AssertionError("the tail holds less than k")


def twin(losses, alpha, weight=None, mask=None, dim=(), keepdim=False):
    """value, threshold, counts of the reference, on float64 copies."""
    as_double = [x if x is None else x.detach().double() for x in (losses, weight)]
    return reference.superquantile(as_double[0], 1 - alpha, as_double[1], mask, dim, keepdim)


def twin_gradient(losses, alpha, weight=None, mask=None, dim=(), keepdim=False, of_value=1.0):
    value, threshold, counts = twin(losses, alpha, weight, mask, dim, keepdim)
    grad = torch.full_like(value, of_value)
    w = None if weight is None else weight.detach().double()
    x = losses.detach().double()
    return reference.superquantile_backward(grad, None, x, w, mask, threshold, counts, dim, keepdim)


def assert_matches_twin(losses, alpha, weight=None, mask=None, dim=None, keepdim=False):
    """Value, threshold, weights and gradient equal the twin's, up to one rounding to the dtype."""
    dims = () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    dims = tuple(d % max(losses.dim(), 1) for d in dims)
    options = {"weight": weight, "mask": mask, "dim": dim, "keepdim": keepdim}
    eps, smallest = torch.finfo(losses.dtype).eps, torch.finfo(losses.dtype).smallest_normal
    rounding = {"rtol": 2 * eps, "atol": smallest * eps, "equal_nan": True}  # atol: one subnormal
    if losses.dtype == torch.float64:
        rounding["rtol"] = 1e-12
    w = None if weight is None else weight.expand(losses.shape)
    m = None if mask is None else mask.expand(losses.shape)
    value, threshold, _ = twin(losses, alpha, w, m, dims, keepdim)

    leaf = losses.detach().requires_grad_()
    got = sqloss.cvar(leaf, alpha, **options)
    torch.testing.assert_close(got.double(), value, **rounding)
    var = sqloss.value_at_risk(leaf, alpha, **options)
    assert torch.equal(var.double().nan_to_num(1e300), threshold.nan_to_num(1e300))
    assert got.dtype == var.dtype == losses.dtype

    gradient = twin_gradient(losses, alpha, w, m, dims, keepdim)
    (grad,) = torch.autograd.grad(got.sum(), leaf)
    torch.testing.assert_close(grad.double(), gradient, **rounding)
    q = sqloss.tail_weights(losses, alpha, **options)
    assert torch.equal(q, grad)
    assert grad.shape == q.shape == losses.shape and q.dtype == losses.dtype


# --- the definition -------------------------------------------------------------------------------


def test_worked_case(device):
    losses = torch.arange(10.0, dtype=torch.float64, device=device) ** 2
    assert sqloss.cvar(losses, 0.75).item() == pytest.approx(67.8, abs=1e-13)
    assert sqloss.value_at_risk(losses, 0.75).item() == 49
    q = sqloss.tail_weights(losses, 0.75).cpu()
    expected = torch.tensor([0.0] * 7 + [0.2, 0.4, 0.4], dtype=torch.float64)
    torch.testing.assert_close(q, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 32, 100])
def test_definition_at_every_two_decimal_alpha(n):
    """No k is rounded, and none is taken for the next integer by the rounding of alpha."""
    losses = torch.randn(n, dtype=torch.float64)
    for percent in range(100):
        alpha = percent / 100
        value, threshold, q = by_definition(losses.tolist(), alpha)
        assert sqloss.cvar(losses, alpha).item() == pytest.approx(value, rel=1e-12)
        assert sqloss.value_at_risk(losses, alpha).item() == threshold, alpha
        assert sqloss.tail_weights(losses, alpha).tolist() == pytest.approx(q, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("alpha", [0.1, 0.37, 0.5, 0.7, 0.9])
def test_definition_with_weights(alpha):
    losses = torch.randint(0, 5, (40,), dtype=torch.float64)  # ties
    weight = torch.randint(0, 4, (40,), dtype=torch.float64)
    value, threshold, q = by_definition(losses.tolist(), alpha, weight.tolist())
    assert sqloss.cvar(losses, alpha, weight=weight).item() == pytest.approx(value, rel=1e-12)
    assert sqloss.value_at_risk(losses, alpha, weight=weight).item() == threshold
    got = sqloss.tail_weights(losses, alpha, weight=weight).tolist()
    assert got == pytest.approx(q, rel=1e-12, abs=1e-15)


def test_rockafellar_uryasev_minimum():
    """cvar = min over eta of eta + mean(relu(l - eta)) / (1 - alpha), at eta = value-at-risk."""
    losses = torch.randn(53, dtype=torch.float64)
    for alpha in (0.0, 0.25, 0.6, 0.93):

        def objective(eta, alpha=alpha):
            return eta + torch.relu(losses - eta).mean() / (1 - alpha)

        eta = sqloss.value_at_risk(losses, alpha)
        smallest = min(objective(e) for e in losses)
        torch.testing.assert_close(sqloss.cvar(losses, alpha), smallest)
        torch.testing.assert_close(objective(eta), smallest)


def test_alpha_at_its_ends(device):
    losses = torch.randn(1000, device=device, dtype=torch.float64)
    torch.testing.assert_close(sqloss.cvar(losses, 0.0), losses.mean())
    torch.testing.assert_close(sqloss.cvar(losses, tail_fraction=1.0), losses.mean())
    q = torch.full_like(losses, 1e-3)
    torch.testing.assert_close(sqloss.tail_weights(losses, 0.0), q, rtol=1e-15, atol=0)
    for alpha in (0.9995, 1 - 2**-53):  # k <= 1: exactly the maximum
        assert sqloss.cvar(losses, alpha) == losses.max()
        assert sqloss.tail_weights(losses, alpha).max() == 1
    assert sqloss.cvar(losses, tail_fraction=1e-300) == losses.max()
    assert sqloss.value_at_risk(losses, 0.0) == losses.min()


def test_alpha_is_the_confidence_level():
    losses = torch.arange(10.0)
    assert sqloss.cvar(losses, alpha=0.8) == 8.5
    assert sqloss.cvar(losses, tail_fraction=0.2) == 8.5
    assert sqloss.cvar(losses, 0.8) == sqloss.superquantile(losses, 0.8)
    assert sqloss.superquantile is sqloss.cvar


# --- the twin -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 15, 16, 17, 31, 63, 129, 1000, 4096, 4097, 9001])
def test_twin_by_size_and_dtype(device, n, dtype):
    losses = torch.randn(n, device=device).to(dtype)
    for alpha in ALPHAS:
        assert_matches_twin(losses, alpha)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [None, 0, 1, 2, -1, (0, 2), (1, 2), (-3, 1), (0, 1, 2), ()])
@pytest.mark.parametrize("keepdim", [False, True])
def test_twin_by_dim(device, dim, keepdim, dtype):
    losses = torch.randn(5, 6, 7, device=device).to(dtype)
    for alpha in (0.0, 0.4, 0.8):
        assert_matches_twin(losses, alpha, dim=dim, keepdim=keepdim)
    expected = losses.float().mean(dim, keepdim=keepdim).shape
    assert sqloss.cvar(losses, 0.5, dim=dim, keepdim=keepdim).shape == expected


def test_dim_takes_what_counts_as_an_int():
    losses = torch.randn(4, 5)
    for dim in (np.int64(1), np.int8(-1), [1], np.array([1])):
        assert torch.equal(sqloss.cvar(losses, 0.5, dim=dim), sqloss.cvar(losses, 0.5, dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [*DTYPES, torch.int64, torch.uint8])
def test_twin_by_weight(device, dtype, weight_dtype):
    losses = torch.randn(6, 50, device=device).to(dtype)
    weight = (torch.rand(6, 50, device=device) * 5).to(weight_dtype)
    mask = torch.rand(6, 50, device=device) < 0.7
    for dim in (None, 0, 1):
        for alpha in (0.0, 0.35, 0.9, 1 - 2**-53):
            assert_matches_twin(losses, alpha, weight=weight, dim=dim)
            assert_matches_twin(losses, alpha, mask=mask, dim=dim)
            assert_matches_twin(losses, alpha, weight=weight, mask=mask, dim=dim)


@pytest.mark.parametrize("shape", [(4, 30), (1, 30), (4, 1), (30,), (1,), ()])
def test_weight_and_mask_broadcast(device, shape):
    losses = torch.randn(4, 30, device=device)
    weight = torch.rand(shape, device=device) + 0.1
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    for dim in (None, 0, 1):
        assert_matches_twin(losses, 0.6, weight=weight, mask=mask, dim=dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [8192, 8193, 32_768, 40_000, 100_003])
def test_twin_of_long_rows(device, n, dtype):
    """In place, gathered, converted, masked and weighted; whole blocks, tiles and chunks or not."""
    losses = torch.randn(2, n, device=device).to(dtype)
    strided = torch.randn(n, 2, device=device).to(dtype).t()
    weight = torch.randint(1, 4, (n,), device=device).double()  # whose sums are exact
    mask = torch.rand(n, device=device) < 0.7
    for x in (losses, strided, losses[:1, :1].expand(1, n)):
        assert_matches_twin(x, 0.8, dim=1)
        assert_matches_twin(x, 0.8, dim=1, mask=mask)
        assert_matches_twin(x, 0.8, dim=1, weight=weight)
        assert_matches_twin(x[0], 0.8, weight=weight, mask=mask)


def strided_views(device):
    """Views of every kind, by name."""
    base = torch.randn(12, 10, 8, device=device)
    image = torch.randn(2, 3, 4, 5, device=device)
    return {
        "transposed": base.transpose(0, 2),
        "permuted": base.permute(1, 2, 0),
        "every second": base[::2, 1::3, ::4],
        "offset": base[3:, 2:, 1:],
        "narrow": base.narrow(1, 2, 5),
        "expanded": base[:, :1, :].expand(12, 10, 8),
        "expanded scalar": base[0, 0, 0].expand(3, 4, 5),
        "channels last": image.contiguous(memory_format=torch.channels_last),
        "flipped diagonal": base.diagonal(dim1=0, dim2=2).t().flip(0),
        "overlapping": base.as_strided((6, 5, 4), (3, 2, 1)),
        "unfolded": torch.randn(40, device=device).unfold(0, 8, 3),
    }


@pytest.mark.parametrize("view", strided_views("cpu"))
@pytest.mark.parametrize("dim", [None, 0, 1, -1, (0, 1)])
def test_twin_by_strides(device, view, dim):
    losses = strided_views(device)[view]
    assert_matches_twin(losses, 0.6, dim=dim)
    assert_matches_twin(losses, 0.6, dim=dim, weight=torch.rand_like(losses) + 0.1)
    assert_matches_twin(torch.randn(losses.shape, device=device), 0.6, dim=dim, mask=losses < 3)
    plain = losses.contiguous()
    assert torch.equal(sqloss.cvar(losses, 0.6, dim=dim), sqloss.cvar(plain, 0.6, dim=dim))


def test_gradient_reaches_the_base_of_a_view():
    base = torch.randn(6, 8, requires_grad=True)
    sqloss.cvar(base.t()[::2, 1:], 0.5).backward()
    expected = torch.zeros(6, 8)
    expected.t()[::2, 1:] = sqloss.tail_weights(base.detach().t()[::2, 1:], 0.5)
    assert torch.equal(base.grad, expected)


def test_large_strides_need_64_bit_indices():
    """Elements 2^32 apart in memory that is reserved but, but for three pages, never touched."""
    try:
        base = torch.empty(2 * 2**32 + 1, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("this machine reserves no 17 GB of address space")
    losses = base[:: 2**32]
    losses.copy_(torch.tensor([1.0, 3.0, 2.0]))
    assert sqloss.cvar(losses, 0.5).item() == pytest.approx(8 / 3, rel=1e-3)
    assert sqloss.tail_weights(losses, 0.9).tolist() == [0, 1, 0]


def test_more_losses_than_float32_can_count(device):
    n = 2**24 + 3
    losses = torch.ones(n, device=device)
    losses[-1] = 2
    # k = n / 2 and all but one loss tie
    expected = (2 + (n / 2 - 1)) / (n / 2)
    assert sqloss.cvar(losses.double(), 0.5).item() == pytest.approx(expected, rel=1e-15)
    assert sqloss.cvar(losses, 0.5).item() == pytest.approx(expected, rel=1e-7)
    q = sqloss.tail_weights(losses, 0.5)
    assert q.double().sum().item() == pytest.approx(1, rel=1e-6)
    assert q[-1].item() == pytest.approx(2 / n, rel=1e-6)
    _, _, counts = op.superquantile(losses, 0.5, None, None, (), False)
    assert counts.tolist() == [1, n - 1, n / 2]


# --- values that break naive versions -------------------------------------------------------------


ADVERSARIAL = {
    "sorted": torch.arange(5000.0),
    "reversed": torch.arange(5000.0).flip(0),
    "constant": torch.full((5000,), 0.1),
    "two values": torch.arange(5000.0) % 2,
    "mostly ties": torch.where(torch.arange(5000) % 10 == 0, torch.arange(5000.0), 7.0),
    "denormal": torch.arange(-2500.0, 2500.0) * 2.0**-149,
    "one outlier": torch.cat([torch.zeros(4999), torch.tensor([1e30])]),
    "huge": torch.tensor([3e38, 3e38, -3e38, 1.0]),
    "signed zeros": torch.tensor([0.0, -0.0, -0.0, 0.0, -1.0]),
    "infinities": torch.tensor([INF, 1.0, -INF, 2.0, INF, 0.0]),
    "all inf": torch.full((7,), INF),
    "all -inf": torch.full((7,), -INF),
    "NaN": torch.tensor([1.0, NAN, INF, -INF, -NAN, 2.0]),
    "all NaN": torch.full((5,), NAN),
}


@pytest.mark.parametrize("case", ADVERSARIAL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_twin_on_adversarial_losses(device, case, dtype):
    losses = ADVERSARIAL[case].to(device, dtype)
    weight = torch.arange(losses.numel(), device=device) % 3 + 1
    for alpha in ALPHAS:
        assert_matches_twin(losses, alpha)
        assert_matches_twin(losses, alpha, weight=weight)


def sampled_positions(n):
    """Where the kernel looks for a first guess of the threshold of a row of n losses."""

    def scrambled(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    size = 64 if n <= 8192 else int(np.cbrt(float(n) * n)) // 2
    pieces = [i + (scrambled(i) >> 11) * 2.0**-53 for i in range(size)]
    return torch.tensor([min(int(piece * (n / size)), n - 1) for piece in pieces])


MISLEADING = {
    "too high": lambda losses: 100 + losses,
    "too low": lambda losses: losses - 100,
    "both": lambda losses: torch.where(losses > 0, 100.0, -100.0),
    "equal": lambda losses: torch.full_like(losses, 0.3),
    "zero": torch.zeros_like,
    "inf": lambda losses: torch.full_like(losses, INF),
    "-inf": lambda losses: torch.full_like(losses, -INF),
    "NaN": lambda losses: torch.full_like(losses, NAN),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*MISLEADING, "not there"])
@pytest.mark.parametrize("shape", [(40_003,), (18, 700)])
def test_a_sample_that_misleads(shape, case, dtype):
    n = shape[-1]
    losses, mask = torch.randn(shape), torch.rand(shape) < 0.9
    weight = torch.randint(4, shape).double()  # whose sums are exact
    losses[..., ::7] = 0
    sampled = sampled_positions(n)
    if case in MISLEADING:
        losses[..., sampled] = MISLEADING[case](losses[..., sampled])
    else:
        weight[..., sampled], mask[..., sampled] = 0, False
    losses = losses.to(dtype)
    for alpha in (0.0, 0.05, 0.5, 0.9, 0.99, 1 - 2**-53):
        assert_matches_twin(losses, alpha, dim=-1)
        assert_matches_twin(losses, alpha, dim=-1, mask=mask)
        assert_matches_twin(losses, alpha, dim=-1, weight=weight)
        assert_matches_twin(losses, alpha, dim=-1, weight=weight, mask=mask)


@pytest.mark.parametrize("scale", [1.0, 1e-300])
@pytest.mark.parametrize("kept", [1, 3, 50, 300])
def test_long_rows_of_which_the_mask_leaves_little(kept, scale):
    losses = torch.randint(-3, 2, (20_000,)).double() * scale  # zeros, too
    mask = torch.zeros(20_000, dtype=torch.bool)
    mask[torch.randperm(20_000)[:kept]] = True
    for alpha in ALPHAS:
        assert_matches_twin(losses, alpha, mask=mask)
        assert_matches_twin(losses, alpha, weight=mask.double() * 1e200)


def test_constant_losses_are_their_own_superquantile():
    for n in (1, 3, 10, 1001):
        for alpha in ALPHAS:
            assert sqloss.cvar(torch.full((n,), 0.1), alpha) == torch.tensor(0.1)


def test_ties_share_evenly_whatever_their_order():
    losses = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 0.0])
    q = sqloss.tail_weights(losses, 0.5)  # k = 3: all of 3, two thirds of each 2
    torch.testing.assert_close(q, torch.tensor([3.0, 0, 2, 2, 2, 0]) / 9)
    order = torch.randperm(6)
    assert torch.equal(sqloss.tail_weights(losses[order], 0.5), q[order])


def test_nan_is_the_worst_loss_and_gets_a_gradient(device):
    losses = torch.tensor([1.0, NAN, INF, 2.0], device=device, requires_grad=True)
    value = sqloss.cvar(losses, 0.75)
    value.backward()
    assert value.isnan() and sqloss.value_at_risk(losses, 0.75).isnan()
    assert losses.grad.tolist() == [0, 1, 0, 0]
    assert sqloss.cvar(losses.detach(), 0.5).isnan()


@pytest.mark.parametrize("byte", [1, 2, 128, 255])
def test_a_mask_of_other_bytes_than_0_and_1(byte):
    """As views of uint8 and numpy's have them."""
    losses = torch.randn(10_000)
    keep = torch.rand(10_000) < 0.6
    mask = (keep.to(torch.uint8) * byte).view(torch.bool)
    assert_matches_twin(losses, 0.5, mask=mask)
    assert torch.equal(sqloss.cvar(losses, 0.5, mask=mask), sqloss.cvar(losses[keep], 0.5))
    assert_matches_twin(losses, 0.5, mask=mask, weight=torch.rand(10_000))


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e-30, 1e30, 1e160, 1e300])
def test_weights_of_any_magnitude(scale):
    losses = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    weight = torch.full_like(losses, scale)
    for alpha in (0.0, 0.25, 0.5, 0.75):
        got = sqloss.tail_weights(losses, alpha, weight=weight)
        torch.testing.assert_close(got, sqloss.tail_weights(losses, alpha))
        got = sqloss.cvar(losses, alpha, weight=weight)
        torch.testing.assert_close(got, sqloss.cvar(losses, alpha))


@pytest.mark.parametrize("n", [10, 100, 1000])
@pytest.mark.parametrize("w", [0.1, 0.3, 1 / 7, 1e-3])
def test_equal_weights_are_no_weights(n, w):
    """Their sums round, but that moves no threshold."""
    losses = torch.randperm(n, dtype=torch.float64)
    weight = torch.full_like(losses, w)
    for percent in range(100):
        threshold = sqloss.value_at_risk(losses, percent / 100, weight=weight)
        assert threshold == sqloss.value_at_risk(losses, percent / 100), percent
        twins = reference.superquantile(losses, 1 - percent / 100, weight)[1]
        assert threshold == twins, percent


@pytest.mark.parametrize("n", [40, 70, 200, 1000])
def test_the_threshold_is_a_loss_where_sums_of_weights_round(n):
    """At a k that is a sum of weights, give or take what their sums may be off by."""
    for i in range(200):
        losses = torch.randn(n, dtype=torch.float64)
        weight = torch.exp(torch.randn(n, dtype=torch.float64) * 5)
        reached = weight[losses.argsort(descending=True)].cumsum(0)
        fraction = (reached[i % n] / reached[-1]).item() + (n / 2 + 1) * 2.0**-52
        arguments = (weight, None, (), False)
        _, threshold, counts = op.superquantile(losses, min(fraction, 1.0), *arguments)
        assert (losses == threshold).any() and counts[1] > 0


def test_a_tail_smaller_than_rounding_is_still_a_tail():
    losses = torch.tensor([2.0, 1.0], dtype=torch.float64)
    weight = torch.tensor([1e-18, 1.0], dtype=torch.float64)
    for fraction in (1e-300, 1e-18, 1e-16, 1e-15):
        q = sqloss.tail_weights(losses, tail_fraction=fraction, weight=weight)
        assert q.sum().item() == pytest.approx(1, abs=1e-12)
    q = sqloss.tail_weights(torch.randn(50), 1 - 2**-53, weight=torch.rand(50))
    assert q.sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this CPU has no such mode")
@pytest.mark.parametrize("n", [50, 100_003])
def test_a_processor_that_takes_denormals_for_zero(n):
    losses = torch.randn(n).relu()
    mask = torch.zeros(n, dtype=torch.bool)
    mask[:40] = True
    calls = [
        lambda losses, alpha: sqloss.cvar(losses, alpha),
        lambda losses, alpha: sqloss.cvar(-losses, alpha, mask=mask),
        lambda losses, alpha: sqloss.value_at_risk(losses - 1, alpha, weight=mask.float()),
        lambda losses, alpha: sqloss.tail_weights(losses, alpha),
    ]
    expected = [call(losses, alpha) for call in calls for alpha in ALPHAS]
    torch.set_flush_denormal(True)
    try:
        got = [call(losses, alpha) for call in calls for alpha in ALPHAS]
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_an_infinite_gradient_reaches_the_tail_alone():
    losses = torch.tensor([5.0, 1.0, 2.0], requires_grad=True)
    weight = torch.tensor([0.0, 1.0, 1.0])
    for given_ in ({"weight": weight}, {"mask": weight > 0}):
        (grad,) = torch.autograd.grad(sqloss.cvar(losses, 0.5, **given_) * INF, losses)
        assert grad.tolist() == [0, 0, INF]


def test_plus_infinity_wins_over_minus_infinity():
    losses = torch.tensor([INF, -INF, 1.0], dtype=torch.float64)
    assert sqloss.cvar(losses, 0.0) == INF == reference.superquantile(losses, 1.0)[0]
    losses[2] = NAN
    assert sqloss.cvar(losses, 0.0).isnan() and reference.superquantile(losses, 1.0)[0].isnan()


def test_weights_under_the_mask_are_not_looked_at():
    losses, weight = torch.randn(3, 4), torch.rand(3, 4)
    mask = torch.rand(3, 4) < 0.7
    padded = weight.masked_fill(~mask, NAN)
    expected = sqloss.cvar(losses, 0.4, weight=weight, mask=mask)
    assert sqloss.cvar(losses, 0.4, weight=padded, mask=mask) == expected
    assert_matches_twin(losses, 0.4, weight=padded, mask=mask)


def test_a_default_device_changes_nothing():
    losses = torch.randn(20)
    expected = sqloss.cvar(losses, 0.5), sqloss.tail_weights(losses, 0.5)
    with torch.device("meta"):
        assert torch.equal(sqloss.cvar(losses, 0.5), expected[0])
        assert torch.equal(sqloss.tail_weights(losses, 0.5), expected[1])


def test_infinity_leaves_the_weights_finite(device):
    losses = torch.tensor([1.0, INF, 3.0, 2.0], device=device, requires_grad=True)
    value = sqloss.cvar(losses, 0.5)
    value.backward()
    assert value == INF and losses.grad.tolist() == [0, 0.5, 0.5, 0]
    assert sqloss.cvar(torch.tensor([-INF, -INF, 0.0]), 0.5) == -INF


def test_a_grad_scaler_sees_nan_only_in_the_tail():
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    (sqloss.cvar(losses, 0.5) * NAN).backward()
    assert losses.grad.isnan().tolist() == [False, False, True, True]


def test_masked_and_weightless_losses_are_not_there(device):
    losses = torch.tensor([NAN, 5.0, INF, 1.0, 2.0], device=device, requires_grad=True)
    mask = torch.tensor([False, True, False, True, True], device=device)
    for given_ in ({"mask": mask}, {"weight": mask.float()}, {"weight": mask.long()}):
        value = sqloss.cvar(losses, 1 / 3, **given_)
        assert value.item() == pytest.approx(3.5)  # of three, the worst two
        (grad,) = torch.autograd.grad(value, losses)
        torch.testing.assert_close(grad.cpu(), torch.tensor([0.0, 0.5, 0, 0, 0.5]))


# --- laws -----------------------------------------------------------------------------------------

floats = st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda x: x + 0.0)
samples = st.lists(st.one_of(floats, st.integers(-3, 3).map(float)), min_size=1, max_size=60)
alphas = st.one_of(st.floats(0, 1, exclude_max=True), st.integers(0, 99).map(lambda i: i / 100))


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def close(a, b, scale=1.0):
    return abs(float(a) - float(b)) <= 1e-9 * max(1.0, abs(float(a)), abs(float(b)), scale)


@given(samples, alphas)
def test_law_between_mean_and_maximum(losses, alpha):
    x = tensor(losses)
    value = float(sqloss.cvar(x, alpha))
    slack = 1e-9 * max(1.0, float(x.abs().max()))
    assert float(x.mean()) - slack <= value <= float(x.max()) + slack
    assert value >= float(sqloss.value_at_risk(x, alpha)) - slack


@given(samples, alphas, alphas)
def test_law_monotone_in_alpha(losses, a, b):
    x = tensor(losses)
    low, high = sorted((a, b))
    slack = 1e-9 * max(1.0, float(x.abs().max()))
    assert float(sqloss.cvar(x, low)) <= float(sqloss.cvar(x, high)) + slack
    assert sqloss.value_at_risk(x, low) <= sqloss.value_at_risk(x, high)


@given(samples, st.floats(0, 0.999), st.floats(1e-12, 1e-9))
def test_law_continuous_in_alpha(losses, alpha, step):
    x = tensor(losses)
    spread = float(x.max() - x.min())
    jump = abs(float(sqloss.cvar(x, alpha + step)) - float(sqloss.cvar(x, alpha)))
    # d cvar / d alpha = (cvar - var) / (1 - alpha)
    assert jump <= 2 * spread * step / (1 - alpha - step) + 1e-9 * max(1.0, float(x.abs().max()))


@given(samples, alphas, floats, st.floats(0, 1e3))
def test_law_translation_and_positive_homogeneity(losses, alpha, shift, factor):
    x = tensor(losses)
    value = float(sqloss.cvar(x, alpha))
    scale = max(abs(shift), float(x.abs().max()))
    assert close(sqloss.cvar(x + shift, alpha), value + shift, scale)
    assert close(sqloss.cvar(x * factor, alpha), value * factor, scale * factor)


@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=40), alphas)
def test_law_subadditive(pairs, alpha):
    x, y = tensor(pairs).unbind(1)
    slack = 1e-9 * max(1.0, float(x.abs().max()), float(y.abs().max()))
    assert sqloss.cvar(x + y, alpha) <= sqloss.cvar(x, alpha) + sqloss.cvar(y, alpha) + slack


@given(samples, alphas)
def test_law_weights_are_a_bounded_distribution_that_attains_the_value(losses, alpha):
    x = tensor(losses)
    q = sqloss.tail_weights(x, alpha)
    k = (1 - alpha) * len(losses)
    assert close(q.sum(), 1)
    assert (q >= 0).all() and (
        q <= (1 + 1e-12) / min(k, 1) if k < 1 else q <= (1 + 1e-12) / k
    ).all()
    assert close((q * x).sum(), sqloss.cvar(x, alpha), float(x.abs().max()))
    # no weights of that kind do better: here, the even ones
    even = torch.full_like(x, 1 / len(losses))
    assert (even * x).sum() <= (q * x).sum() + 1e-9 * max(1.0, float(x.abs().max()))


@given(samples, alphas, st.randoms(use_true_random=False))
def test_law_permutation(losses, alpha, random):
    x = tensor(losses)
    order = list(range(len(losses)))
    random.shuffle(order)
    assert close(sqloss.cvar(x[order], alpha), sqloss.cvar(x, alpha), float(x.abs().max()))
    assert torch.equal(sqloss.value_at_risk(x[order], alpha), sqloss.value_at_risk(x, alpha))
    assert torch.equal(sqloss.tail_weights(x[order], alpha), sqloss.tail_weights(x, alpha)[order])


@given(
    st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 4)), min_size=1, max_size=30),
    st.integers(0, 99),
)
def test_law_weights_are_repetitions(pairs, percent):
    alpha = percent / 100
    losses, times = (list(column) for column in zip(*pairs, strict=True))
    assume(sum(times) > 0)
    repeated = [x for x, m in pairs for _ in range(m)]
    x, w = tensor(losses), torch.tensor(times)
    assert close(sqloss.cvar(x, alpha, weight=w), sqloss.cvar(tensor(repeated), alpha))
    at_risk = sqloss.value_at_risk(x, alpha, weight=w)
    assert at_risk == sqloss.value_at_risk(tensor(repeated), alpha)
    q, q_repeated = (
        sqloss.tail_weights(x, alpha, weight=w),
        sqloss.tail_weights(tensor(repeated), alpha),
    )
    for value in set(repeated):
        assert close(q[x == value].sum(), q_repeated[tensor(repeated) == value].sum())


@given(samples, alphas, st.floats(1e-3, 1e3))
def test_law_only_relative_weights_matter(losses, alpha, factor):
    x, w = tensor(losses), tensor([1.0 + i % 3 for i in range(len(losses))])
    scale = float(x.abs().max())
    left, right = sqloss.cvar(x, alpha, weight=w), sqloss.cvar(x, alpha, weight=w * factor)
    assert close(left, right, scale)
    assert close(sqloss.cvar(x, alpha, weight=torch.ones_like(x)), sqloss.cvar(x, alpha), scale)


# --- the same bits every time ---------------------------------------------------------------------


MANY_ROWS = [((700, 301), 1), ((301, 700), 0), ((5000, 9), 1), ((9, 5000), 0)]


@pytest.mark.parametrize("shape, dim", [((300_001,), None), *MANY_ROWS])
def test_same_bits_for_any_number_of_threads(shape, dim):
    losses = torch.randn(shape)
    weight = torch.rand(shape)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            leaf = losses.clone().requires_grad_()
            value = sqloss.cvar(leaf, 0.83, dim=dim)
            weighted = sqloss.cvar(leaf, 0.83, dim=dim, weight=weight)
            (value.sum() + weighted.sum()).backward()
            results.append((value.detach(), weighted.detach(), leaf.grad))
    finally:
        torch.set_num_threads(before)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.parametrize("n", [1, 2, 9, 40, 64, 65, 300, 1000, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_same_bits_of_a_row_alone_and_among_others(n, dtype):
    """In either dimension, and whichever rows are its neighbours."""
    losses = torch.randn(35, n).to(dtype)
    weight, mask = torch.rand(35, n), torch.rand(35, n) < 0.8
    mask[:, 0] = True
    for given_ in ({}, {"weight": weight}, {"mask": mask}):
        together = sqloss.cvar(losses, 0.7, dim=1, **given_)
        columns = {name: x.t().contiguous() for name, x in given_.items()}
        assert torch.equal(sqloss.cvar(losses.t().contiguous(), 0.7, dim=0, **columns), together)
        for row in (0, 15, 16, 34):
            own = {name: x[row] for name, x in given_.items()}
            assert sqloss.cvar(losses[row], 0.7, **own) == together[row]


def test_same_bits_on_every_repetition(device):
    losses = torch.randn(10_007, device=device)
    first = sqloss.cvar(losses, 0.9), sqloss.tail_weights(losses, 0.9)
    for _ in range(100):
        assert torch.equal(sqloss.cvar(losses, 0.9), first[0])
        assert torch.equal(sqloss.tail_weights(losses, 0.9), first[1])


CAPABILITY_PROGRAM = """
import sys, torch, sqloss
g = torch.Generator().manual_seed(0)
out = []
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for shape, dim in (
        ((9001,), 0), ((50, 301), 1), ((301, 50), 0), ((40_000,), 0), ((100_003,), 0),
        ((40_000, 2), 0), ((35, 1), 1), ((35, 9), 1), ((9, 35), 0), ((18, 64), 1), ((700, 18), 0),
    ):
        # not randn: torch's own normals depend on the capability
        x = torch.rand(shape, generator=g).sub(0.5).to(dtype).requires_grad_()
        w = torch.rand(shape, generator=g)
        m = torch.rand(shape, generator=g) < 0.7
        m.select(dim, 0).fill_(True)
        for given in ({}, {"weight": w}, {"mask": m}, {"weight": w.double(), "mask": m}):
            y = sqloss.cvar(x, 0.77, dim=dim, **given)
            out += [y.detach(), *torch.autograd.grad(y.sum(), x)]
torch.save(out, sys.argv[1])
"""


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_same_bits_for_every_cpu_capability(capability, need_capability, saved_with_capability):
    """One build holds all vector widths, and none changes a bit."""
    need_capability(capability)
    expected = saved_with_capability(CAPABILITY_PROGRAM, "DEFAULT")
    result = saved_with_capability(CAPABILITY_PROGRAM, capability)
    for a, b in zip(expected, result, strict=True):
        assert torch.equal(a, b)


# --- autograd -------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "dim": {"dim": 1},
    "dims": {"dim": (0, 2), "keepdim": True},
    "keepdim": {"keepdim": True},
    "weight": {"weight": torch.linspace(0.1, 2, 60, dtype=torch.float64).view(3, 4, 5), "dim": -1},
    "mask": {"mask": torch.arange(60).view(3, 4, 5) % 4 != 0},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("function", [sqloss.cvar, sqloss.value_at_risk])
def test_gradcheck_and_gradgradcheck(function, variant):
    losses = torch.randperm(60, dtype=torch.float64).view(3, 4, 5).div(7).requires_grad_()

    def f(x):
        return function(x, 0.55, **VARIANTS[variant])

    every_way = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(f, losses, check_batched_forward_grad=True, **every_way)
    assert torch.autograd.gradgradcheck(f, losses, check_fwd_over_rev=True)
    # curvature of what comes before and after: the second derivative of f itself is zero
    assert torch.autograd.gradgradcheck(lambda x: f(x**2).exp(), losses)


def test_value_and_threshold_together():
    """Both outputs of one operator call, each with its gradient."""
    losses = torch.randn(20, dtype=torch.float64, requires_grad=True)
    fraction = torch.tensor(0.3, dtype=torch.float64)
    value, threshold, _ = torch.ops.sqloss.superquantile(losses, fraction, None, None, [], False)
    (grad,) = torch.autograd.grad(2 * value + 3 * threshold, losses)
    (of_threshold,) = torch.autograd.grad(sqloss.value_at_risk(losses, 0.7), losses)
    torch.testing.assert_close(grad, 2 * sqloss.tail_weights(losses, 0.7) + 3 * of_threshold)


def test_value_at_risk_shares_its_gradient_over_ties():
    losses = torch.tensor([1.0, 2.0, 2.0, 3.0], requires_grad=True)
    sqloss.value_at_risk(losses, 0.5).backward()
    assert losses.grad.tolist() == [0, 0.5, 0.5, 0]


def test_the_graph_is_freed_with_its_last_user():
    """The saved threshold is an output of the node that saves it: no cycle may keep both alive."""
    layer = torch.randn(9, requires_grad=True)
    losses = layer * 2
    memory = weakref.ref(losses)
    value, threshold = sqloss.cvar(losses, 0.5), sqloss.value_at_risk(losses, 0.5)
    del losses
    assert memory() is not None  # saved for backward
    del value, threshold
    assert memory() is None


def test_backward_twice_needs_retain_graph():
    losses = torch.randn(9, requires_grad=True)
    value = sqloss.cvar(losses, 0.5)
    value.backward(retain_graph=True)
    value.backward()
    assert torch.equal(losses.grad, 2 * sqloss.tail_weights(losses, 0.5))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


def test_saved_tensor_hooks():
    packed = []
    losses = torch.randn(9, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t.shape) or t.clone(), lambda t: t
    ):
        value = sqloss.cvar(losses, 0.5)
    value.backward()
    assert packed == [(9,), (), (3,)]  # losses, threshold, counts: nothing else of size n
    assert torch.equal(losses.grad, sqloss.tail_weights(losses, 0.5))


def test_forward_mode():
    from torch.autograd import forward_ad

    losses, tangent = torch.randn(2, 9, dtype=torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(losses, tangent)
        value = forward_ad.unpack_dual(sqloss.cvar(dual, 0.5))
        q = sqloss.tail_weights(losses, 0.5)
        torch.testing.assert_close(value.tangent, (q * tangent).sum())
        assert value.primal == sqloss.cvar(losses, 0.5)


def test_no_graph_where_none_is_wanted():
    losses = torch.randn(9)
    assert not sqloss.cvar(losses, 0.5).requires_grad
    losses.requires_grad_()
    assert sqloss.cvar(losses, 0.5).requires_grad
    assert not sqloss.tail_weights(losses, 0.5).requires_grad
    with torch.no_grad():
        assert not sqloss.cvar(losses, 0.5).requires_grad
    with torch.inference_mode():
        assert sqloss.cvar(losses, 0.5) == sqloss.cvar(losses, 0.5).clone()


def test_changing_the_losses_after_forward_is_noticed():
    losses = torch.randn(9, requires_grad=True)
    doubled = losses * 2
    value = sqloss.cvar(doubled, 0.5)
    with torch.no_grad():
        doubled.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    layer = torch.nn.Linear(5, 1)
    x = torch.randn(30, 5)

    def step(x):
        return sqloss.cvar(layer(x).square().squeeze(1), 0.7)

    expected = torch.autograd.grad(step(x), list(layer.parameters()))
    checkpoint(step, x.requires_grad_(), use_reentrant=use_reentrant).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(layer.parameters(), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_reduces_in_float32(device, dtype):
    losses = torch.randn(500, device=device).to(dtype).requires_grad_()
    with torch.autocast(device.type, dtype):
        value = sqloss.cvar(losses, 0.8)
        q = sqloss.tail_weights(losses, 0.8)
        mapped = torch.func.grad(lambda x: sqloss.cvar(x, 0.8))(losses.detach())
    assert value.dtype == q.dtype == torch.float32
    assert torch.equal(value, sqloss.cvar(losses.float(), 0.8))
    value.backward()
    assert losses.grad.dtype == mapped.dtype == dtype
    assert torch.equal(losses.grad, q.to(dtype)) and torch.equal(mapped, losses.grad)
    assert sqloss.cvar(losses, 0.8).dtype == dtype  # outside of autocast, as torch.mean


# --- compile, export, fake tensors, torch.func ----------------------------------------------------


def sample_inputs(device="cpu"):
    """Arguments of the operator, small and of every kind."""
    fraction = torch.tensor(0.3, dtype=torch.float64)
    x = torch.randn(4, 5, device=device)
    w, m = torch.rand_like(x), torch.rand_like(x) < 0.8
    m[:, 0] = True
    yield x, fraction, None, None, [], False
    yield x, fraction, None, None, [1], True
    yield x.t(), fraction, w.t(), None, [0], False
    yield x.double(), fraction, w, m, [0, 1], True
    yield x.bfloat16(), fraction, None, m, [], False
    yield x[0, 0], fraction, None, None, [], True
    yield x[:1].expand(4, 5), fraction, None, None, [1], False
    yield torch.randn(3, 4, 5, device=device), fraction, None, None, [1], False
    yield torch.randn(3, 4, 5, device=device).permute(2, 0, 1), fraction, None, None, [0, 2], True


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, requires_grad):
    forward, backward = torch.ops.sqloss.superquantile, torch.ops.sqloss.superquantile_backward
    for losses, *arguments in sample_inputs(device):
        losses = losses.detach().requires_grad_(requires_grad)
        torch.library.opcheck(forward, (losses, *arguments))
        value, threshold, counts = forward(losses.detach(), *arguments)
        _, weight, mask, dim, keepdim = arguments
        one = torch.ones_like(value).requires_grad_(requires_grad)
        rest = (losses, weight, mask, threshold, counts, dim, keepdim)
        for gradients in ((one, None), (None, one), (one, one)):
            torch.library.opcheck(backward, (*gradients, *rest))


@pytest.mark.parametrize("dynamic", [True, False])
def test_compile_fullgraph(device, dynamic):
    def step(x, weight, mask):
        losses = (x - 1) ** 2
        return (
            sqloss.cvar(losses, 0.8, dim=0)
            + sqloss.value_at_risk(losses, tail_fraction=0.3, dim=0)
            + sqloss.cvar(losses, 0.5, weight=weight)
            + (sqloss.tail_weights(losses, 0.6, mask=mask) * losses).sum(0)
        ).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for n in (20, 33, 47) if dynamic else (20,):  # each size is one compilation else
        x = torch.randn(n, 3, device=device, requires_grad=True)
        weight, mask = torch.rand(n, 1, device=device), torch.rand(n, 3, device=device) < 0.9
        value = compiled(x, weight, mask)
        torch.testing.assert_close(value, step(x, weight, mask))
        expected = torch.autograd.grad(step(x, weight, mask), x)
        torch.testing.assert_close(torch.autograd.grad(value, x), expected)


def test_compiled_backward_uses_the_kernel():
    graphs = []

    def keep(graph, _):
        graphs.append(graph.code)
        return graph

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=lambda g, i: make_boxed_func(keep(g, i)))
    x = torch.randn(9, requires_grad=True)
    torch.compile(lambda x: sqloss.cvar(x, 0.8), fullgraph=True, backend=backend)(x).backward()
    assert "sqloss.superquantile.default" in graphs[0]
    assert "sqloss.superquantile_backward.default" in graphs[1]
    assert torch.equal(x.grad, sqloss.tail_weights(x, 0.8))


def test_alpha_changes_without_compiling_again():
    compilations = 0

    def backend(graph, _):
        nonlocal compilations
        compilations += 1
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def step(losses, alpha):
        return sqloss.cvar(losses, alpha)

    losses = torch.randn(50)
    for i in range(12):
        alpha = 0.05 + 0.07 * i
        torch.testing.assert_close(step(losses, alpha), sqloss.cvar(losses, alpha))
    # torch.compile takes the first float for a constant, and the second shows that it is not
    assert compilations <= 2


def test_compiled_module_follows_its_alpha():
    criterion = sqloss.nn.CVaR(0.5)
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    losses = torch.randn(20)
    for alpha in (0.5, 0.9, 0.2):
        criterion.alpha = alpha
        assert torch.equal(compiled(losses), sqloss.cvar(losses, alpha))


def test_export_with_dynamic_shapes():
    class Objective(torch.nn.Module):
        def forward(self, losses):
            return sqloss.cvar(losses, 0.8, dim=1)

    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Objective(), (torch.randn(4, 6),), dynamic_shapes={"losses": {0: batch}}
    )
    losses = torch.randn(9, 6)
    assert torch.equal(program.module()(losses), sqloss.cvar(losses, 0.8, dim=1))


def test_fake_tensors_and_tracing():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode():
        losses = torch.randn(3, 5, requires_grad=True)
        value = sqloss.cvar(losses, 0.5, dim=1)
        value.sum().backward()
        assert value.shape == (3,) and losses.grad.shape == (3, 5)
    traced = make_fx(lambda x: sqloss.cvar(x, 0.5))(torch.randn(8))
    losses = torch.randn(8)
    assert torch.equal(traced(losses), sqloss.cvar(losses, 0.5))


@pytest.mark.parametrize("function", [sqloss.cvar, sqloss.value_at_risk])
def test_func_grad_vmap_and_their_compositions(function):
    from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

    x = torch.randn(6, 20, dtype=torch.float64)

    def f(losses):
        return function(losses, 0.75)

    def by_rows(losses):
        return function(losses, 0.75, dim=1)

    leaf = x.clone().requires_grad_()
    (q,) = torch.autograd.grad(by_rows(leaf).sum(), leaf)
    assert torch.equal(vmap(f)(x), by_rows(x))
    assert torch.equal(vmap(f, in_dims=1)(x.t()), by_rows(x))
    assert torch.equal(grad(f)(x[0]), q[0])
    assert torch.equal(vmap(grad(f))(x), q)
    assert torch.equal(grad(lambda x: vmap(f)(x).sum())(x), q)
    assert torch.equal(vjp(f, x[0])[1](torch.tensor(2.0, dtype=x.dtype))[0], 2 * q[0])
    torch.testing.assert_close(jvp(f, (x[0],), (x[1],))[1], (q[0] * x[1]).sum())
    torch.testing.assert_close(jacrev(by_rows)(x).diagonal(dim1=0, dim2=1).T, q)
    leaf.grad = None
    vmap(f)(leaf).sum().backward()  # ordinary autograd around vmap
    assert torch.equal(leaf.grad, q)

    def curved(losses):
        return f(losses**2)

    (q2,) = torch.autograd.grad(function(y := (x[0] ** 2).requires_grad_(), 0.75), y)
    torch.testing.assert_close(hessian(curved)(x[0]), torch.diag(2 * q2))
    torch.testing.assert_close(jacrev(jacrev(curved))(x[0]), torch.diag(2 * q2))
    torch.testing.assert_close(
        vmap(hessian(curved))(x[:2])[0], torch.diag(2 * q2), msg="vmap over both derivatives"
    )


def test_vmap_with_weights_masks_dims_and_scalars():
    from torch.func import grad, vmap

    x, w = torch.randn(4, 5, 6), torch.rand(4, 5, 6) + 0.1
    m = torch.rand(5, 6) < 0.9
    m[0] = True

    def f(losses, weight, mask):
        return sqloss.cvar(losses, 0.6, dim=0, weight=weight, mask=mask, keepdim=True)

    expected = torch.stack([f(a, b, m) for a, b in zip(x, w, strict=True)])
    assert torch.equal(vmap(f, (0, 0, None))(x, w, m), expected)
    assert torch.equal(
        vmap(f, (None, 0, None))(x[0], w, m), torch.stack([f(x[0], b, m) for b in w])
    )
    weights = torch.stack(
        [sqloss.tail_weights(a, 0.6, weight=b) for a, b in zip(x, w, strict=True)]
    )
    mapped = vmap(lambda a, b: sqloss.tail_weights(a, 0.6, weight=b))(x, w)
    assert torch.equal(mapped, weights)
    scalars = torch.randn(7)
    assert torch.equal(vmap(lambda s: sqloss.cvar(s, 0.6, keepdim=True))(scalars), scalars)
    assert torch.equal(vmap(grad(lambda s: sqloss.cvar(s, 0.6)))(scalars), torch.ones(7))
    nested = vmap(vmap(lambda row: sqloss.cvar(row, 0.6)))(x)
    assert torch.equal(nested, sqloss.cvar(x, 0.6, dim=2))


def test_compiled_transforms():
    from torch.func import grad, jvp, linearize, vmap

    x = torch.randn(4, 10)
    q = sqloss.tail_weights(x, 0.7, dim=1)

    def f(row):
        return sqloss.cvar(row, 0.7)

    per_row = torch.compile(vmap(grad(f)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(per_row(x), q)
    along = torch.compile(lambda x, t: jvp(f, (x,), (t,))[1], backend="aot_eager")
    torch.testing.assert_close(along(x[0], x[1]), (q[0] * x[1]).sum())
    value, push_forward = linearize(f, x[0])
    torch.testing.assert_close(value, f(x[0]))
    torch.testing.assert_close(push_forward(x[1]), (q[0] * x[1]).sum())


def test_compiled_autograd():
    losses = torch.randn(9, requires_grad=True)
    weight = torch.rand(9)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        sqloss.cvar(losses * 2, 0.5, weight=weight).backward()
    q = sqloss.tail_weights(losses * 2, 0.5, weight=weight)
    torch.testing.assert_close(losses.grad, 2 * q)


# --- devices without a kernel ---------------------------------------------------------------------


def call_without_kernel(operator, *arguments):
    """The operator as a device without a kernel gets it."""
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    return operator.default._op_dk(key, *arguments)


def test_devices_without_a_kernel_get_the_reference_and_one_warning(monkeypatch):
    monkeypatch.setattr(_ops, "_warned", set())
    for losses, *arguments in sample_inputs():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = call_without_kernel(torch.ops.sqloss.superquantile, losses, *arguments)
        kernel = torch.ops.sqloss.superquantile(losses, *arguments)
        for a, b in zip(got, kernel, strict=True):
            torch.testing.assert_close(a, b)
        assert len(caught) <= 1
        _, weight, mask, dim, keepdim = arguments
        rest = (losses, weight, mask, *kernel[1:], dim, keepdim)
        one = torch.ones_like(kernel[0])
        operator = torch.ops.sqloss.superquantile_backward
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            grad = call_without_kernel(operator, one, one, *rest)
        torch.testing.assert_close(grad, operator(one, one, *rest))
    assert _ops._warned == {("superquantile", "cpu")}
    _ops._warned.clear()
    with pytest.warns(UserWarning, match="superquantile has no kernel for device type cpu"):
        call_without_kernel(torch.ops.sqloss.superquantile, *next(sample_inputs()))


# --- errors ---------------------------------------------------------------------------------------

X = torch.arange(6.0).view(2, 3)
ERRORS = [
    (lambda f: f([1.0], 0.5), TypeError, "losses: expected a tensor, got list"),
    (lambda f: f(torch.arange(3), 0.5), TypeError, "losses: expected a dense tensor of .*int64"),
    (lambda f: f(X > 1, 0.5), TypeError, "losses: expected a dense tensor of .*bool"),
    (lambda f: f(X.to(torch.complex64), 0.5), TypeError, "losses: .*complex64"),
    (lambda f: f(X.to_sparse(), 0.5), TypeError, "losses: .*got torch.float32, torch.sparse_coo"),
    (lambda f: f(X), TypeError, "alpha, tail_fraction: expected one of them, got neither"),
    (lambda f: f(X, 0.5, tail_fraction=0.5), TypeError, "expected one of them, got both"),
    (lambda f: f(X, "0.5"), TypeError, "alpha: expected a number, got str"),
    (lambda f: f(X, torch.tensor(0.5)), TypeError, "alpha: expected a number, got Tensor"),
    (lambda f: f(X, 1.0), ValueError, r"alpha: expected a confidence level in \[0, 1\).*got 1.0"),
    (lambda f: f(X, -0.1), ValueError, "alpha: expected a confidence level.*got -0.1"),
    (lambda f: f(X, NAN), ValueError, "alpha: expected a confidence level.*got nan"),
    (lambda f: f(X, tail_fraction=0), ValueError, r"tail_fraction: .*in \(0, 1\], got 0"),
    (lambda f: f(X, tail_fraction=1.5), ValueError, "tail_fraction: .*got 1.5"),
    (lambda f: f(X, 0.5, dim=2), IndexError, r"dim: expected to be in \[-2, 1\].*got 2"),
    (lambda f: f(X, 0.5, dim="0"), TypeError, "dim: expected an int or ints, got '0'"),
    (lambda f: f(X, 0.5, dim=1.0), TypeError, "dim: expected an int or ints, got 1.0"),
    (lambda f: f(X, 0.5, dim=(0, 1.0)), TypeError, "dim: expected an int or ints"),
    (lambda f: f(X, 0.5, dim=(0, -2)), ValueError, r"dim: expected each .* once, got \(0, -2\)"),
    (lambda f: f(X[:, :0], 0.5), ValueError, r"losses: expected at least one .*\(2, 0\)"),
    (lambda f: f(X[:, :0], 0.5, dim=1), ValueError, "losses: expected at least one"),
    (lambda f: f(X, 0.5, weight=[1.0]), TypeError, "weight: expected a tensor, got list"),
    (lambda f: f(X, 0.5, weight=X > 1), TypeError, "weight: expected .*got torch.bool"),
    (lambda f: f(X, 0.5, weight=X[:, :2]), ValueError, r"weight: .*\(2, 3\), got \(2, 2\)"),
    (lambda f: f(X, 0.5, weight=X[None]), ValueError, r"weight: .*got \(1, 2, 3\)"),
    (lambda f: f(X, 0.5, weight=X.to("meta")), ValueError, "weight: .*device of losses, cpu"),
    (lambda f: f(X, 0.5, mask=X), TypeError, "mask: expected a bool tensor, got torch.float32"),
    (lambda f: f(X, 0.5, mask=(X > 1)[:1, :2]), ValueError, "mask: expected a shape"),
]


@pytest.mark.parametrize("function", ["cvar", "value_at_risk", "tail_weights"])
@pytest.mark.parametrize("call, error, message", ERRORS)
def test_errors_name_function_argument_expected_and_got(function, call, error, message):
    with pytest.raises(error, match=f"^{function}: .*{message}"):
        call(getattr(sqloss, function))


def test_error_for_a_weight_that_wants_a_gradient():
    with pytest.raises(ValueError, match="cvar: weight: expected a tensor without gradient"):
        sqloss.cvar(X, 0.5, weight=X.clone().requires_grad_())
    with torch.no_grad():
        sqloss.cvar(X, 0.5, weight=X.clone().requires_grad_())


WEIGHT_ERRORS = [
    (torch.tensor([1.0, -1.0, 1.0]), "weight: expected finite values >= 0"),
    (torch.tensor([1.0, NAN, 1.0]), "weight: expected finite values >= 0"),
    (torch.tensor([1.0, INF, 1.0]), "weight: expected finite values >= 0"),
    (torch.full((3,), 1e308, dtype=torch.float64), "weight: expected a finite sum in every"),
    (torch.zeros(3), "weight, mask: expected a positive sum of weights in every reduction, got 0"),
]


@pytest.mark.parametrize("weight, message", WEIGHT_ERRORS)
def test_errors_that_need_the_weights_values(weight, message, kernel_raises):
    """The same from the kernel and from the reference."""
    for dim in (None, 1):
        for function in (sqloss.cvar, sqloss.value_at_risk, sqloss.tail_weights):
            with kernel_raises(ValueError, match=f"^{function.__name__}: {message}"):
                function(X, 0.5, weight=weight, dim=dim)
        with pytest.raises(ValueError, match=f"^superquantile: {message}"):
            reference.superquantile(
                X, 0.5, weight.expand(2, 3), None, dim=() if dim is None else (1,)
            )
    # in a thread of the pool, too
    many = torch.ones(70_000, 3, dtype=weight.dtype)
    many[-1] = weight
    with kernel_raises(ValueError, match=f"^cvar: {message}"):
        sqloss.cvar(torch.randn(70_000, 3), 0.5, weight=many, dim=1)


def test_error_for_a_row_that_is_masked_away(kernel_raises):
    mask = torch.tensor([[True, True, False], [False, False, False]])
    message = r"expected a positive sum of weights .*, got 0"
    assert sqloss.cvar(X, 0.5, mask=mask) == 1
    with kernel_raises(ValueError, match=message):
        sqloss.cvar(X, 0.5, mask=mask, dim=1)
    with pytest.raises(ValueError, match=message):
        reference.superquantile(X, 0.5, None, mask, (1,))


def test_the_operators_guard_their_memory():
    """Callers of torch.ops bypass the public functions' checks."""
    half = torch.tensor(0.5, dtype=torch.float64)
    forward, backward = torch.ops.sqloss.superquantile, torch.ops.sqloss.superquantile_backward
    for arguments, error, message in [
        ((X, half, X[:1], None, [], False), ValueError, "weight: expected the shape of losses"),
        ((X, half, None, X, [], False), TypeError, "mask: expected a bool tensor"),
        ((X, half, None, (X > 1)[0], [], False), ValueError, "mask: expected the shape"),
        ((X.long(), half, None, None, [], False), TypeError, "losses: expected float16, .* Long"),
        ((X.to(torch.float8_e5m2), half, None, None, [], False), TypeError, "losses: .* Float8"),
        ((X, half, X.to(torch.complex64), None, [], False), TypeError, "weight: expected a real"),
        (
            (X, half, None, None, [-1], False),
            IndexError,
            r"dim: expected to be in \[0, 1\].*got -1",
        ),
        ((X, half, None, None, [2], False), IndexError, r"dim: expected to be in \[0, 1\].*got 2"),
        ((X, half.clone().requires_grad_(), None, None, [], False), ValueError, "without gradient"),
        ((X, half, X.clone().requires_grad_(), None, [], False), ValueError, "without gradient"),
        ((X[:, :0], half, None, None, [], False), ValueError, "at least one loss"),
        (
            (X, half * 3, None, None, [], False),
            ValueError,
            r"tail_fraction in \(0, 1\], got .* = 1.5",
        ),
        ((X, half.float(), None, None, [], False), TypeError, "one float64 on the CPU"),
    ]:
        with pytest.raises(error, match=f"^superquantile: .*{message}"):
            forward(*arguments)
    value, threshold, counts = forward(X, half, None, None, [1], False)
    for gradient, t, c in [(value[:1], threshold, counts), (value, threshold[:1], counts)]:
        with pytest.raises(ValueError, match=r"superquantile_backward: .*expected 2 Float"):
            backward(gradient, None, X, None, None, t, c, [1], False)
    with pytest.raises(ValueError, match="counts: expected 6 Double"):
        backward(value, None, X, None, None, threshold, counts[:1], [1], False)


@pytest.mark.parametrize("dim", [[-1], [2]])
def test_fake_tensors_and_the_reference_refuse_the_same_dims(dim):
    half = torch.tensor(0.5, dtype=torch.float64)
    for losses in (X, X.to("meta")):
        with pytest.raises(IndexError, match=r"superquantile: dim: expected to be in \[0, 1\]"):
            torch.ops.sqloss.superquantile(losses, half, None, None, dim, False)
    with pytest.raises(IndexError, match=r"superquantile: dim: expected to be in \[0, 1\]"):
        reference.superquantile(X, 0.5, dim=dim)


def test_no_derivative_in_the_weights_is_taken_for_zero():
    from torch.func import grad, jvp

    losses, weight = torch.randn(6), torch.rand(6)

    def f(weight):
        return sqloss.cvar(losses, 0.5, weight=weight)

    with pytest.raises(ValueError, match=r"^cvar: weight: expected a tensor without gradient"):
        grad(f)(weight)
    with pytest.raises(ValueError, match=r"^cvar: weight: expected a tensor without gradient"):
        jvp(f, (weight,), (weight,))


def test_an_empty_batch_of_reductions_is_fine():
    losses = torch.empty(0, 5, requires_grad=True)
    value = sqloss.cvar(losses, 0.5, dim=1)
    assert value.shape == (0,)
    value.sum().backward()
    assert losses.grad.shape == (0, 5)


# --- where the kernels change ---------------------------------------------------------------------

# Around a warp, a block, and what a block's shared memory holds of a row of 4 bytes or less each
LIMITS = [1, 31, 32, 33, 1023, 1024, 1025, 2**14, 2**14 + 1, 48_000, 2**16 + 1]
MANY = [2**18 + 3, 2**20, 2**23 - 1, 2**23, 2**24 + 1]


def losses_like(kind, n, device, dtype):
    ramp = torch.arange(n, device=device).to(torch.float64)
    made = {
        "random": lambda: torch.randn(n, device=device),
        "sorted": lambda: ramp / n,
        "reversed": lambda: -ramp,
        "constant": lambda: ramp * 0 + 0.1,
        "mostly ties": lambda: torch.where(ramp % 10 == 0, ramp / n, 0.7),
        "denormal": lambda: (torch.rand(n, device=device) - 0.5) * torch.finfo(dtype).tiny,
        "narrow": lambda: 1 + ramp % 64 * torch.finfo(dtype).eps,
        "one huge": lambda: torch.randn_like(ramp).index_fill(
            0, torch.tensor([n // 2], device=device), torch.finfo(dtype).max / 4
        ),
        "one low": lambda: (1 + torch.randn_like(ramp)).index_fill(
            0, torch.tensor([n // 2], device=device), -torch.finfo(dtype).max / 4
        ),
        "two scales": lambda: torch.where(ramp % 10 < 8, ramp / n * 1e-6, ramp / n + 100),
        "not finite": lambda: torch.tensor([1.0, NAN, INF, -INF, -2.0, 3.0, 0.5], device=device)[
            torch.randint(7, (n,), device=device)
        ],
    }
    return made[kind]().to(dtype)


KINDS = ["random", "sorted", "reversed", "constant", "mostly ties", "denormal", "narrow"]
KINDS += ["one huge", "one low", "two scales", "not finite"]


@pytest.mark.parametrize("n", LIMITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_twin_where_the_kernels_change(device, n, kind, dtype):
    losses = losses_like(kind, n, device, dtype)
    for alpha in (1e-4, 0.3, 0.8, 0.999):
        assert_matches_twin(losses, alpha)
    if n <= 2**14 + 1:
        assert_matches_twin(torch.stack([losses, losses.flip(0)]), 0.8, dim=1)
    weight = torch.arange(n, device=device) % 3 + 1
    assert_matches_twin(losses, 0.8, weight=weight, mask=weight != 3)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_twin_of_many_short_rows(device, dim, dtype):
    """Rows of every kind in one batch: more than one for each lane of the CPU's vectors."""
    for n in [*range(1, 71), 127, 128, 129, 300]:
        rows = [losses_like(kind, n, device, dtype) for kind in KINDS + KINDS[:7]]
        losses = torch.stack(rows, 1 - dim)
        weight = torch.randint(4, losses.shape, device=device)
        mask = torch.rand(losses.shape, device=device) < 0.7
        for kept in (weight, mask):
            kept.select(dim, n // 2).fill_(1)
        alpha = ALPHAS[n % len(ALPHAS)]
        assert_matches_twin(losses, alpha, dim=dim)
        more = [{"weight": weight}, {"mask": mask}, {"weight": weight.double(), "mask": mask}]
        assert_matches_twin(losses, alpha, dim=dim, **more[n % 3])


@pytest.mark.parametrize("n", MANY)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_twin_of_many_losses(gpu, n, kind, dtype):
    losses = losses_like(kind, n, gpu, dtype)
    for alpha in (0.2, 0.8, 0.9999):
        assert_matches_twin(losses, alpha)
    weight = torch.arange(n, device=gpu) % 3 + 1
    assert_matches_twin(losses, 0.8, weight=weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_twin_of_many_long_rows(gpu, dtype):
    losses = torch.randn(300, 70_001, device=gpu).to(dtype)
    assert_matches_twin(losses, 0.8, dim=1)
    assert_matches_twin(losses.t(), 0.8, dim=0, weight=losses.t().abs() + 1)


def test_more_losses_than_32_bits_can_count(roomy_gpu):
    n, ones = 2**31 + 5, 2**30
    losses = torch.zeros(n, dtype=torch.bfloat16, device=roomy_gpu)
    losses[n - ones :] = 1
    losses[n - 1] = 3
    k = n / 2  # the tail: the ones, the three, and 2.5 of the zeros
    value, threshold, counts = op.superquantile(losses, 0.5, None, None, (), False)
    assert value.item() == torch.tensor((ones + 2) / k).bfloat16().item()
    assert threshold.item() == 0 and counts.tolist() == [ones, n - ones, k]
    q = sqloss.tail_weights(losses, 0.5)
    assert q[n - ones :].unique().tolist() == [2.0**-30]
    (share,) = q[: n - ones].unique().tolist()
    assert share == pytest.approx(2.5 / (n - ones) / k, rel=1e-2)
