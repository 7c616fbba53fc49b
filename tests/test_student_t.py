"""Student-t and normal samples with their KL divergence: the distributions against scipy, the
divergences against quadrature, the kernels against their twins, and every way torch calls them.
"""

import itertools
import math

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


def assert_tails(device, df, chunks, levels, dtype):
    """The numbers of samples beyond the quantiles of the law, both tails together."""
    bounds = {level: law(df).isf(level / 2) for level in levels}
    counts = dict.fromkeys(levels, 0)
    for seed in range(chunks):
        z = draw(df, 1024, 4096, seed=seed, dtype=dtype, device=device).abs_()
        z = z[z > min(bounds.values())]
        for level, bound in bounds.items():
            counts[level] += (z > bound).sum().item()
    n = chunks * 2**22
    for level in levels:
        sigma = math.sqrt(n * level)
        assert sigma > 8, "too few samples to tell"
        assert counts[level] == pytest.approx(n * level, abs=STANDARD_ERRORS * sigma)


@pytest.mark.parametrize("df", [0.5, 3.0, INF])
def test_tails_to_one_in_a_million(device, df):
    assert_tails(device, df, 16, [1e-3, 1e-4, 1e-5, 1e-6], torch.float32)


@pytest.mark.parametrize("df", [1.0, 5.0])
def test_tails_in_double(device, df):
    assert_tails(device, df, 2, [1e-3, 1e-4, 1e-5], torch.float64)


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
def test_a_shared_df_has_both_gradients(device, column, estimator):
    columns = torch.tensor(column, dtype=torch.float64, device=device).expand(2**16, 1, 3)
    df, loc, scale = columns.unbind(-1)
    df = df.clone().requires_grad_()
    kl = sqloss.student_t_rsample_kl(
        df, loc, scale, estimator=estimator, return_z=False, seed=seed_of(8, device)
    )
    in_df, _, _, in_prior_df = slopes(*column, column[0])
    assert_mean(torch.autograd.grad(kl.sum(), df)[0].cpu(), in_df + in_prior_df)


def test_gradient_of_a_function_of_the_samples_is_unbiased(device):
    """d/d df of E[log(1 + z^2)], whose samples pass through z alone."""
    df = torch.full((2**16, 1), 3.0, dtype=torch.float64, device=device, requires_grad=True)
    loc = torch.tensor(0.5, device=device)
    z = sqloss.student_t_rsample(df, loc, 0.8, seed=seed_of(9, device))
    (gradient,) = torch.autograd.grad((z**2).log1p().sum(), df)

    def expected(df):
        return expectation(lambda t: math.log1p((0.5 + 0.8 * t) ** 2), df)

    assert_mean(gradient.cpu(), (expected(3 + 1e-4) - expected(3 - 1e-4)) / 2e-4)


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


def test_the_normal_divergence_by_samples_is_unbiased(device):
    loc, scale = torch.tensor([[0.5, -1.0], [0.4, 1.3]], dtype=torch.float64, device=device)
    closed = sqloss.normal_rsample_kl(loc, scale, return_z=False)
    kl = sqloss.normal_rsample_kl(
        loc.expand(2**16, 2), scale, estimator="mc", return_z=False, seed=seed_of(3, device)
    )
    assert_mean(kl.cpu(), closed.item())


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


def assert_near(actual, expected, rounding, magnitude=None, more=0.0):
    """The error is at most `rounding` of what is usual in the tensor and of the magnitude (that of
    what is expected), beside that of rounding to the tensor's own dtype, and `more`.
    """
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    a, e = actual.detach().double(), expected.double()
    m, info = e.abs() if magnitude is None else magnitude.double(), torch.finfo(actual.dtype)
    usual = e[e.isfinite()].abs().median() if e.isfinite().any() else 0.0
    allowed = rounding * (m + usual) + info.eps * m + info.smallest_normal * info.eps + more
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
    computed = reference.losses_dtype(loc, scale)
    rounding = rounding or ROUNDING[computed]
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
        of_twin, tensor = of_twin.double(), tensors[name]
        total = of_twin.sum_to_size(tensor.shape).to(tensor.dtype)
        magnitude = of_twin.abs().sum_to_size(tensor.shape)
        # that in a large df is a small difference, of the digits of the derivative in log(df)
        more = 128 * torch.finfo(computed).eps / tensor.double() if "df" in name else 0.0
        assert_near(gradient, total, 16 * rounding, magnitude, more)


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
    *itertools.product((1, 5), (1, 2, 3, 15, 16, 17, 20, 33)),
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
@pytest.mark.parametrize("num_samples", [1, 2, 3, 20])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_twin_by_number_of_samples(device, form, dtype, num_samples, reduction):
    for shape in ((2, 3, 7), (40, 33), (1, 1030)):
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


@pytest.mark.parametrize("df", [0.5, 3.0, 1e6, INF])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_twin_where_samples_are_extreme(device, df, dtype):
    """The largest and the smallest of 4 million, found by drawing their rows again."""
    z = draw(df, 2**16, 64, seed=5, dtype=dtype, device=device).abs().flatten()
    extreme = torch.cat([z.topk(20, largest=largest).indices for largest in (True, False)])
    tensors = parameters(40, 64, dtype=dtype, device=device)
    tensors["df"] = torch.full_like(tensors["loc"], df)
    assert_matches_twin(tensors, seed_of(5, device), rows=extreme // 64)


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


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=3)), ids=str)
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
        for of_df in ((), shape[-1:]):  # degrees of freedom of no element have no influence
            dfs = [torch.full(of_df, 5.0, device=device, requires_grad=True) for _ in range(2)]
            tensors |= {"df": dfs[0], "prior_df": dfs[1]}
            z, kl = public(tensors, seed=seed_of(0, device))
            grads = torch.autograd.grad(z.sum() + kl.sum(), dfs)
            assert all(g.shape == of_df and not g.any() for g in grads)
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
    assert kl[[0, 3, 5]].isnan().all() and kl[[1, 4]].tolist() == [INF] * 2
    # where df is infinite too, infinite numbers meet zeros
    assert not kl[2].isfinite() and twin[1][2] == INF
    others = [0, 1, 3, 4, 5, 6]
    assert torch.equal(kl[others].isnan(), twin[1][others].isnan())


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("of_df", [(), (125,)])
def test_gradient_of_a_df_of_many_rows(device, dtype, of_df):
    tensors = parameters(4501, 125, dtype=dtype, device=device)
    for name in ("df", "prior_df"):
        tensors[name] = tensors[name][0, : math.prod(of_df)].reshape(of_df)
    assert_matches_twin(tensors, seed_of(6, device))


# --- which draw is which --------------------------------------------------------------------------


def test_manual_seed_and_generators_reproduce(device):
    loc = torch.zeros(5, 3, device=device)

    def draws(generator=None):
        z, kl = sqloss.student_t_rsample_kl(5.0, loc, 1.0, generator=generator)
        normal = sqloss.normal_rsample_kl(loc, 1.0, generator=generator)[0]
        return z, kl, normal, sqloss.student_t_rsample(5.0, loc, 1.0, generator=generator)

    def same(a, b):
        return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]

    torch.manual_seed(1)
    first, second = draws(), draws()
    torch.manual_seed(1)
    assert all(same(draws(), first)) and all(same(draws(), second))
    assert not any(same((first[0], *first[2:]), (second[0], *second[2:])))
    assert not torch.equal(first[0], first[3]), "every call draws its own seed"
    generator = torch.Generator(device).manual_seed(2)
    before = torch.get_rng_state()
    a, b = draws(generator), draws(generator)
    assert torch.equal(torch.get_rng_state(), before) and not torch.equal(a[0], b[0])
    generator.manual_seed(2)
    assert all(same(draws(generator), a))
    generator.manual_seed(2)
    seed = sqloss.draw_seed(generator=generator)
    assert seed.dtype == torch.int64 and seed.shape == () and seed.device == generator.device
    assert torch.equal(sqloss.student_t_rsample_kl(5.0, loc, 1.0, seed=seed)[0], a[0])


def test_seeds_have_64_bits(device):
    seeds = torch.stack([sqloss.draw_seed(device=device) for _ in range(256)])
    assert len(seeds.unique()) == 256
    for bit in range(64):
        assert 64 < (seeds >> bit & 1).sum() < 192


def test_all_bits_of_seed_and_row_and_sample_count(device):
    loc = torch.zeros(1, 8, device=device)

    def z(seed, row, **options):
        rows = torch.tensor([row], device=device)
        return sqloss.student_t_rsample(3.0, loc, 1.0, seed=seed_of(seed, device), rows=rows)

    drawn = [z(seed, row) for seed in (0, 1, 2**31, 2**32, 2**62, -1) for row in (0, 1)]
    drawn += [z(0, row) for row in (2**29, 2**30, 2**32, 2**40, 2**59)]
    assert len(torch.stack(drawn).unique()) == 8 * len(drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 1), (9001, 7), (7, 128), (6, 130), (3, 2501)])
def test_noise_is_the_twins(device, dtype, shape):
    """So the random words are the same on every device."""
    loc = torch.zeros(shape, dtype=dtype, device=device)
    numbers = torch.arange(shape[0], device=device)
    for rows in (None, numbers.flip(0) * 2**40 + 3, -1 - numbers):
        for seed in (seed_of(2**62 + 1, device), numbers - 2):
            got = torch.ops.sqloss.student_t_noise(loc, seed, rows, 2)
            expected = reference.student_t_noise(loc, seed, rows, 2)
            for a, b in zip(got, expected, strict=True):
                assert_near(a, b, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 5, 8, 600])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_rows_draw_a_part_again_bit_for_bit(device, dtype, columns, num_samples):
    tensors = parameters(40, columns, dtype=dtype, device=device)
    seed, rows = seed_of(77, device), torch.tensor([39, 0, 7, 8, 9, 8], device=device)
    options = {"num_samples": num_samples, "reduction": "none"}

    def outputs(tensors, **more):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        z, kl = public(leaves, seed=seed, **options, **more)
        return z, kl, *torch.autograd.grad(z.double().sum() + kl.sum(), list(leaves.values()))

    full = outputs(tensors)
    subset = outputs({name: t[rows] for name, t in tensors.items()}, rows=rows)
    for whole, part in zip(full, subset, strict=True):
        sampled = num_samples > 1 and whole.shape[:1] == (num_samples,)
        assert torch.equal(whole[:, rows] if sampled else whole[rows], part)
    shaped = {name: t.view(5, 8, columns) for name, t in tensors.items()}
    z, kl = public(shaped, seed=seed, **options)
    assert torch.equal(z.flatten(-3, -2), full[0]) and torch.equal(kl.flatten(-2), full[1])


def test_a_seed_for_every_row(device):
    tensors = parameters(2, 3, 5, device=device)
    rows = torch.tensor([[5, 0, 2], [9, 1, 1]], device=device)
    seeds = torch.tensor([[1, 2, 3], [4, 5, 2**40]], device=device)
    z, kl = public(tensors, seed=seeds, rows=rows)
    for i, j in itertools.product(range(2), range(3)):
        one = {name: t[i, j][None] for name, t in tensors.items()}
        alone = public(one, seed=seeds[i, j], rows=rows[i, j][None])
        assert torch.equal(alone[0][0], z[i, j]) and torch.equal(alone[1][0], kl[i, j])
    for seed in (seeds, seeds[0], seeds[:, :1], seeds[:1, :1].expand(2, 3)):
        assert_matches_twin(tensors, seed, rows=rows)
        assert_matches_twin(tensors, seed, num_samples=2)


def test_samples_do_not_depend_on_their_number(device):
    tensors = parameters(6, 5, device=device)
    options = {"reduction": "none", "seed": seed_of(1, device)}
    z, kl = public(tensors, num_samples=7, **options)
    one, of_one = public(tensors, **options)
    three, of_three = public(tensors, num_samples=3, **options)
    assert torch.equal(z[0], one) and torch.equal(kl[0], of_one)
    assert torch.equal(z[:3], three) and torch.equal(kl[:3], of_three)
    del tensors["prior_df"]
    assert torch.equal(public(tensors, "none", num_samples=7, seed=seed_of(1, device))[0], z)
    alone = public(parameters(6, 5), num_samples=7, return_z=False, seed=seed_of(1))
    assert alone.shape == (6,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 70_001), (999, 31), (40, 3000), (20_001, 3)])
@pytest.mark.parametrize("of_df", ["element", "column", "scalar"])
def test_same_bits_for_any_number_of_threads_and_repetition(device, dtype, shape, of_df):
    tensors = parameters(*shape, dtype=dtype, device=device)
    for name in ("df", "prior_df"):
        index = {"element": ..., "column": 0, "scalar": (0, 0)}[of_df]
        tensors[name] = tensors[name][index]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
            z, kl = public(leaves, num_samples=2, seed=seed_of(1, device))
            # torch's own sum to a scalar depends on threads
            wanted = [t for t in leaves.values() if t.dim() > 0]
            results.append((z, kl, *torch.autograd.grad(z.sum() + kl.sum(), wanted)))
    finally:
        torch.set_num_threads(before)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


CAPABILITY_PROGRAM = """
import sys, torch, sqloss
g = torch.Generator().manual_seed(0)
out = []
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for shape in ((50, 301), (301, 5)):
        x = torch.rand(shape, generator=g).sub(0.5).mul(6).to(dtype).requires_grad_()
        s = torch.rand(shape, generator=g).sub(0.5).mul(2).to(dtype).requires_grad_()
        f = torch.rand(shape, generator=g).mul(40).add(0.5).to(dtype).requires_grad_()
        for estimator in ("mc", "analytic_entropy"):
            z, kl = sqloss.student_t_rsample_kl(
                f, x, log_scale=s, num_samples=2, estimator=estimator, seed=torch.tensor(1)
            )
            out += [z, kl, *torch.autograd.grad(z.sum() + kl.sum(), (f, x, s))]
        z, kl = sqloss.normal_rsample_kl(x, logvar=s, seed=torch.tensor(1))
        out += [z, kl, *torch.autograd.grad(z.sum() + kl.sum(), (x, s))]
torch.save([t.detach() for t in out], sys.argv[1])
"""


@pytest.mark.parametrize("capability, other", [("AVX2", "DEFAULT"), ("AVX512", "AVX2")])
def test_same_bits_for_every_cpu_capability(
    capability, other, need_capability, saved_with_capability
):
    """One build holds all vector widths, and none changes a bit; but for CPUs without fused
    multiply-add, which round more often.
    """
    need_capability(capability)
    result = saved_with_capability(CAPABILITY_PROGRAM, capability)
    for a, b in zip(saved_with_capability(CAPABILITY_PROGRAM, other), result, strict=True):
        if other == "DEFAULT":
            rounding = 1e3 * torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, b, rtol=rounding, atol=rounding * a.abs().max().item())
        else:
            assert torch.equal(a, b)


# --- autograd -------------------------------------------------------------------------------------

ESTIMATORS = [("mc", True), ("analytic_entropy", True), ("mc", False), ("closed_form", False)]


@every_form
@pytest.mark.parametrize("estimator, student", ESTIMATORS)
@pytest.mark.parametrize("num_samples, reduction", [(1, "mean"), (3, "mean"), (3, "none")])
def test_gradcheck_and_gradgradcheck(device, form, estimator, student, num_samples, reduction):
    tensors = parameters(2, 2, form=form, df=(1.5, 6.0), device=device)
    tensors = tensors if student else normal(tensors)
    names = list(tensors)

    def outputs(*leaves, names=names):
        return public(
            dict(zip(names, leaves, strict=True)),
            estimator,
            num_samples=num_samples,
            reduction=reduction,
            seed=seed_of(11, device),
        )

    leaves = [t.requires_grad_() for t in tensors.values()]
    options = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(outputs, leaves, **options, check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(outputs, leaves, check_batched_grad=True)
    if student:  # df and the prior's are one
        del tensors["prior_df"]
        names = list(tensors)
        leaves = list(tensors.values())
        assert torch.autograd.gradcheck(lambda *x: outputs(*x, names=names), leaves, **options)
        assert torch.autograd.gradgradcheck(lambda *x: outputs(*x, names=names), leaves)


@pytest.mark.parametrize("num_samples", [None, 3])
def test_gradcheck_of_samples(device, num_samples):
    tensors = parameters(2, 3, df=(1.5, 6.0), prior=False, device=device)

    def samples(*leaves):
        named = dict(zip(tensors, leaves, strict=True))
        return sqloss.student_t_rsample(**named, num_samples=num_samples, seed=seed_of(11, device))

    leaves = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(samples, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(samples, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("df", [0.5, 5.0, 39.9, 40.1, 1e3, 1e6, INF])
@pytest.mark.parametrize("estimator", ["mc", "analytic_entropy"])
@pytest.mark.parametrize("prior", [False, True])
def test_differentiable_gradients_and_tangents_have_the_digits_of_the_kernels(
    device, dtype, df, estimator, prior
):
    """Formulas, not kernels; in a large df their terms cancel."""
    tensors = parameters(40, 1, dtype=dtype, device=device, prior=prior)
    seed = seed_of(2, device)
    tensors["df"] = torch.full_like(tensors["loc"], df)

    def kl(*values):
        return public(dict(zip(tensors, values, strict=True)), estimator, seed=seed)[1]

    leaves = [t.detach().requires_grad_() for t in tensors.values()]
    expected = torch.autograd.grad(kl(*leaves).sum(), leaves)
    formulas = torch.autograd.grad(kl(*leaves).sum(), leaves, create_graph=True)
    for i, (leaf, of_kernel) in enumerate(zip(leaves, expected, strict=True)):
        moves = tuple(torch.full_like(t, j == i) for j, t in enumerate(tensors.values()))
        tangent = torch.func.jvp(kl, tuple(tensors.values()), moves)[1]
        more = 128 * torch.finfo(dtype).eps / df if list(tensors)[i] in ("df", "prior_df") else 0.0
        for got in (formulas[i], tangent.unsqueeze(-1)):
            assert_near(got, of_kernel.expand_as(leaf), 16 * ROUNDING[dtype], more=more)


@pytest.mark.parametrize("estimator", ["mc", "analytic_entropy"])
@pytest.mark.parametrize("df", [3.0, 30.0, 50.0, 300.0])
def test_second_derivative_in_df(device, df, estimator):
    tensors, seed = parameters(40, 1, device=device), seed_of(2, device)

    def kl(df):
        return public({**tensors, "df": df}, estimator, seed=seed)[1].sum()

    def gradient(df):
        leaf = torch.tensor(df, dtype=torch.float64, device=device, requires_grad=True)
        return torch.autograd.grad(kl(leaf), leaf)[0]

    step = 1e-4 * df
    expected = (gradient(df + step) - gradient(df - step)) / (2 * step)
    leaf = torch.tensor(df, dtype=torch.float64, device=device, requires_grad=True)
    first = torch.autograd.grad(kl(leaf), leaf, create_graph=True)[0]
    for second in (torch.autograd.grad(first, leaf)[0], torch.func.hessian(kl)(leaf.detach())):
        torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-9 / df)


def test_df_that_is_not_positive_gives_nan_in_formulas_too(device):
    df = torch.tensor([[-1.0], [0.0], [3.0]], device=device, requires_grad=True)
    kl = sqloss.student_t_rsample_kl(df, torch.zeros_like(df), 1.5, return_z=False)
    gradient = torch.autograd.grad(kl.sum(), df, create_graph=True)[0]
    assert gradient.isnan().flatten().tolist() == [True, True, False]


def test_only_wanted_gradients_and_outputs(device):
    tensors = parameters(4, 3, device=device)
    full = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    z, kl = public(full, seed=seed_of(1, device))
    expected = torch.autograd.grad(z.sum() + 2 * kl.sum(), list(full.values()))
    for wanted in range(4):
        name = list(tensors)[wanted]
        leaf = tensors[name].detach().requires_grad_()
        z, kl = public({**tensors, name: leaf}, seed=seed_of(1, device))
        assert torch.equal(torch.autograd.grad(z.sum() + 2 * kl.sum(), leaf)[0], expected[wanted])
    # the two outputs' gradients add up to that of both
    z, kl = public(full, seed=seed_of(1, device))
    leaves = list(full.values())
    of_z = torch.autograd.grad(z.sum(), leaves, allow_unused=True, materialize_grads=True)
    z, kl = public(full, seed=seed_of(1, device))
    of_kl = torch.autograd.grad(2 * kl.sum(), leaves)
    for a, b, both in zip(of_z, of_kl, expected, strict=True):
        torch.testing.assert_close(a + b, both)
    assert not public(tensors)[0].requires_grad
    with torch.no_grad():
        assert not public(full)[1].requires_grad
    with torch.inference_mode():
        assert public(tensors)[1].isfinite().all()


def test_changing_an_input_after_forward_is_noticed():
    tensors = parameters(4, 3)
    loc = tensors["loc"].requires_grad_()
    z, _ = public({**tensors, "loc": loc * 1})
    z.sum().backward()
    moved = loc * 1
    z, _ = public({**tensors, "loc": moved})
    moved.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(device, use_reentrant):
    layer = torch.nn.Linear(5, 8, device=device)
    x = torch.randn(30, 5, device=device)

    def step(x):
        loc, logvar = layer(x).chunk(2, 1)
        z, kl = sqloss.student_t_rsample_kl(5.0, loc, logvar=logvar)
        return (z.square().sum(1) + kl).mean()

    torch.manual_seed(3)
    expected = torch.autograd.grad(step(x), list(layer.parameters()))
    torch.manual_seed(3)
    checkpoint(step, x.requires_grad_(), use_reentrant=use_reentrant).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(layer.parameters(), expected, strict=True))


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_the_divergence_alone_does_not_grow_with_samples(peak_memory, dtype):
    tensors = parameters(256, 64, form="logvar", dtype=dtype)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    gradients = sum(t.nbytes for t in leaves.values())

    def step(num_samples):
        public(leaves, num_samples=num_samples, return_z=False).sum().backward()
        for t in leaves.values():
            t.grad = None

    step(2)  # whatever is made once
    for num_samples in (1, 64):
        assert peak_memory(lambda n=num_samples: step(n)) <= gradients + 32 * 256 + 4096


def test_nothing_but_the_arguments_is_saved_for_backward(device):
    tensors = {name: t.requires_grad_() for name, t in parameters(6, 40, device=device).items()}
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t.data_ptr() if t.numel() > 1 else None) or t, lambda t: t
    ):
        z, kl = public(tensors, num_samples=5)
    saved = {pointer for pointer in packed if pointer is not None}
    assert saved <= {t.data_ptr() for t in tensors.values()}
    (z.sum() + kl.sum()).backward()
    assert tensors["df"].grad.isfinite().all()


# --- compile, export, fake tensors, torch.func ----------------------------------------------------


def operator_arguments(device="cpu"):
    """Arguments of the operator, small and of every kind."""
    seed, rows = seed_of(5, device), torch.tensor([[4, 0, 2], [1, 1, 9]], device=device)
    for index, (kl, form, samples, mean) in enumerate(
        [
            ("none", "scale", None, True),
            ("mc", "scale", None, True),
            ("mc", "log_scale", 3, True),
            ("mc", "logvar", 3, False),
            ("analytic_entropy", "logvar", 2, False),
            ("analytic_entropy", "scale", None, True),
            ("mc", "scale", 2, True),
            ("closed_form", "logvar", None, True),
            ("closed_form", "log_scale", 2, False),
        ]
    ):
        tensors = parameters(2, 3, 5, form=form, device=device)
        df, loc, scale, prior_df = (tensors[n] for n in ("df", "loc", form, "prior_df"))
        if index % 3 == 0:
            loc, df = loc.bfloat16(), df.float()
            scale = scale.float()
        if index % 3 == 1:
            df = df[:1, :1].expand_as(loc)
            loc = loc.transpose(0, 1).contiguous().transpose(0, 1)
        if index >= 6:
            df, prior_df = None, None
        if kl == "none" or index % 2:
            prior_df = None
        keys = seed + rows[0] if index == 4 else seed
        yield df, loc, scale, prior_df, keys, rows if index % 2 else None, samples, form, kl, mean


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, requires_grad):
    ops = torch.ops.sqloss
    every_kind = list(operator_arguments(device))[:: 1 + requires_grad]
    for index, (*tensors, seed, rows, samples, form, kl, mean) in enumerate(every_kind):
        given_ = [t if t is None else t.detach().requires_grad_(requires_grad) for t in tensors]
        arguments = (*given_, seed, rows, samples, form, kl, mean)
        return_z = kl == "none" or index % 3 != 1
        torch.library.opcheck(ops.student_t_rsample_kl, (*arguments, return_z))
        with torch.no_grad():
            outputs = ops.student_t_rsample_kl(*arguments, return_z)
        grads = [torch.randn_like(t).requires_grad_(requires_grad) for t in outputs]
        grads = [grads[0] if return_z else None, None if kl == "none" else grads[1]]
        mask = [t is not None for t in tensors]
        torch.library.opcheck(ops.student_t_rsample_kl_backward, (*grads, *arguments, mask))


def test_opcheck_of_the_noise(device):
    for *_, loc, seed, rows, samples in (
        (arguments[1].float(), *arguments[4:7]) for arguments in operator_arguments(device)
    ):
        torch.library.opcheck(
            torch.ops.sqloss.student_t_noise,
            (loc, seed, rows, samples),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def every_public_function(df, loc, logvar):
    """A number that depends on all outputs of all functions."""
    z, kl = sqloss.student_t_rsample_kl(df, loc, logvar=logvar, prior_df=4.0)
    z2, kl2 = sqloss.student_t_rsample_kl(
        df, loc, logvar=logvar, num_samples=3, estimator="analytic_entropy", reduction="none"
    )
    z3, kl3 = sqloss.normal_rsample_kl(loc, logvar=logvar)
    kl4 = sqloss.normal_rsample_kl(
        loc, log_scale=logvar, num_samples=2, estimator="mc", return_z=False
    )
    z5 = sqloss.student_t_rsample(df, loc, logvar.exp(), 2)
    outputs = (z, kl, z2, kl2, z3, kl3, kl4, z5)
    return sum(output.square().sum() / (1 + i) for i, output in enumerate(outputs))


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compile_fullgraph_draws_what_eager_mode_draws(device, backend):
    compiled = torch.compile(every_public_function, fullgraph=True, dynamic=True, backend=backend)
    for n in (20, 33, 47):
        leaves = [t.to(device).requires_grad_() for t in (torch.rand(7) + 2, *torch.randn(2, n, 7))]
        torch.manual_seed(n)
        value = compiled(*leaves)
        torch.manual_seed(n)
        expected = every_public_function(*leaves)
        torch.testing.assert_close(value, expected)
        got = torch.autograd.grad(value, leaves)
        torch.testing.assert_close(got, torch.autograd.grad(expected, leaves))


def test_compiled_draws_are_the_same_bits(device):
    def draw(loc, logvar):
        return sqloss.student_t_rsample_kl(5.0, loc, logvar=logvar, num_samples=2)

    loc, logvar = torch.randn(2, 33, 7, device=device)
    compiled = torch.compile(draw, fullgraph=True)
    torch.manual_seed(4)
    first, second = compiled(loc, logvar), compiled(loc, logvar)
    torch.manual_seed(4)
    for got in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(got, draw(loc, logvar), strict=True))
    assert not torch.equal(first[0], second[0])


def test_compiled_checkpointing_draws_the_same_again(device):
    def block(loc, logvar):
        z, kl = sqloss.student_t_rsample_kl(5.0, loc, logvar=logvar)
        return z.square().sum(1) + kl

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(loc, logvar):
        return checkpoint(block, loc, logvar, use_reentrant=False).mean()

    leaves = [t.requires_grad_() for t in torch.randn(2, 9, 4, device=device)]
    torch.manual_seed(1)
    got = torch.autograd.grad(step(*leaves), leaves)
    torch.manual_seed(1)
    expected = torch.autograd.grad(block(*leaves).mean(), leaves)
    torch.testing.assert_close(got, expected)


def test_compiled_backward_uses_the_kernels(device):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, _):
        graphs.append(graph.code)
        return make_boxed_func(graph)

    @torch.compile(fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    def step(loc):
        z, kl = sqloss.student_t_rsample_kl(5.0, loc, 1.0)
        return z.sum() + kl.sum()

    step(torch.randn(9, 4, device=device, requires_grad=True)).backward()
    assert "sqloss.draw_seed.default" in graphs[0]
    assert "sqloss.student_t_rsample_kl.default" in graphs[0]
    assert "sqloss.student_t_rsample_kl_backward.default" in graphs[1]


def test_export_with_dynamic_shapes(device):
    class Posterior(torch.nn.Module):
        def forward(self, loc, logvar, seed):
            return sqloss.student_t_rsample_kl(5.0, loc, logvar=logvar, seed=seed)

    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Posterior(),
        (*torch.randn(2, 4, 6, device=device), seed_of(1, device)),
        dynamic_shapes={"loc": {0: batch}, "logvar": {0: batch}, "seed": None},
    )
    given_ = (*torch.randn(2, 9, 6, device=device), seed_of(2, device))
    for a, b in zip(program.module()(*given_), Posterior()(*given_), strict=True):
        assert torch.equal(a, b)


def test_fake_tensors_and_tracing():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode():
        df = torch.ones(5, requires_grad=True)
        loc = torch.randn(3, 5, requires_grad=True, dtype=torch.bfloat16)
        z, kl = sqloss.student_t_rsample_kl(df, loc, loc.exp(), num_samples=4)
        assert z.shape == (4, 3, 5) and kl.shape == (3,) and kl.dtype == torch.float32
        (z.sum() + kl.sum()).backward()
        assert df.grad.shape == (5,) and loc.grad.dtype == torch.bfloat16
        of_each = sqloss.normal_rsample_kl(
            loc, 1.0, num_samples=4, reduction="none", return_z=False
        )
        assert of_each.shape == (4, 3)
    loc = torch.randn(3, 5)

    def f(loc):
        return sqloss.student_t_rsample_kl(5.0, loc, 1.0, seed=seed_of(1))[0]

    assert torch.equal(make_fx(f)(loc)(loc), f(loc))


def test_compiled_autograd(device):
    leaves = [t.requires_grad_() for t in parameters(4, 3, device=device).values()]

    def step():
        named = dict(zip(("loc", "scale", "df", "prior_df"), leaves, strict=True))
        z, kl = public(named, num_samples=2, seed=seed_of(1, device))
        return z.sum() + kl.sum()

    expected = torch.autograd.grad(step(), leaves)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        step().backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected))


@pytest.mark.parametrize("student", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"num_samples": 3}, {"num_samples": 3, "reduction": "none"}]
)
def test_func_grad_vmap_jvp_and_their_compositions(device, student, options):
    func = torch.func
    tensors = parameters(4, 3, 5, device=device)
    tensors = tensors if student else normal(tensors)
    names, leaves = list(tensors), list(tensors.values())
    estimator, seed = "mc" if student else "closed_form", seed_of(3, device)

    def outputs(*leaves, seed=seed):
        return public(dict(zip(names, leaves, strict=True)), estimator, seed=seed, **options)

    def total(*leaves):
        z, kl = outputs(*leaves)
        return z.square().sum() + kl.square().sum()

    def by_hand(function):
        return [function(*(leaf[i] for leaf in leaves)) for i in range(4)]

    def assert_stacked(got, alone):
        for i, expected in enumerate(alone):
            got_i = torch.utils._pytree.tree_map(lambda t, i=i: t[i], got)
            torch.testing.assert_close(got_i, expected)

    every = tuple(range(len(leaves)))
    assert_stacked(func.vmap(outputs)(*leaves), by_hand(outputs))
    assert_stacked(func.vmap(func.grad(total, every))(*leaves), by_hand(func.grad(total, every)))
    assert_stacked(func.vmap(func.hessian(total))(*leaves), by_hand(func.hessian(total)))

    def tangent(*leaves):
        return func.jvp(outputs, leaves, tuple(torch.ones_like(leaf) for leaf in leaves))

    assert_stacked(func.vmap(tangent)(*leaves), by_hand(tangent))
    # some of the arguments, other dimensions, seeds for each
    if options:
        return
    first = [leaves[0].movedim(0, 2), *(leaf[0] for leaf in leaves[1:])]
    got = func.vmap(outputs, (2, *[None] * len(leaves[1:])))(*first)
    assert_stacked(got, [outputs(leaves[0][i], *first[1:]) for i in range(4)])
    seeds = torch.arange(4, device=device)
    got = func.vmap(lambda seed: outputs(*(leaf[0] for leaf in leaves), seed=seed))(seeds)
    assert_stacked(got, [outputs(*(leaf[0] for leaf in leaves), seed=seed) for seed in seeds])


def test_vmap_and_its_randomness(device):
    loc = torch.zeros(3, 4, 5, device=device)

    def z(loc):
        return sqloss.student_t_rsample(5.0, loc, 1.0)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(z)(loc)
    torch.manual_seed(0)
    same = torch.func.vmap(z, randomness="same")(loc)
    torch.manual_seed(0)
    assert torch.equal(same, same[:1].expand(3, 4, 5)) and len(same.unique()) == 20
    torch.manual_seed(0)
    assert torch.equal(torch.func.vmap(z, randomness="same")(loc), same)
    different = torch.func.vmap(z, randomness="different")(loc)
    assert different.shape == (3, 4, 5) and len(different.unique()) == different.numel()


# --- devices without a kernel ---------------------------------------------------------------------


def test_devices_without_a_kernel_get_the_twins(call_without_kernel):
    ops = torch.ops.sqloss
    for *tensors, seed, rows, samples, form, kl, mean in operator_arguments():
        arguments = (*tensors, seed, rows, samples, form, kl, mean)
        outputs = ops.student_t_rsample_kl(*arguments, True)
        got = call_without_kernel(ops.student_t_rsample_kl, *arguments, True)
        torch.testing.assert_close(got, outputs)
        grad_z, grad_kl = (torch.randn_like(output) for output in outputs)
        grads = (grad_z, None if kl == "none" else grad_kl)
        mask = [t is not None for t in tensors]
        got = call_without_kernel(ops.student_t_rsample_kl_backward, *grads, *arguments, mask)
        expected = ops.student_t_rsample_kl_backward(*grads, *arguments, mask)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        for a, b in zip(got, expected, strict=True):
            assert a.stride() == b.stride()
        noise = (tensors[1].float(), seed, rows, samples)
        got = call_without_kernel(ops.student_t_noise, *noise)
        torch.testing.assert_close(got, ops.student_t_noise(*noise))


def test_devices_without_a_kernel_warn_once(monkeypatch):
    monkeypatch.setattr(_ops, "_warned", set())
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    operator = torch.ops.sqloss.student_t_rsample_kl.default
    with pytest.warns(UserWarning, match="has no kernel for device type cpu") as caught:
        for arguments in operator_arguments():
            operator._op_dk(key, *arguments, True)
    assert len(caught) == 1


# --- errors ---------------------------------------------------------------------------------------

L, S = torch.zeros(2, 3), torch.ones(2, 3)
SEED, ROWS = seed_of(0), torch.arange(2)


def student_t_rsample(*args, **options):
    return sqloss.student_t_rsample(5.0, *args, **options)


def student_t_rsample_kl(*args, **options):
    return sqloss.student_t_rsample_kl(5.0, *args, **options)


FUNCTIONS = [student_t_rsample, student_t_rsample_kl, sqloss.normal_rsample_kl]
SCALES = "scale, log_scale, logvar: expected exactly one of them, got"
ERRORS = [
    (lambda f: f([1.0], S), TypeError, "loc: expected a tensor, got list"),
    (lambda f: f(L.long(), S), TypeError, "loc: expected a dense tensor of .*int64"),
    (lambda f: f(L.to_sparse(), S), TypeError, "loc: .*torch.sparse_coo"),
    (lambda f: f(L), TypeError, f"{SCALES} none"),
    (lambda f: f(L, S, logvar=S), TypeError, f"{SCALES} scale and logvar"),
    (lambda f: f(L, log_scale=S, logvar=S), TypeError, f"{SCALES} log_scale and logvar"),
    (lambda f: f(L, 0.0), ValueError, "scale: expected a number above 0, got 0.0"),
    (lambda f: f(L, -1), ValueError, "scale: expected a number above 0, got -1.0"),
    (lambda f: f(L, NAN), ValueError, "scale: expected a number above 0, got nan"),
    (lambda f: f(L, "1"), TypeError, "scale: expected a number, got str"),
    (lambda f: f(L, S.int()), TypeError, "scale: expected a dense tensor of .*int32"),
    (lambda f: f(L, logvar=1.0), TypeError, "logvar: expected a tensor, got float"),
    (lambda f: f(L, log_scale=S > 0), TypeError, "log_scale: expected a dense tensor of .*bool"),
    (
        lambda f: f(L, S[:, :2]),
        ValueError,
        r"scale: expected a shape that broadcasts with \(2, 3\), got \(2, 2\)",
    ),
    (lambda f: f(L, logvar=S[:, :2]), ValueError, "logvar: expected a shape that broadcasts"),
    (
        lambda f: f(L, S.to("meta")),
        ValueError,
        "scale: expected the device of loc, cpu, got meta",
    ),
    (lambda f: f(L, S, num_samples=0), ValueError, r"num_samples: expected 1 to 2\^31 - 1, got 0"),
    (lambda f: f(L, S, num_samples=-2), ValueError, r"num_samples: expected 1 to .*, got -2"),
    (lambda f: f(L, S, num_samples=2**31), ValueError, r"num_samples: expected 1 to .*, got 214"),
    (lambda f: f(L, S, num_samples=2.0), TypeError, "num_samples: expected an int, got float"),
    (lambda f: f(L, S, num_samples=True), TypeError, "num_samples: expected an int, got bool"),
    (lambda f: f(L, S, seed=3), TypeError, "seed: expected a tensor, got int"),
    (lambda f: f(L, S, seed=SEED.int()), TypeError, "seed: expected int64, got torch.int32"),
    (
        lambda f: f(L, S, seed=SEED.expand(3)),
        ValueError,
        r"seed: expected a shape that broadcasts to the leading shape \(2,\), got \(3,\)",
    ),
    (lambda f: f(L, S, seed=SEED.to("meta")), ValueError, "seed: expected the device of loc, cpu"),
    (
        lambda f: f(L, S, seed=SEED, generator=torch.Generator()),
        TypeError,
        "generator, seed: expected one of them at most, got both",
    ),
    (lambda f: f(L, S, rows=[0, 1]), TypeError, "rows: expected a tensor, got list"),
    (lambda f: f(L, S, rows=ROWS.int()), TypeError, "rows: expected int64, got torch.int32"),
    (
        lambda f: f(L, S, rows=torch.arange(3)),
        ValueError,
        r"rows: expected the leading shape \(2,\), got \(3,\)",
    ),
    (lambda f: f(L, S, rows=SEED), ValueError, r"rows: expected the leading shape \(2,\), got \("),
    (lambda f: f(L, S, rows=ROWS.to("meta")), ValueError, "rows: expected the device of loc, cpu"),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("call, error, message", ERRORS)
def test_errors_name_function_argument_expected_and_got(function, call, error, message):
    with pytest.raises(error, match=f"^{function.__name__}: {message}"):
        call(function)


T, N = sqloss.student_t_rsample_kl, sqloss.normal_rsample_kl
KL_ERRORS = [
    (lambda: T(0.0, L, S), ValueError, "df: expected a number above 0, got 0.0"),
    (lambda: T(-INF, L, S), ValueError, "df: expected a number above 0, got -inf"),
    (lambda: T(NAN, L, S), ValueError, "df: expected a number above 0, got nan"),
    (lambda: T(None, L, S), TypeError, "df: expected a number or a tensor, got None"),
    (lambda: T("5", L, S), TypeError, "df: expected a number, got str"),
    (lambda: T(S.int(), L, S), TypeError, "df: expected a dense tensor of .*int32"),
    (lambda: T(S[:, :2], L, S), ValueError, r"df: expected a shape that broadcasts with \(2, 3\)"),
    (lambda: T(S.to("meta"), L, S), ValueError, "df: expected the device of loc, cpu, got meta"),
    (lambda: T(5.0, L, S, prior_df=0), ValueError, "prior_df: expected a number above 0, got 0.0"),
    (
        lambda: T(5.0, L, S, prior_df=S[:, :2]),
        ValueError,
        r"prior_df: expected a shape that broadcasts with \(2, 3\), got \(2, 2\)",
    ),
    (
        lambda: T(5.0, L, S, estimator="closed_form"),
        ValueError,
        "estimator: expected one of mc, analytic_entropy, got 'closed_form'",
    ),
    (
        lambda: T(5.0, L, S, reduction="sum"),
        ValueError,
        "reduction: expected one of mean, none, got 'sum'",
    ),
    (
        lambda: T(5.0, L[0, 0], S[0, 0]),
        ValueError,
        "loc: expected the coordinates of a sample in a last dimension, got a tensor without",
    ),
    (
        lambda: N(L, S, estimator="analytic_entropy"),
        ValueError,
        "estimator: expected one of closed_form, mc, got 'analytic_entropy'",
    ),
    (
        lambda: N(L, S, reduction=None),
        ValueError,
        "reduction: expected one of mean, none, got None",
    ),
    (lambda: N(L[0, 0], 1.0), ValueError, "loc: expected the coordinates of a sample"),
]


@pytest.mark.parametrize("call, error, message", KL_ERRORS)
def test_errors_of_df_and_of_options(call, error, message):
    name = "normal_rsample_kl" if "N" in call.__code__.co_names else "student_t_rsample_kl"
    with pytest.raises(error, match=f"^{name}: {message}"):
        call()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"kl": "elbo"}, ValueError, "kl: expected the name of one, got 'elbo'"),
        ({"form": "variance"}, ValueError, "parameterization: expected the name of one, got 'var"),
        ({"df": None, "kl": "analytic_entropy"}, ValueError, "kl: expected analytic_entropy only"),
        ({"kl": "closed_form"}, ValueError, "kl: expected .* closed_form only without df"),
        ({"df": None, "prior_df": S}, ValueError, "prior_df: expected none without df"),
        ({"scale": S[:1]}, ValueError, "scale: expected the shape of loc"),
        ({"df": S[:1]}, ValueError, "df: expected the shape of loc"),
        ({"loc": L.long()}, TypeError, "loc: expected float16, bfloat16, float32 or float64"),
        ({"rows": torch.arange(3)}, ValueError, "rows: expected the leading shape of loc"),
        ({"seed": SEED.int()}, TypeError, "seed, rows: expected int64"),
        ({"num_samples": 0}, ValueError, "num_samples: expected 1 to"),
    ],
)
def test_errors_of_the_operator(change, error, message):
    """Which checks shapes and names once more: it may be called without the public functions."""
    named = {
        **{"df": S, "loc": L, "scale": S, "prior_df": None, "seed": SEED, "rows": None},
        **{"num_samples": None, "form": "scale", "kl": "mc", "kl_mean": True, "return_z": True},
    }
    with pytest.raises(error, match=f"^student_t_rsample_kl: {message}"):
        torch.ops.sqloss.student_t_rsample_kl(*(named | change).values())


def test_a_generator_of_another_device_is_an_error():
    with pytest.raises(ValueError, match="generator: expected one of the device of loc, meta"):
        student_t_rsample(L.to("meta"), 1.0, generator=torch.Generator())


# --- laws -----------------------------------------------------------------------------------------

moderate = st.floats(-20, 20, allow_subnormal=False)


@given(moderate, st.floats(0.01, 100), st.floats(0.5, 1e6), st.integers(-(2**63), 2**63 - 1))
def test_law_a_sample_is_loc_plus_scale_times_a_standard_one(loc, scale, df, seed):
    zeros = torch.zeros(3, 5, dtype=torch.float64)
    t = sqloss.student_t_rsample(df, zeros, 1.0, seed=seed_of(seed))
    z = sqloss.student_t_rsample(df, zeros + loc, scale, seed=seed_of(seed))
    torch.testing.assert_close(z, loc + scale * t)
    assert torch.equal(sqloss.student_t_rsample(df, -zeros, 1.0, seed=seed_of(seed)), t)


@given(moderate, st.floats(0.01, 100), st.floats(0.5, 1e6), st.floats(0.5, 1e6), st.integers(0, 99))
def test_law_the_divergence_is_that_of_the_samples_densities(loc, scale, df, prior_df, seed):
    loc = torch.full((2, 3), loc, dtype=torch.float64)
    options = {"num_samples": 4, "reduction": "none", "seed": seed_of(seed)}
    z, kl = sqloss.student_t_rsample_kl(df, loc, scale, prior_df=prior_df, **options)
    log_q = torch.from_numpy(stats.t.logpdf(z.numpy(), df, loc.numpy(), scale))
    log_p = torch.from_numpy(stats.t.logpdf(z.numpy(), prior_df))
    # scipy's own differences of lgamma lose digits where df is large
    torch.testing.assert_close(kl, (log_q - log_p).sum(-1), rtol=1e-8, atol=1e-7)


@given(moderate, st.floats(0.01, 100), st.sampled_from(list(itertools.combinations(FORMS, 2))))
def test_law_the_forms_of_the_scale_are_one_function(loc, scale, forms):
    loc = torch.full((2, 3), loc, dtype=torch.float64)
    scale = torch.full_like(loc, scale)
    for student in (True, False):
        a, b = (
            public(
                {**({"df": torch.full_like(loc, 5.0)} if student else {}), "loc": loc, form: s},
                "mc",
                seed=seed_of(1),
            )
            for form, s in ((form, FORMS[form](scale)) for form in forms)
        )
        torch.testing.assert_close(a, b)


# --- draws on a GPU -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 1025), (70_001, 3), (3, 70_001)])
def test_a_gpu_draws_what_a_cpu_draws(gpu, dtype, shape):
    tensors = parameters(*shape, dtype=dtype)
    on_gpu = {name: t.to(gpu) for name, t in tensors.items()}
    for num_samples in (1, 3):
        z, kl = public(tensors, num_samples=num_samples, seed=seed_of(2**40 + 1))
        got = public(on_gpu, num_samples=num_samples, seed=seed_of(2**40 + 1, gpu))
        assert_near(got[0].cpu(), z, ROUNDING[dtype])
        assert_near(got[1].cpu(), kl, ROUNDING[dtype])
    noise = torch.ops.sqloss.student_t_noise
    # energy = -2 log u and the cosine: what the random bits themselves give
    for a, b in zip(
        noise(on_gpu["loc"], seed_of(5, gpu), None, 2),
        noise(tensors["loc"], seed_of(5), None, 2),
        strict=True,
    ):
        assert_near(a.cpu(), b, ROUNDING[dtype])


def test_replays_of_a_cuda_graph_draw_anew(gpu, capture):
    loc, logvar = torch.randn(2, 33, 20, device=gpu, requires_grad=True)

    def step():
        z, kl = sqloss.student_t_rsample_kl(5.0, loc, logvar=logvar)
        normal, _ = sqloss.normal_rsample_kl(loc, logvar=logvar)
        gradient = torch.autograd.grad(kl.sum() + z.sum() + normal.sum(), logvar)[0]
        return z.detach(), kl.detach(), normal.detach(), gradient

    replay, outputs = capture(step)

    def replayed():
        replay()
        return [t.clone() for t in outputs]

    torch.manual_seed(1)
    first, second = replayed(), replayed()
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(replayed(), first, strict=True))
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True)), "as eager mode does"


def test_replays_of_a_cuda_graph_take_the_seed_of_the_moment(gpu, capture):
    loc, seed = torch.randn(33, 20, device=gpu), seed_of(0, gpu)
    replay, z = capture(lambda: sqloss.student_t_rsample(5.0, loc, 1.0, seed=seed))
    for number in (3, 2**40, -1):
        seed.fill_(number)
        replay()
        assert torch.equal(z, sqloss.student_t_rsample(5.0, loc, 1.0, seed=seed_of(number, gpu)))


def test_more_elements_than_32_bits_can_count(roomy_gpu):
    rows, columns = 2**16 + 1, 2**15
    loc = torch.zeros(rows, columns, dtype=torch.bfloat16, device=roomy_gpu).requires_grad_()
    seed, worst = seed_of(3, roomy_gpu), torch.tensor([rows - 1, 2**15, 0], device=roomy_gpu)
    z, kl = sqloss.normal_rsample_kl(loc, 1.0, estimator="mc", seed=seed)
    (gradient,) = torch.autograd.grad(kl.sum(), loc)
    few = torch.zeros(3, columns, dtype=torch.bfloat16, device=roomy_gpu).requires_grad_()
    again = sqloss.normal_rsample_kl(few, 1.0, estimator="mc", seed=seed, rows=worst)
    assert torch.equal(z[worst], again[0]) and torch.equal(kl[worst], again[1])
    assert torch.equal(gradient[worst], torch.autograd.grad(again[1].sum(), few)[0])
