"""The twin itself, against other people's code and by hand: what it says, kernels must follow."""

import math

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
                got = reference.cross_entropy_losses_backward(
                    grad, x, target, w, log_sum_exp, *given[2:]
                )
                expected = grad[:, None] * (x.softmax(1) * t.sum(1, keepdim=True) - t)
                torch.testing.assert_close(got, expected)


def test_samples_of_no_gradient_get_zeros():
    x = torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [1.0, 2.0]])
    grad = torch.tensor([0.0, -0.0, 1.0])
    arguments = ("mse", x, torch.zeros(3, 2), None, None, 0.0, False, 1, True)
    of_input, of_target, _ = reference.pointwise_losses_backward(grad, *arguments, [True] * 3)
    assert of_input.tolist() == [[0, 0], [0, 0], [1, 2]]
    assert of_target.tolist() == [[0, 0], [0, 0], [-1, -2]]
    target = torch.tensor([0, 0, 1])
    _, log_sum_exp = reference.cross_entropy_losses(x, target, None, -100, 0.0)
    got = reference.cross_entropy_losses_backward(grad, x, target, None, log_sum_exp, -100, 0.0)
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
