"""Probabilities of drawing: laws over all groups and scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqloss.groups import effective_sample_size, probabilities, score_probabilities

numbers = st.lists(st.integers(0, 6), min_size=1, max_size=60).map(torch.tensor)
powers = st.floats(0, 4)
law = settings(max_examples=60, deadline=None)


@law
@given(groups=numbers, power=powers, lift=st.booleans(), min_size=st.integers(1, 5))
def test_they_are_probabilities_and_equal_within_a_group(groups, power, lift, min_size):
    p = probabilities(groups, power, lift=lift, min_size=min_size)
    assert p.dtype == torch.float64 and p.sum().item() == pytest.approx(1) and (p > 0).all()
    for number in groups.unique():
        assert p[groups == number].unique().numel() == 1
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))
    permuted = probabilities(groups[order], power, lift=lift, min_size=min_size)
    torch.testing.assert_close(permuted, p[order])


@law
@given(groups=numbers, lift=st.booleans())
def test_at_power_0_samples_are_equally_likely_and_at_1_groups(groups, lift):
    uniform = torch.full((len(groups),), 1 / len(groups), dtype=torch.float64)
    torch.testing.assert_close(probabilities(groups, 0, lift=lift), uniform)
    mass = torch.zeros(7, dtype=torch.float64).index_add(
        0, groups, probabilities(groups, 1, lift=False)
    )
    present = mass[groups.unique()]
    torch.testing.assert_close(present, torch.full_like(present, 1 / len(present)))


@law
@given(groups=numbers, power=powers, min_size=st.integers(1, 5))
def test_with_lift_no_sample_has_less_than_the_large_groups_do(groups, power, min_size):
    p = probabilities(groups, power, min_size=min_size)
    sizes = torch.bincount(groups)[groups]
    mean = len(groups) / groups.unique().numel()
    weights = p / p[sizes.argmax()]  # the largest group is never lifted: weight 1
    assert (weights >= 1 - 1e-12).all()
    expected = torch.where(sizes < min_size, 1.0, (mean / sizes.double()).clamp_min(1).pow(power))
    torch.testing.assert_close(weights, expected.double())


@law
@given(groups=numbers, power=powers)
def test_groups_that_are_not_to_be_lifted_have_a_weight_of_1_at_most(groups, power):
    none = torch.zeros(int(groups.max()) + 1, dtype=torch.bool)
    uniform = torch.full((len(groups),), 1 / len(groups), dtype=torch.float64)
    torch.testing.assert_close(probabilities(groups, power, lifted=none), uniform)
    assert torch.equal(probabilities(groups, power, lifted=~none), probabilities(groups, power))


@law
@given(scores=st.lists(st.floats(0, 1e300), min_size=1, max_size=30), power=powers)
def test_scores(scores, power):
    scores = torch.tensor(scores, dtype=torch.float64)
    for lift in (True, False):
        p = score_probabilities(scores, power, lift=lift)
        assert p.sum().item() == pytest.approx(1) and (p[scores.argsort()].diff() >= 0).all()
    if scores.any() and power == 1:
        expected = scores / scores.max() / (scores / scores.max()).sum()
        torch.testing.assert_close(p, expected)


def test_scores_that_are_all_0_are_equally_likely():
    assert score_probabilities(torch.zeros(4)).tolist() == [0.25] * 4


@law
@given(groups=numbers, power=powers)
def test_the_effective_sample_size_is_a_share(groups, power):
    share = effective_sample_size(probabilities(groups, power, lift=False))
    assert 1 / len(groups) - 1e-9 <= share <= 1 + 1e-9
    assert effective_sample_size(torch.ones(len(groups))) == 1
    one = torch.zeros(len(groups)).index_fill(0, torch.tensor(0), 1e30)
    assert effective_sample_size(one) == pytest.approx(1 / len(groups))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: probabilities(torch.tensor([0.0])), "probabilities: groups: expected a number pe"),
        (
            lambda: probabilities(torch.tensor([-1, 0])),
            "groups: expected numbers from 0 up",
        ),
        (lambda: probabilities(torch.zeros(0).long()), "numbers from 0 up, got none"),
        (
            lambda: probabilities(torch.tensor([0]), -1),
            "power: expected a number from 0 up",
        ),
        (lambda: probabilities(torch.tensor([0]), math.nan), "power: expected a number from 0 up"),
        (lambda: probabilities(torch.tensor([0]), min_size=0), "min_size: expected a whole number"),
        (
            lambda: probabilities(torch.tensor([0]), lifted=torch.ones(2).bool()),
            r"lifted: expected bool \[1\]",
        ),
        (lambda: score_probabilities(torch.tensor([1, math.nan])), "scores: expected finite"),
        (lambda: score_probabilities(torch.tensor([1.0, -1.0])), "scores: expected finite"),
        (lambda: effective_sample_size(torch.zeros(3)), "effective_sample_size: p: expected"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
