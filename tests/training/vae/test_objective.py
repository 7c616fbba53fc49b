import pytest
import torch

from sqloss.training.risks import CVaR, Mean
from sqloss.training.vae.objective import objective_name, vae_objective

LOSSES = {
    "reconstruction": torch.tensor([1.0, 2.0, 3.0, 40.0]),
    "kl": torch.tensor([9.0, 1.0, 50.0, 1.0]),
}


def test_the_tail_of_the_elbo_takes_the_worst_sums():
    objective = vae_objective(CVaR(0.5), tail_term="elbo", beta=2.0, iwae_samples=0)
    # The sums with beta 2 are 19, 4, 103 and 42; the worst half is 103 and 42.
    assert objective(LOSSES).item() == pytest.approx(72.5)


def test_the_tail_of_the_reconstruction_leaves_the_kl_its_mean():
    objective = vae_objective(CVaR(0.5), tail_term="reconstruction", beta=2.0, iwae_samples=0)
    assert objective(LOSSES).item() == pytest.approx((3 + 40) / 2 + 2 * 61 / 4)


@pytest.mark.parametrize("tail", ["elbo", "reconstruction"])
@pytest.mark.parametrize("risk", [CVaR(0.0), Mean()])
def test_both_tails_are_the_mean_at_alpha_0(risk, tail):
    objective = vae_objective(risk, tail_term=tail, beta=0.5, iwae_samples=0)
    assert objective(LOSSES).item() == pytest.approx(46 / 4 + 0.5 * 61 / 4)


@pytest.mark.parametrize(("alpha", "value"), [(0, 3.0), (0.5, 4.5)])
def test_the_importance_weighted_bound_is_a_loss_like_others(alpha, value):
    objective = vae_objective(CVaR(alpha), tail_term="elbo", beta=1.0, iwae_samples=8)
    losses = {"negative_iw_bound": torch.tensor([1.0, 5.0, 2.0, 4.0])}
    assert objective(losses).item() == pytest.approx(value)


@pytest.mark.parametrize(
    ("alpha", "tail", "samples", "expected"),
    [
        (0.8, "elbo", 0, True),
        (0.8, "elbo", 5, True),
        (0.8, "reconstruction", 0, False),
        (0.0, "elbo", 0, False),
    ],
)
def test_which_objectives_the_tail_alone_makes(alpha, tail, samples, expected):
    risk = CVaR(alpha)
    objective = vae_objective(risk, tail, 1.0, samples)
    assert (risk.tail_alpha is not None and objective.added is None) == expected
    names = ("negative_iw_bound",) if samples else ("reconstruction", "kl")
    losses = {name: torch.randn(10, requires_grad=True) for name in names}
    objective(losses).backward()
    of_sample = sum(each.grad.abs() for each in losses.values())
    assert ((of_sample == 0).sum() == 8) == expected


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, "elbo", 1.0, 0), "mean of -ELBO"),
        ((0, "reconstruction", 1.0, 0), "mean of -ELBO"),
        ((0, "elbo", 2.0, 0), "mean of (reconstruction + 2 KL)"),
        ((0.8, "elbo", 1.0, 0), "CVaR 0.8 of -ELBO"),
        ((0.8, "elbo", 0.5, 0), "CVaR 0.8 of (reconstruction + 0.5 KL)"),
        ((0.9, "reconstruction", 1.0, 0), "CVaR 0.9 of reconstruction + mean of KL"),
        ((0.9, "reconstruction", 2.0, 0), "CVaR 0.9 of reconstruction + mean of 2 KL"),
        ((0, "elbo", 1.0, 5), "mean of -IW-5 bound"),
        ((0.9, "elbo", 1.0, 5), "CVaR 0.9 of -IW-5 bound"),
    ],
)
def test_an_objective_is_named_by_what_it_computes(arguments, name):
    alpha, *others = arguments
    assert objective_name(CVaR(alpha), *others) == name
