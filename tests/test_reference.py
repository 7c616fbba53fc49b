"""The twin itself, against other people's code and by hand: what it says, kernels must follow."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch

from sqloss import reference


def by_sorting(losses, alpha):
    """cvar of a 1-D array in numpy: (sum of the k worst) / k, with a fraction of the last."""
    worst = np.sort(losses)[::-1]
    k = (1 - alpha) * len(worst)
    if k <= 1:
        return worst[0]
    whole = int(np.floor(k + 1e-9))
    rest = max(k - whole, 0.0)
    return (worst[:whole].sum() + (rest * worst[whole] if rest else 0.0)) / k


@pytest.mark.parametrize("n", [1, 2, 9, 10, 32, 333])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.7, 0.75, 0.8, 0.93])
def test_value_is_the_closed_form(n, alpha):
    losses = torch.randn(n, dtype=torch.float64)
    value, threshold, counts = reference.superquantile(losses, 1 - alpha)
    assert value.item() == pytest.approx(by_sorting(losses.numpy(), alpha), rel=1e-12)
    above, at, k = counts.tolist()
    assert above == (losses > threshold).sum() and at == (losses == threshold).sum()
    assert above < k <= above + at + 1e-9 and k == pytest.approx((1 - alpha) * n)


def test_worked_case_with_its_counts():
    losses = torch.arange(10.0) ** 2
    value, threshold, counts = reference.superquantile(losses, 0.25)
    assert value.item() == pytest.approx(67.8) and threshold == 49
    assert counts.tolist() == [2, 1, 2.5]
    one = torch.ones(())
    q = reference.superquantile_backward(one, None, losses, None, None, threshold, counts)
    torch.testing.assert_close(q, torch.tensor([0.0] * 7 + [0.2, 0.4, 0.4]))
    r = reference.superquantile_backward(None, one, losses, None, None, threshold, counts)
    assert r.tolist() == [0.0] * 7 + [1.0, 0.0, 0.0]


def test_weights_against_numpys_weighted_quantile():
    """value-at-risk = the weighted quantile by inverted_cdf of the negated losses, negated."""
    losses = torch.randn(101, dtype=torch.float64)
    weight = torch.rand(101, dtype=torch.float64)
    for tail in (0.05, 0.2, 0.5, 0.95):
        _, threshold, _ = reference.superquantile(losses, tail, weight)
        expected = -np.quantile(
            -losses.numpy(), tail, method="inverted_cdf", weights=weight.numpy()
        )
        assert threshold.item() == expected


def test_gradient_is_that_of_the_value():
    """Finite differences of the twin's value give the twin's gradient."""
    losses = torch.randn(4, 9, dtype=torch.float64)
    weight = torch.rand(4, 9, dtype=torch.float64)
    mask = torch.arange(36).view(4, 9) % 5 != 0
    arguments = (0.37, weight, mask, (1,))
    value, threshold, counts = reference.superquantile(losses, *arguments)
    q = reference.superquantile_backward(
        torch.ones_like(value), None, losses, weight, mask, threshold, counts, (1,)
    )
    step = 1e-6
    for i in range(36):
        moved = losses.flatten().clone()
        moved[i] += step
        after, _, _ = reference.superquantile(moved.view(4, 9), *arguments)
        slope = (after - value).sum().item() / step
        assert slope == pytest.approx(q.flatten()[i].item(), abs=1e-8)


# --- per-sample losses ----------------------------------------------------------------------------


def test_pointwise_losses_by_hand():
    """One sample of two elements each, in numbers that a human can check."""
    x, y = torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 1.0]])
    w, var = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])

    def loss(name, weight=None, other=None, parameter=0.0, full=False, mean=False):
        given = (name, x, y, weight, other, parameter, full, 1, mean)
        return reference.pointwise_losses(*given).item()

    assert loss("mse") == 1 + 4
    assert loss("mse", mean=True) == 2.5
    assert loss("mse", weight=w) == 1 + 8
    assert loss("smooth_l1") == 1 + 2
    assert loss("smooth_l1", parameter=1.5) == pytest.approx(1 / 3 + 2 - 0.75)
    assert loss("huber", parameter=1.5) == 0.5 + 1.5 * (2 - 0.75)
    bce = math.log(2) + math.log1p(math.exp(-3))
    assert loss("binary_cross_entropy_with_logits") == pytest.approx(bce)
    bce = math.log(2) + 4 * math.log1p(math.exp(-3))
    assert loss("binary_cross_entropy_with_logits", other=var) == pytest.approx(bce)
    nll = 0.5 * (1 + math.log(4) + 1)
    assert loss("gaussian_nll", other=var) == pytest.approx(nll)
    nll += math.log(2 * math.pi)
    assert loss("gaussian_nll", other=var, full=True) == pytest.approx(nll)
    nll = 0.5 * (math.log(2) + 0.5 + math.log(4) + 1)
    assert loss("gaussian_nll", other=var, parameter=2.0) == pytest.approx(nll)
    with pytest.raises(ValueError, match="loss: expected the name of one, got 'hinge'"):
        loss("hinge")


@pytest.mark.parametrize(
    "loss, parameter, of_var",
    [
        ("binary_cross_entropy_with_logits", 0.0, False),
        ("mse", 0.0, False),
        ("smooth_l1", 0.0, False),
        ("smooth_l1", 0.7, False),
        ("huber", 0.7, False),
        ("gaussian_nll", 1e-6, True),
    ],
)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("sample_dims", [1, 2, 3])
def test_pointwise_gradients_are_those_of_the_losses(loss, parameter, of_var, mean, sample_dims):
    """By autograd through the twin's forward formulas."""
    x, y, w, o = torch.rand(4, 3, 4, 2, dtype=torch.float64) + 0.1
    has_other = of_var or loss == "binary_cross_entropy_with_logits"
    given = [t.requires_grad_() for t in ((x, y, o) if of_var else (x, y))]
    rest = (w, o if has_other else None, parameter, True, sample_dims, mean)
    losses = reference.pointwise_losses(loss, x, y, *rest)
    assert losses.shape == x.shape[:sample_dims] and losses.dtype == torch.float64
    grad = torch.randn_like(losses)
    expected = torch.autograd.grad(losses, given, grad)
    got = reference.pointwise_losses_backward(grad, loss, x, y, *rest, [True, True, of_var])
    for a, b in zip(got, expected, strict=False):
        torch.testing.assert_close(a, b)
    unwanted = reference.pointwise_losses_backward(grad, loss, x, y, *rest, [False] * 3)
    assert [t.numel() for t in unwanted] == [0, 0, 0]


def test_the_gradient_of_a_clamped_variance_is_torchs():
    x, y = torch.randn(2, 5, 3, dtype=torch.float64)
    var = torch.rand(5, 3, dtype=torch.float64).requires_grad_()
    elements = torch.nn.functional.gaussian_nll_loss(x, y, var, eps=0.5, reduction="none")
    expected = torch.autograd.grad(elements.sum(), var)[0]
    arguments = ("gaussian_nll", x, y, None, var.detach(), 0.5, False, 1, False)
    losses = reference.pointwise_losses(*arguments)
    torch.testing.assert_close(losses, elements.detach().sum(1))
    one = torch.ones_like(losses)
    got = reference.pointwise_losses_backward(one, *arguments, [False, False, True])[2]
    torch.testing.assert_close(got, expected)


def test_cross_entropy_by_hand():
    """The formula of its docstring, class by class."""
    x, weight = torch.randn(3, 4, 2, dtype=torch.float64), torch.rand(4)
    classes = torch.tensor([[0, 3], [-100, 1], [2, 2]])
    probabilities = torch.rand(3, 4, 2)
    one_hot = torch.zeros_like(x).scatter_(1, classes.clamp(min=0)[:, None], 1.0)
    for target, y in ((classes, one_hot), (probabilities, probabilities.double())):
        for smoothing in (0.0, 0.3, 1.0):
            for w in (None, weight):
                t = (1 - smoothing) * y + smoothing / 4
                t = t if w is None else t * w.double()[:, None]
                if target is classes:
                    t = torch.where(classes[:, None] == -100, 0.0, t)
                given = (target, w, -100, smoothing)
                losses, log_sum_exp = reference.cross_entropy_losses(x, *given)
                torch.testing.assert_close(log_sum_exp, x.exp().sum(1).log())
                expected = (t * (log_sum_exp[:, None] - x)).sum(1)
                torch.testing.assert_close(losses, expected)

                grad = torch.randn_like(losses)
                of_input, of_target = reference.cross_entropy_losses_backward(
                    grad, x, target, w, log_sum_exp, *given[2:], [True, target is probabilities]
                )
                expected = grad[:, None] * (x.softmax(1) * t.sum(1, keepdim=True) - t)
                torch.testing.assert_close(of_input, expected)
                if target is probabilities:
                    expected = grad[:, None] * (1 - smoothing) * (log_sum_exp[:, None] - x)
                    expected = expected if w is None else expected * w[:, None]
                    torch.testing.assert_close(of_target, expected.float())
                else:
                    assert of_target.numel() == 0


def test_samples_of_no_gradient_get_zeros():
    x = torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [1.0, 2.0]])
    grad = torch.tensor([0.0, -0.0, 1.0])
    arguments = ("mse", x, torch.zeros(3, 2), None, None, 0.0, False, 1, True)
    of_input, of_target, _ = reference.pointwise_losses_backward(grad, *arguments, [True] * 3)
    assert of_input.tolist() == [[0, 0], [0, 0], [1, 2]]
    assert of_target.tolist() == [[0, 0], [0, 0], [-1, -2]]
    target = torch.tensor([0, 0, 1])
    _, log_sum_exp = reference.cross_entropy_losses(x, target, None, -100, 0.0)
    got, _ = reference.cross_entropy_losses_backward(
        grad, x, target, None, log_sum_exp, -100, 0.0, [True, False]
    )
    assert not got[:2].any() and got[2].sum().item() == pytest.approx(0, abs=1e-7)


def test_dtypes_of_the_losses():
    half, single, double = (torch.rand(2, 3).to(d) for d in (torch.half, torch.float, torch.double))
    for tensors, expected in [
        ((half, half), torch.float32),
        ((half, single), torch.float32),
        ((single, double), torch.float64),
        ((half, half, double), torch.float64),
    ]:
        input, target, *weight = tensors
        w = weight[0] if weight else None
        arguments = ("mse", input, target, w, None, 0.0, False, 1, True)
        losses = reference.pointwise_losses(*arguments)
        assert losses.dtype == expected
        grads = reference.pointwise_losses_backward(losses, *arguments, [True, True, False])
        assert (grads[0].dtype, grads[1].dtype) == (input.dtype, target.dtype)


# --- Student-t sampling ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counter, key, block",
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, block):
    """Those of Random123, its authors' library: kat_vectors, philox4x32 10."""

    def words(text):
        return torch.tensor([int(word, 16) for word in text.split()])

    got = reference.philox(words(counter).unbind(), words(key).unbind())
    assert torch.equal(torch.stack(got), words(block))


def test_uniforms_are_words_of_the_blocks():
    seed, rows = torch.tensor(-(2**62) + 12345), torch.tensor([0, 2, 2**40 + 1])
    key = [seed.item() & 0xFFFFFFFF, (seed.item() >> 32) & 0xFFFFFFFF]

    def block(element, sample, last):
        counter = [element // 2 % 2**32, element // 2 >> 32, sample, last]
        words = reference.philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
        return [word.item() for word in words][2 * (element % 2) :][:2]

    u, v = reference.uniforms(seed, rows, 5, 3, torch.float32)
    finer_u, finer_v = reference.uniforms(seed, rows, 5, 3, torch.float64)
    assert u.shape == v.shape == (3, 3, 5)
    for sample in range(3):
        for r, row in enumerate(rows.tolist()):
            for column in range(5):
                at, element = (sample, r, column), row * 5 + column
                of_u, of_v = block(element, sample, 0)
                low_u, low_v = (word >> 11 for word in block(element, sample, 1))
                signed = of_v - 2**32 if of_v >= 2**31 else of_v
                assert u[at].item() == float(np.float32(of_u) + np.float32(0.5)) / 2**32
                assert v[at].item() == signed / 2**32
                assert finer_u[at].item() == (of_u + (low_u + 0.5) / 2**21) / 2**32
                assert finer_v[at].item() == (signed + low_v / 2**21) / 2**32
    one, _ = reference.uniforms(seed, rows, 5, None, torch.float32)
    assert torch.equal(one, u[0])
    by_row, _ = reference.uniforms(torch.stack([seed, seed + 1, seed]), rows, 5, 3, torch.float32)
    assert torch.equal(by_row[:, [0, 2]], u[:, [0, 2]]) and (by_row[:, 1] != u[:, 1]).all()


DFS = [0.5, 1.0, 2.0, 3.0, 5.0, 21.0, 39.9, 40.0, 41.0, 1e3, 1e4, 1e6, math.inf]


def log_density(t, df):
    if mpmath.isinf(df):
        return -(t**2) / 2 - mpmath.log(2 * mpmath.pi) / 2
    df = mpmath.mpf(df)
    log_z = mpmath.loggamma(df / 2) - mpmath.loggamma((df + 1) / 2) + mpmath.log(df * mpmath.pi) / 2
    return -(df + 1) / 2 * mpmath.log1p(t**2 / df) - log_z


def entropy(df):
    if mpmath.isinf(df):
        return mpmath.log(2 * mpmath.pi * mpmath.e) / 2
    a, b = mpmath.mpf(df) / 2, (mpmath.mpf(df) + 1) / 2
    digammas = b * (mpmath.digamma(b) - mpmath.digamma(a))
    return digammas + mpmath.log(mpmath.sqrt(df)) + mpmath.log(mpmath.beta(a, 0.5))


def rsample_kl(df, loc, scale, prior_df=None, num_samples=None, form="scale", kl="mc", mean=True):
    seed = torch.tensor(20_251_121)
    return reference.student_t_rsample_kl(
        df, loc, scale, prior_df, seed, None, num_samples, form, kl, mean, True
    )


@pytest.mark.parametrize("df", DFS)
def test_student_t_by_its_formulas_in_40_digits(df):
    loc, scale = torch.randn(7, 1, dtype=torch.float64), torch.rand(7, 1, dtype=torch.float64) + 0.1
    u, v = reference.uniforms(torch.tensor(20_251_121), torch.arange(7), 1, None, torch.float64)
    q_df = torch.full_like(loc, df)
    for prior in (0.5, 5.0, 1e6, math.inf):
        p_df = torch.full_like(loc, prior)
        z, kl = rsample_kl(q_df, loc, scale, p_df)
        _, analytic = rsample_kl(q_df, loc, scale, p_df, kl="analytic_entropy")
        for row in range(7):
            with mpmath.workdps(40):
                e = -2 * mpmath.log(mpmath.mpf(u[row].item()))
                squared = e if math.isinf(df) else df * mpmath.expm1(e / df)
                t = mpmath.sqrt(squared) * mpmath.cos(2 * mpmath.pi * mpmath.mpf(v[row].item()))
                expected = loc[row].item() + scale[row].item() * t
                of_p, log_scale = log_density(expected, prior), mpmath.log(scale[row].item())
                mc = log_density(t, df) - log_scale - of_p
                cross = -entropy(df) - log_scale - of_p
            assert z[row].item() == pytest.approx(float(expected), rel=1e-12, abs=1e-12)
            assert kl[row].item() == pytest.approx(float(mc), rel=1e-12, abs=1e-12)
            assert analytic[row].item() == pytest.approx(float(cross), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("df", DFS[:-1])
def test_derivatives_of_log_z_and_entropy_in_40_digits(df):
    inverse = torch.tensor(df, dtype=torch.float64).reciprocal()
    with mpmath.workdps(40):
        of_log_z = -mpmath.diff(lambda at: log_density(0, at), df)
        of_entropy = mpmath.diff(entropy, df)
    assert reference._log_z_slope(inverse).item() == pytest.approx(float(of_log_z), rel=1e-12)
    assert reference._entropy_slope(inverse).item() == pytest.approx(float(of_entropy), rel=1e-12)


@pytest.mark.parametrize("form", ["scale", "log_scale", "logvar"])
@pytest.mark.parametrize("kl", ["none", "mc", "analytic_entropy", "closed_form"])
@pytest.mark.parametrize("num_samples, mean", [(None, True), (1, False), (3, True), (3, False)])
def test_student_t_gradients_are_those_of_the_forward_twin(form, kl, num_samples, mean):
    """By autograd through its formulas, with every df beside the others in a row."""
    shape, normal = (2, 3, len(DFS)), kl == "closed_form"
    # autograd's derivative of digamma has 10 digits; the gradient of df = 1e6 is of order 1e-12
    rounding = {"rtol": 1e-8, "atol": 1e-9 if kl == "analytic_entropy" else 1e-19}
    df = torch.tensor(DFS, dtype=torch.float64).expand(shape)
    prior_df = df.flip(-1) * 0.9
    loc, scale = torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
    for dfs in ((None, None),) if normal else ((df, prior_df), (df, None), (None, None)):
        given = (dfs[0], loc, scale, dfs[1])
        wanted = [tensor is not None for tensor in given]
        leaves = [t if t is None else t.clone().requires_grad_() for t in given]
        rest = (num_samples, form, kl, mean)
        z, divergence = rsample_kl(*leaves, *rest)
        assert z.shape == (shape if num_samples is None else (num_samples, *shape))
        of_z, of_kl = torch.randn_like(z), torch.randn_like(divergence)
        for grad_z, grad_kl in ((of_z, of_kl), (of_z, None), (None, of_kl)):
            if kl == "none" and grad_z is None:
                continue
            total = 0.0 if grad_z is None else (z * grad_z).sum()
            if kl != "none" and grad_kl is not None:
                total = total + (divergence * grad_kl).sum()
            expected = torch.autograd.grad(
                total,
                [leaf for leaf in leaves if leaf is not None],
                retain_graph=True,
                materialize_grads=True,
                allow_unused=True,
            )
            got = reference.student_t_rsample_kl_backward(
                grad_z, grad_kl, *given, torch.tensor(20_251_121), None, *rest, wanted
            )
            got = [g for g, want in zip(got, wanted, strict=True) if want]
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, **rounding)
            unwanted = reference.student_t_rsample_kl_backward(
                grad_z, grad_kl, *given, torch.tensor(0), None, *rest, [False] * 4
            )
            assert [t.shape for t in unwanted] == [(0,)] * 4


def test_student_t_where_df_is_not_positive_and_infinities():
    df = torch.tensor([[0.0], [-1.0], [math.nan], [3.0], [3.0], [math.inf], [3.0]])
    loc = torch.tensor([[0.0], [0.0], [0.0], [math.nan], [math.inf], [math.inf], [0.0]])
    scale = torch.tensor([[1.0], [1.0], [1.0], [1.0], [1.0], [1.0], [0.0]])
    z, kl = rsample_kl(df, loc, scale)
    assert z[:4].isnan().all() and kl[:4].isnan().all()
    assert (z[4:6] == math.inf).all() and (kl[4:] == math.inf).all() and z[6] == 0


def test_student_t_dtypes():
    """float64 has its own bits; df does not decide."""
    for of_loc, of_scale, of_df in itertools.product(
        (torch.half, torch.bfloat16, torch.float, torch.double), repeat=3
    ):
        loc, scale = torch.randn(2, 3).to(of_loc), torch.rand(2, 3).to(of_scale)
        df = torch.full((2, 3), 5.0, dtype=of_df)
        z, kl = rsample_kl(df, loc, scale)
        double = torch.double in (of_loc, of_scale)
        assert z.dtype == of_loc and kl.dtype == (torch.double if double else torch.float)
        grads = reference.student_t_rsample_kl_backward(
            z, kl, df, loc, scale, df, torch.tensor(0), None, None, "scale", "mc", True, [True] * 4
        )
        assert [g.dtype for g in grads] == [of_df, of_loc, of_scale, of_df]
