"""The twin itself, against other people's code and by hand: what it says, kernels must follow."""

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
