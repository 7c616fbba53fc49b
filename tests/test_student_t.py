"""Student-t and normal samples with their KL divergence: the distributions against scipy, the
divergences against quadrature, the kernels against their twins, and every way torch calls them.
"""

import itertools
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special, stats
from torch.utils.checkpoint import checkpoint

import sqloss
from sqloss import _ops, reference

INF, NAN = math.inf, math.nan
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DFS = [0.5, 1.0, 2.0, 3.0, 5.0, 21.0, 1e4, INF]
FORMS = {"scale": lambda s: s, "log_scale": lambda s: s.log(), "logvar": lambda s: 2 * s.log()}
every_form = pytest.mark.parametrize("form", FORMS)
every_df = pytest.mark.parametrize("df", DFS)

# All seeds are fixed, so a test of statistics that passes once passes always. A sampler that draws
# what it should fails a new one of them with these probabilities.
P_VALUE = 1e-4
STANDARD_ERRORS = 4.5  # 7e-6


def seed_of(number, device="cpu"):
    return torch.tensor(number, dtype=torch.int64, device=device)


# --- the distribution -----------------------------------------------------------------------------


def law(df):
    return stats.norm() if math.isinf(df) else stats.t(df)


def draw(df, *shape, seed=0, dtype=torch.float32, device="cpu", **options):
    loc = torch.zeros(shape, dtype=dtype, device=device)
    return sqloss.student_t_rsample(df, loc, 1.0, seed=seed_of(seed, device), **options)


@every_df
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kolmogorov_smirnov(device, df, dtype):
    z = draw(df, 512, 513, dtype=dtype, device=device).flatten().cpu().numpy()
    assert kolmogorov_smirnov(z, df) > P_VALUE


def kolmogorov_smirnov(sample, df):
    return stats.kstest(sample, law(df).cdf).pvalue


def test_kolmogorov_smirnov_sees_what_is_wrong():
    z = draw(3.0, 512, 513).flatten().numpy()
    for wrong in (1.05 * z, z + 0.03, np.abs(z), draw(4.0, 512, 513).flatten().numpy()):
        assert kolmogorov_smirnov(wrong, 3.0) < P_VALUE


def moment(order, df):
    """E|t|^order"""
    log_moment = special.gammaln((order + 1) / 2) - 0.5 * math.log(math.pi)
    if math.isinf(df):
        return math.exp(log_moment + order / 2 * math.log(2))
    log_moment += special.gammaln((df - order) / 2) - special.gammaln(df / 2)
    return math.exp(log_moment + order / 2 * math.log(df))


@every_df
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments(device, df, dtype):
    z = draw(df, 1024, 1024, seed=1, dtype=dtype, device=device).double()
    n, least = z.numel(), min(df / 8, 0.5)
    for order in [order for order in (least, 1.0, 2.0, 4.0) if 2.2 * order < df]:
        error = math.sqrt((moment(2 * order, df) - moment(order, df) ** 2) / n)
        got = (z.abs() ** order).mean().item()
        assert got == pytest.approx(moment(order, df), abs=STANDARD_ERRORS * error)
    if df > 2:
        error = math.sqrt(moment(2.0, df) / n)
        assert z.mean().item() == pytest.approx(0, abs=STANDARD_ERRORS * error)
    assert z.sign().mean().item() == pytest.approx(0, abs=STANDARD_ERRORS / n**0.5)


def assert_tails(df, chunks, levels, dtype):
    """The numbers of samples beyond the quantiles of the law, both tails together."""
    bounds = {level: law(df).isf(level / 2) for level in levels}
    counts = dict.fromkeys(levels, 0)
    for seed in range(chunks):
        z = draw(df, 1024, 4096, seed=seed, dtype=dtype).abs_()
        z = z[z > min(bounds.values())]
        for level, bound in bounds.items():
            counts[level] += (z > bound).sum().item()
    n = chunks * 2**22
    for level in levels:
        sigma = math.sqrt(n * level)
        assert sigma > 8, "too few samples to tell"
        assert counts[level] == pytest.approx(n * level, abs=STANDARD_ERRORS * sigma)


@pytest.mark.parametrize("df", [0.5, 3.0, INF])
def test_tails_to_one_in_a_million(df):
    assert_tails(df, 16, [1e-3, 1e-4, 1e-5, 1e-6], torch.float32)


@pytest.mark.parametrize("df", [1.0, 5.0])
def test_tails_in_double(df):
    assert_tails(df, 2, [1e-3, 1e-4, 1e-5], torch.float64)


def dependence(a, b, df):
    """The p-value of the chi-squared test that a and b, of law(df), are independent."""
    edges = torch.tensor(law(df).ppf(np.arange(1, 8) / 8))
    of_a, of_b = (torch.bucketize(t.double().cpu().contiguous(), edges) for t in (a, b))
    cells = 8 * of_a + of_b
    return stats.chisquare(cells.flatten().bincount(minlength=64)).pvalue


@pytest.mark.parametrize("df", [0.5, 5.0, INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_independence_of_columns_rows_samples_and_seeds(device, df, dtype):
    for columns in (7, 8):  # of an odd number, two rows share a Philox block
        z = draw(df, 4096, columns, num_samples=4, dtype=dtype, device=device)
        for column, other in itertools.combinations(range(columns), 2):
            assert dependence(z[..., column], z[..., other], df) > P_VALUE
        assert dependence(z[:, :-1], z[:, 1:], df) > P_VALUE
        assert dependence(z[:, :-1, -1], z[:, 1:, 0], df) > P_VALUE
        for sample, other in itertools.combinations(range(4), 2):
            assert dependence(z[sample], z[other], df) > P_VALUE
        for seed in (1, 2**32, -1):
            again = draw(df, 4096, columns, num_samples=4, seed=seed, dtype=dtype, device=device)
            assert dependence(z, again, df) > P_VALUE


def test_the_test_of_independence_sees_the_sine_and_the_cosine_of_one_radius():
    """Which is what is cheaper, and wrong, for every finite df."""
    r, angle = (5 * (torch.rand(2**16) ** (-2 / 5) - 1)).sqrt(), 2 * math.pi * torch.rand(2**16)
    a, b = r * angle.cos(), r * angle.sin()
    assert stats.kstest(a.numpy(), law(5).cdf).pvalue > P_VALUE
    assert dependence(a, b, 5) < P_VALUE


# --- the divergence -------------------------------------------------------------------------------


def log_density(t, df):
    if math.isinf(df):
        return -0.5 * (t * t + math.log(2 * math.pi))
    log_z = math.lgamma(df / 2) - math.lgamma((df + 1) / 2) + 0.5 * math.log(math.pi * df)
    return -0.5 * (df + 1) * math.log1p(t * t / df) - log_z


def expectation(function, df):
    """E function(t), by quadrature over t = sinh(s)."""

    def integrand(s):
        t = math.sinh(s)
        return math.exp(log_density(t, df)) * function(t) * math.cosh(s)

    ends = 80.0 if df < 1 else 40.0
    halves = [
        integrate.quad(integrand, *half, epsabs=1e-12, epsrel=1e-12, limit=500)[0]
        for half in ((-ends, -5), (-5, 0), (0, 5), (5, ends))
    ]
    return sum(halves)


def divergence(df, loc, scale, prior_df):
    def log_ratio(t):
        return log_density(t, df) - log_density(loc + scale * t, prior_df)

    return expectation(log_ratio, df) - math.log(scale)


def slopes(df, loc, scale, prior_df):
    """The divergence's derivatives, by central differences of the quadrature; 0 in infinity."""
    at = [df, loc, scale, prior_df]

    def slope(index):
        if math.isinf(at[index]):
            return 0.0
        step = 1e-4 * max(1.0, abs(at[index]))
        up, down = ([*at[:index], at[index] + side * step, *at[index + 1 :]] for side in (1, -1))
        return (divergence(*up) - divergence(*down)) / (2 * step)

    return [slope(index) for index in range(4)]


# (df, loc, scale, prior_df), of two columns each: nothing else is the same in them
PAIRS = [
    ((5.0, 0.7, 0.4, 5.0), (3.0, -1.0, 1.5, 8.0)),
    ((0.5, 2.0, 0.2, 0.7), (21.0, 0.5, 0.8, INF)),
    ((1.0, 0.0, 1.0, 5.0), (INF, -0.5, 0.6, 4.0)),
    ((1e4, 1.0, 0.5, 3.0), (2.0, 0.0, 3.0, 1e4)),
]
every_pair = pytest.mark.parametrize("pair", PAIRS, ids=str)


def assert_mean(values, expected):
    """Of independent values along the first dimension."""
    error = values.std(0) / len(values) ** 0.5
    difference = (values.mean(0) - torch.tensor(expected, dtype=torch.float64)).abs()
    assert (difference <= STANDARD_ERRORS * error + 1e-9).all(), (difference / error).tolist()


@every_pair
@pytest.mark.parametrize("estimator", ["mc", "analytic_entropy"])
@every_form
def test_divergence_and_gradients_are_unbiased(device, pair, estimator, form):
    """Every row of 2^16 is the two columns again, and its kl and gradients another sample."""
    expected = torch.tensor(pair, dtype=torch.float64, device=device)
    rows = expected.T.unsqueeze(1).repeat(1, 2**16, 1)
    df, loc, scale, prior_df = (tensor.requires_grad_() for tensor in rows.unbind())
    given_scale = FORMS[form](scale)
    kl = sqloss.student_t_rsample_kl(
        df,
        loc,
        **{form: given_scale},
        prior_df=prior_df,
        estimator=estimator,
        return_z=False,
        seed=seed_of(7, device),
    )
    assert_mean(kl.detach().cpu(), sum(divergence(*column) for column in pair))
    grads = torch.autograd.grad(kl.sum(), [df, loc, given_scale, prior_df])
    in_form = {"scale": 1.0, "log_scale": expected[:, 2], "logvar": expected[:, 2] / 2}[form]
    wanted = torch.tensor([slopes(*column) for column in pair], dtype=torch.float64).T
    wanted[2] *= in_form if form == "scale" else in_form.cpu()
    for got, slope in zip(grads, wanted.tolist(), strict=True):
        assert_mean(got.cpu(), slope)


@pytest.mark.parametrize("column", [(5.0, 0.7, 0.4), (3.0, -1.0, 1.5), (0.5, 0.3, 0.2)])
@pytest.mark.parametrize("estimator", ["mc", "analytic_entropy"])
def test_a_shared_df_has_both_gradients(column, estimator):
    df, loc, scale = (torch.full((2**16, 1), x, dtype=torch.float64) for x in column)
    df.requires_grad_()
    kl = sqloss.student_t_rsample_kl(
        df, loc, scale, estimator=estimator, return_z=False, seed=seed_of(8)
    )
    in_df, _, _, in_prior_df = slopes(*column, column[0])
    assert_mean(torch.autograd.grad(kl.sum(), df)[0], in_df + in_prior_df)


def test_gradient_of_a_function_of_the_samples_is_unbiased():
    """d/d df of E[log(1 + z^2)], whose samples pass through z alone."""
    df = torch.full((2**16, 1), 3.0, dtype=torch.float64, requires_grad=True)
    z = sqloss.student_t_rsample(df, torch.tensor(0.5), torch.tensor(0.8), seed=seed_of(9))
    (gradient,) = torch.autograd.grad((z**2).log1p().sum(), df)

    def expected(df):
        return expectation(lambda t: math.log1p((0.5 + 0.8 * t) ** 2), df)

    assert_mean(gradient, (expected(3 + 1e-4) - expected(3 - 1e-4)) / 2e-4)


@every_form
def test_the_normal_divergence_is_closed(device, form):
    loc = torch.randn(5, 3, dtype=torch.float64, device=device)
    scale = torch.rand(5, 3, dtype=torch.float64, device=device) + 0.1
    p = torch.distributions.Normal(loc, scale)
    q = torch.distributions.Normal(torch.zeros_like(loc), torch.ones_like(scale))
    expected = torch.distributions.kl_divergence(p, q).sum(-1)
    given_scale = {form: FORMS[form](scale)}
    z, kl = sqloss.normal_rsample_kl(loc, **given_scale)
    torch.testing.assert_close(kl, expected)
    assert z.shape == loc.shape
    kl = sqloss.normal_rsample_kl(loc, **given_scale, num_samples=3, return_z=False)
    torch.testing.assert_close(kl, expected)
    kl = sqloss.normal_rsample_kl(
        loc, **given_scale, num_samples=3, reduction="none", return_z=False
    )
    torch.testing.assert_close(kl, expected.expand(3, 5))


def test_the_normal_divergence_by_samples_is_unbiased():
    loc, scale = torch.tensor([0.5, -1.0]), torch.tensor([0.4, 1.3])
    closed = sqloss.normal_rsample_kl(loc.double(), scale.double(), return_z=False)
    kl = sqloss.normal_rsample_kl(
        loc.double().expand(2**16, 2), scale, estimator="mc", return_z=False, seed=seed_of(3)
    )
    assert_mean(kl, closed.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_infinite_df_is_the_normal_distribution(device, dtype):
    loc, logvar = torch.randn(2, 40, 9, device=device).to(dtype)
    options = {"logvar": logvar, "num_samples": 3, "estimator": "mc", "seed": seed_of(1, device)}
    normal = sqloss.normal_rsample_kl(loc, **options)
    for df, rounding in ((INF, 0.0), (1e6, 1e-4)):
        for as_df in (df, torch.tensor(df, device=device), torch.full_like(loc, df)):
            got = sqloss.student_t_rsample_kl(as_df, loc, **options)
            for a, b in zip(got, normal, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-6 + rounding, atol=2e-6 + rounding)
    df = torch.tensor(INF, dtype=dtype, device=device, requires_grad=True)
    z, kl = sqloss.student_t_rsample_kl(df, loc, **options)
    assert torch.autograd.grad(z.sum() + kl.sum(), df)[0] == 0


# --- the kernels against their twins --------------------------------------------------------------


def public(tensors, estimator="mc", num_samples=None, **options):
    """(z, kl) of the public function that has these arguments; of no estimator z alone."""
    if estimator == "none":
        return sqloss.student_t_rsample(**tensors, num_samples=num_samples, **options), None
    function = sqloss.student_t_rsample_kl if "df" in tensors else sqloss.normal_rsample_kl
    return function(**tensors, estimator=estimator, num_samples=num_samples or 1, **options)


def form_of(tensors):
    return next(name for name in tensors if name in FORMS)


def operands(tensors, dtype):
    """df, loc, scale and prior_df of the operator: of one shape, loc of the dtype of z."""
    shape = torch.broadcast_shapes(*(t.shape for t in tensors.values()))
    expanded = {name: t.detach().expand(shape) for name, t in tensors.items()}
    loc = expanded["loc"].to(dtype)
    return expanded.get("df"), loc, expanded[form_of(tensors)], expanded.get("prior_df")


def assert_near(actual, expected, rounding, magnitude=None):
    """The error is at most `rounding` of what is usual in the tensor and of the magnitude (that of
    what is expected), beside that of rounding to the tensor's own dtype.
    """
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    a, e = actual.detach().double(), expected.double()
    m, info = e.abs() if magnitude is None else magnitude.double(), torch.finfo(actual.dtype)
    usual = e[e.isfinite()].abs().median() if e.isfinite().any() else 0.0
    allowed = rounding * (m + usual) + info.eps * m + info.smallest_normal * info.eps
    same = (a == e) | (a.isnan() & e.isnan())
    wrong = ~(same | ((a - e).abs() <= allowed))
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.numel()} differ, by up to "
        f"{((a - e).abs() / (m + usual))[wrong].max():.3g} where {rounding} is allowed, the first "
        f"at {wrong.nonzero()[0].tolist()}: {a[wrong][0]} instead of {e[wrong][0]}"
    )


ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}


def assert_matches_twin(
    tensors, seed, num_samples=None, estimator="mc", reduction="mean", rows=None, rounding=None
):
    """Outputs and all gradients, of a loss of z and kl both."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    options = {"num_samples": num_samples, "seed": seed, "rows": rows}
    if estimator != "none":
        options["reduction"] = reduction
    outputs = public(leaves, estimator, **options)

    df, loc, scale, prior_df = operands(tensors, outputs[0].dtype)
    samples = None if num_samples == 1 and estimator != "none" else num_samples
    mean = reduction == "mean"
    given_ = (df, loc, scale, prior_df, seed, rows, samples, form_of(tensors), estimator, mean)
    expected = reference.student_t_rsample_kl(*given_, True)
    rounding = rounding or ROUNDING[reference.losses_dtype(loc, scale)]
    outputs, expected = (pair[: 1 if estimator == "none" else 2] for pair in (outputs, expected))
    for output, of_twin in zip(outputs, expected, strict=True):
        assert_near(output, of_twin, rounding)

    grads = [torch.randn(output.shape, dtype=torch.float64).to(output) for output in outputs]
    names = [name for name in ("df", "loc", form_of(tensors), "prior_df") if name in tensors]
    got = torch.autograd.grad(outputs, [leaves[name] for name in names], grads)
    mask = [t is not None for t in (df, loc, scale, prior_df)]
    grad_z, grad_kl = (*grads, None)[:2]
    expected = reference.student_t_rsample_kl_backward(grad_z, grad_kl, *given_, mask)
    expected = itertools.compress(expected, mask)
    for name, gradient, of_twin in zip(names, got, expected, strict=True):
        shape, dtype = tensors[name].shape, tensors[name].dtype
        total = of_twin.double().sum_to_size(shape).to(dtype)
        assert_near(gradient, total, 4 * rounding, of_twin.double().abs().sum_to_size(shape))


def parameters(*shape, form="scale", dtype=torch.float64, device="cpu", df=(1.0, 30.0), prior=True):
    """Random ones by the names of their arguments."""
    tensors = {"loc": torch.randn(shape, dtype=torch.float64)}
    tensors[form] = FORMS[form](torch.rand(shape, dtype=torch.float64) + 0.1)
    low, high = df
    for name in ("df", "prior_df")[: 1 + prior]:
        tensors[name] = low + (high - low) * torch.rand(shape, dtype=torch.float64)
    return {name: t.to(device, dtype) for name, t in tensors.items()}


def normal(tensors):
    return {name: t for name, t in tensors.items() if "df" not in name}


SHAPES = [
    *itertools.product((1, 2, 5), (1, 2, 3, 15, 16, 17, 20, 33)),
    (200, 1),
    (301, 7),
    (3, 511),
    (2, 513),
    (2, 5003),
]


@every_form
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", ["none", "mc", "analytic_entropy"])
def test_twin_by_size(device, form, dtype, estimator):
    for shape in SHAPES:
        tensors = parameters(*shape, form=form, dtype=dtype, device=device)
        if estimator == "none":
            del tensors["prior_df"]
        assert_matches_twin(tensors, seed_of(shape[0], device), estimator=estimator)


@every_form
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", ["closed_form", "mc"])
def test_normal_twin_by_size(device, form, dtype, estimator):
    for shape in SHAPES:
        tensors = normal(parameters(*shape, form=form, dtype=dtype, device=device))
        assert_matches_twin(tensors, seed_of(shape[0], device), estimator=estimator)


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 64])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_twin_by_number_of_samples(device, form, dtype, num_samples, reduction):
    for shape in ((3, 7), (2, 3, 5), (40, 33), (1, 1030)):
        tensors = parameters(*shape, form=form, dtype=dtype, device=device)
        seed, options = seed_of(-5, device), {"num_samples": num_samples, "reduction": reduction}
        for estimator in ("mc", "analytic_entropy"):
            assert_matches_twin(tensors, seed, estimator=estimator, **options)
        for estimator in ("mc", "closed_form"):
            assert_matches_twin(normal(tensors), seed, estimator=estimator, **options)
        del tensors["prior_df"]
        assert_matches_twin(tensors, seed, estimator="none", num_samples=num_samples)


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("df", [*DFS, 40.0, 127.9, 128.1, 1e3, 1e6])
def test_twin_by_df(device, form, dtype, df):
    """Each df with every other as the prior's, none, and its own."""
    tensors = parameters(30, len(DFS), form=form, dtype=dtype, device=device)
    tensors["prior_df"] = torch.tensor(DFS, dtype=dtype, device=device).expand(30, len(DFS))
    tensors["df"] = torch.full_like(tensors["loc"], df)
    for estimator in ("mc", "analytic_entropy"):
        assert_matches_twin(tensors, seed_of(2, device), estimator=estimator)
    del tensors["prior_df"]
    for estimator in ("mc", "analytic_entropy", "none"):
        assert_matches_twin(tensors, seed_of(2, device), estimator=estimator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("of_df", [(), (1,), (7,), (5, 1), (5, 7), (4, 1, 1), (4, 5, 7), (1, 1, 7)])
def test_df_and_parameters_broadcast(device, dtype, of_df):
    full = parameters(4, 5, 7, dtype=dtype, device=device)
    for of_loc, of_scale in (((4, 5, 7), (4, 5, 7)), ((4, 1, 1), (5, 7)), ((), (4, 5, 7))):
        tensors = dict(full)
        for name, shape in (("df", of_df), ("loc", of_loc), ("scale", of_scale)):
            index = [slice(0, size) for size in shape]
            tensors[name] = full[name][(0,) * (3 - len(shape))][tuple(index)]
        for prior_df in (None, tensors["df"] + 1, full["prior_df"], full["prior_df"][0, 0, 0]):
            tensors["prior_df"] = prior_df
            present = {name: t for name, t in tensors.items() if t is not None}
            if len(torch.broadcast_shapes(*(t.shape for t in present.values()))) == 3:
                for estimator in ("mc", "analytic_entropy"):
                    assert_matches_twin(present, seed_of(2, device), estimator=estimator)


def test_df_may_be_a_number(device):
    tensors = parameters(6, 5, dtype=torch.float32, device=device, prior=False)
    seed = seed_of(3, device)
    for df in (0.5, 3, 5.0, INF):
        tensors["df"] = torch.full((6, 5), float(df), device=device)
        for prior in (2.5, 7, INF):
            prior_df = torch.full((6, 5), float(prior), device=device)
            expected = public({**tensors, "prior_df": prior_df}, seed=seed)
            got = public({**tensors, "df": df, "prior_df": prior}, seed=seed)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    half = {name: t.bfloat16() for name, t in tensors.items()} | {"df": 5.0}
    assert public(half, seed=seed)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtypes", itertools.product(DTYPES, repeat=3), ids=str)
def test_twin_by_mixed_dtypes(device, dtypes):
    tensors = parameters(9, 20, form="logvar", device=device)
    for name, dtype in zip(("loc", "logvar", "df"), dtypes, strict=True):
        tensors[name] = tensors[name].to(dtype)
    tensors["prior_df"] = tensors["prior_df"].to(dtypes[2])
    z, kl = public(tensors)
    assert z.dtype == torch.result_type(tensors["loc"] + tensors["logvar"], tensors["df"])
    assert kl.dtype == (torch.float64 if z.dtype == torch.float64 else torch.float32)
    assert_matches_twin(tensors, seed_of(2, device))


def views(device):
    base = torch.rand(12, 10, 8, device=device) + 0.5
    return {
        "transposed": base.transpose(0, 2),
        "every second": base[::2, 1::3, ::4],
        "offset": base[3:, 2:, 1:],
        "expanded rows": base[:1].expand(12, 10, 8),
        "expanded columns": base[:, :, :1].expand(12, 10, 8),
        "expanded scalar": base[0, 0, 0].expand(3, 4, 5),
        "flipped diagonal": base.diagonal(dim1=0, dim2=2).t().flip(0),
        "rows of 2,000 apart": (torch.rand(2000, 6, device=device) + 0.5).t(),
    }


@pytest.mark.parametrize("view", views("cpu"))
def test_twin_by_strides(device, view):
    strided = views(device)[view]
    plain = parameters(*strided.shape, dtype=torch.float32, device=device)
    for name in plain:
        assert_matches_twin({**plain, name: strided}, seed_of(1, device))
        got = public({**plain, name: strided}, seed=seed_of(1, device))
        expected = public({**plain, name: strided.contiguous()}, seed=seed_of(1, device))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert_matches_twin(dict.fromkeys(plain, strided), seed_of(1, device), num_samples=3)


def test_gradients_of_strided_outputs(device):
    """grad_z and grad_kl of any strides, as an expanded or transposed loss gives them."""
    tensors = parameters(6, 5, device=device)
    leaves = [t.requires_grad_() for t in tensors.values()]
    z, kl = public(tensors, num_samples=4, reduction="none", seed=seed_of(1, device))
    weight = torch.randn(5, 6, 4, device=device, dtype=torch.float64)
    for of_z, of_kl in (
        (weight.permute(2, 1, 0), weight[0].t()),
        (weight[0, 0, 0].expand(4, 6, 5), weight[0, 0, 0].expand(4, 6)),
    ):
        got = torch.autograd.grad((z, kl), leaves, (of_z, of_kl), retain_graph=True)
        dense = (of_z.contiguous(), of_kl.contiguous())
        expected = torch.autograd.grad((z, kl), leaves, dense, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_no_rows_and_no_columns(device):
    for shape, of_kl in (((0, 5), (0,)), ((3, 0), (3,)), ((2, 0, 4), (2, 0))):
        tensors = parameters(*shape, device=device)
        leaves = [t.requires_grad_() for t in tensors.values()]
        for num_samples in (1, 3):
            z, kl = public(tensors, num_samples=num_samples, seed=seed_of(0, device))
            assert z.shape == (shape if num_samples == 1 else (3, *shape))
            assert kl.shape == of_kl and not kl.any()
            grads = torch.autograd.grad(z.sum() + kl.sum(), leaves)
            assert all(g.shape == shape for g in grads)
        z, kl = public(normal(tensors), "closed_form", seed=seed_of(0, device))
        assert z.shape == shape and kl.shape == of_kl and not kl.any()


def test_one_dimension_is_one_row(device):
    tensors = parameters(7, device=device)
    z, kl = public(tensors, seed=seed_of(4, device))
    assert z.shape == (7,) and kl.shape == ()
    row = public({name: t[None] for name, t in tensors.items()}, seed=seed_of(4, device))
    assert torch.equal(z, row[0][0]) and torch.equal(kl, row[1][0])


def test_a_scalar_sample(device):
    z = sqloss.student_t_rsample(5.0, torch.tensor(1.0, device=device), 2.0)
    assert z.shape == () and z.isfinite()
    z = sqloss.student_t_rsample(5.0, torch.tensor(1.0, device=device), 2.0, 3)
    assert z.shape == (3,) and len(z.unique()) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_df_that_is_not_positive_gives_nan(device, dtype):
    tensors = parameters(5, 2, dtype=dtype, device=device)
    tensors["df"][:3, 0] = torch.tensor([0.0, -1.0, NAN])
    tensors["prior_df"][3, 0] = -2.0
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    z, kl = public(leaves, seed=seed_of(0, device))
    assert z.isnan().tolist() == [[True, False]] * 3 + [[False, False]] * 2
    assert kl.isnan().tolist() == [True] * 4 + [False]
    grads = torch.autograd.grad(z.sum() + kl.sum(), list(leaves.values()))
    assert all(g[4].isfinite().all() and g[:4, 1].isfinite().all() for g in grads)
    assert grads[list(leaves).index("df")][:3, 0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_and_infinite_parameters_follow_the_formulas(device, dtype):
    df = torch.tensor([3.0, 3.0, INF, 3.0, 3.0, 3.0, 3.0], dtype=dtype, device=device)
    loc = torch.tensor([NAN, INF, INF, 0.0, 0.0, 0.0, 0.0], dtype=dtype, device=device)
    scale = torch.tensor([1.0, 1.0, 1.0, NAN, 0.0, -1.0, INF], dtype=dtype, device=device)
    columns = (t.unsqueeze(-1) for t in (df, loc, scale))
    tensors = dict(zip(("df", "loc", "scale"), columns, strict=True))
    seed = seed_of(0, device)
    z, kl = public(tensors, seed=seed)
    twin = reference.student_t_rsample_kl(
        *tensors.values(), None, seed, None, *(None, "scale"), "mc", True, True
    )
    assert z[[0, 3]].isnan().all() and z[[1, 2]].flatten().tolist() == [INF, INF] and z[4] == 0
    assert kl[[0, 3, 5]].isnan().all() and kl[[1, 2, 4]].tolist() == [INF] * 3
    assert torch.equal(kl.isnan(), twin[1].isnan())


def test_what_is_huge_but_finite_stays_so(device):
    """Where z^2 overflows float32, log(1 + z^2 / df) and its derivative do not."""
    z, kl = public(
        {
            "df": torch.full((4, 3), 0.5, device=device),
            "loc": (loc := torch.full((4, 3), 1e30, device=device).requires_grad_()),
            "scale": torch.full((4, 3), 1e25, device=device),
        },
        seed=seed_of(0, device),
    )
    assert z.isfinite().all() and kl.isfinite().all()
    assert torch.autograd.grad(kl.sum(), loc)[0].isfinite().all()
    wide = sqloss.student_t_rsample(0.5, torch.zeros(512, 512, device=device), 1.0)
    assert wide.isfinite().all() and wide.abs().max() > 1e8
