"""Probabilities of drawing: laws over all groups and scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqloss.groups import (
    effective_sample_size,
    keep_min_draw,
    power_of_share,
    probabilities,
    score_probabilities,
)

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
@given(weights=st.lists(st.floats(0, 1e3), min_size=1, max_size=30), least=st.floats(0, 1))
def test_every_sample_keeps_its_least_share_and_the_others_their_ratios(weights, least):
    weights = torch.tensor(weights, dtype=torch.float64) + 1e-3
    p, kept = weights / weights.sum(), keep_min_draw(weights, least)
    assert kept.sum().item() == pytest.approx(1, abs=1e-12)
    bound = least / len(p)
    assert (kept >= bound * (1 - 1e-12)).all()
    assert (kept[p.argsort()].diff() >= 0).all()
    above = kept > bound * (1 + 1e-9)
    factors = (kept / p)[above]  # one for all that are above it, and they alone pay
    torch.testing.assert_close(factors, factors[:1].expand_as(factors))
    assert (kept[p >= bound] <= p[p >= bound] * (1 + 1e-12)).all()
    if least == 0 or p.min() >= bound:
        torch.testing.assert_close(kept, p)


@law
@given(groups=numbers, power=powers, lift=st.booleans(), least=st.floats(0, 1))
def test_no_group_falls_below_its_share(groups, power, lift, least):
    p = probabilities(groups, power, lift=lift, min_draw=least)
    plain = probabilities(groups, power, lift=lift)
    torch.testing.assert_close(p, keep_min_draw(plain, least))
    assert (p * len(groups) >= least * (1 - 1e-12)).all()
    drawn, sizes = drawn_shares(groups, p), torch.bincount(groups).double()
    assert (drawn >= least * sizes / len(groups) * (1 - 1e-12)).all()
    for number in groups.unique():
        assert p[groups == number].unique().numel() == 1


def test_all_are_equally_likely_where_nothing_may_be_lost():
    p = probabilities(torch.tensor([0] * 90 + [1] * 9 + [2]), 3.0, min_draw=1.0)
    torch.testing.assert_close(p, torch.full_like(p, 0.01))
    scores = torch.tensor([1.0, 1.0, 2.0, 9.0])
    assert score_probabilities(scores, 2.0, min_draw=0.9).min() == 0.9 / 4


def drawn_shares(groups, p):
    return torch.zeros(int(groups.max()) + 1, dtype=p.dtype).index_add(0, groups, p)


@law
@given(
    groups=numbers,
    target=st.floats(0.001, 0.9),
    lift=st.booleans(),
    min_size=st.integers(1, 5),
    which=st.lists(st.booleans(), min_size=7, max_size=7),
    least=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_the_least_power_that_reaches_a_share(groups, target, lift, min_size, which, least):
    lifted = torch.tensor(which[: int(groups.max()) + 1])
    options = {"lift": lift, "min_size": min_size, "lifted": lifted, "min_draw": least}
    may = lifted & (torch.bincount(groups) >= min_size)

    def share(power):
        return drawn_shares(groups, probabilities(groups, power, **options))[may].min().item()

    power, reached = power_of_share(groups, target, **options)
    if not may.any():
        assert (power, reached) == (0, math.inf)
        return
    assert 0 <= power <= 100 and reached == pytest.approx(share(power), abs=1e-12)
    others = [share(each) for each in torch.linspace(0, 6, 61).tolist()]
    if reached < target * (1 - 1e-9):  # as near as can be
        assert max(others) <= reached + 1e-9
    below = [each for at, each in enumerate(others) if at / 10 < power * (1 - 1e-9)]
    assert all(each < min(target, reached) + 1e-9 for each in below)
    assert power == 0 or share(power * 0.999) < min(target, reached)


def test_without_lift_no_share_is_larger_than_that_of_equal_groups():
    groups = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    power, reached = power_of_share(groups, 0.9, lift=False)
    assert power == pytest.approx(1, abs=1e-6) and reached == pytest.approx(1 / 3)


def test_empty_groups_change_nothing_at_any_power():
    groups = torch.tensor([0] * 60 + [3] * 40)
    p = probabilities(groups, 100.0)
    torch.testing.assert_close(p, probabilities(groups.clamp_max(1), 100.0))
    far = probabilities(torch.tensor([0] * 2000 + [2] * 2000), 400.0)
    torch.testing.assert_close(far, torch.full_like(far, 1 / 4000))


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
        (
            lambda: probabilities(torch.tensor([0]), min_draw=1.1),
            r"min_draw: expected a number in ",
        ),
        (
            lambda: score_probabilities(torch.ones(2), min_draw=-0.1),
            "score_probabilities: min_draw",
        ),
        (lambda: keep_min_draw(torch.zeros(3), 0.5), "keep_min_draw: p: expected finite numbers"),
        (
            lambda: keep_min_draw(torch.ones(3), 2.0),
            r"keep_min_draw: min_draw: expected a number in",
        ),
        (lambda: power_of_share(torch.tensor([0]), 0.0), "power_of_share: target_min_share: expec"),
        (lambda: power_of_share(torch.tensor([0]), 1.0), "power_of_share: target_min_share: expec"),
        (lambda: power_of_share(torch.zeros(0).long(), 0.1), "power_of_share: groups: expected"),
        (lambda: score_probabilities(torch.tensor([1, math.nan])), "scores: expected finite"),
        (lambda: score_probabilities(torch.tensor([1.0, -1.0])), "scores: expected finite"),
        (lambda: effective_sample_size(torch.zeros(3)), "effective_sample_size: p: expected"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
