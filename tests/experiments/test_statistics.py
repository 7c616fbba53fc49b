import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqloss.experiments.statistics import holm, mean_interval, paired

pytest.importorskip("scipy")


def test_holm_by_hand():
    # Sorted: .01 * 4 = .04, .02 * 3 = .06, .03 * 2 = .06, .5 * 1 = .5.
    assert holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    # .02 * 2 = .04 stays at least the .06 before it; .9 * 3 is cut to 1.
    assert holm([0.02, 0.02, 0.021]) == pytest.approx([0.06, 0.06, 0.06])
    assert holm([0.9, 0.95, 0.99]) == [1, 1, 1]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_between_the_p_value_and_bonferroni(p_values):
    corrected = holm(p_values)
    for p, q in zip(p_values, corrected, strict=True):
        assert p <= q <= min(1, len(p_values) * p)
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [corrected[i] for i in order] == sorted(corrected)
    assert corrected[order[0]] == min(1, len(p_values) * p_values[order[0]])


def test_a_paired_difference_by_hand():
    # Differences -1, -2, -3: mean -2, sd 1, t = -2 sqrt(3) with 2 degrees of freedom.
    found = paired({0: 3.0, 1: 2.0, 2: 1.0, 9: 7.0}, {2: 4.0, 1: 4.0, 0: 4.0, 8: 7.0})
    assert (found.below, found.seeds) == (3, 3)
    assert found.difference == pytest.approx(-2)
    assert found.relative == pytest.approx(-0.5)
    half = 4.302652729911275 / math.sqrt(3)  # the t quantile at 97.5 %
    assert (found.low, found.high) == pytest.approx((-2 - half, -2 + half))
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14))  # P(|t| > x) = 1 - x / sqrt(x^2 + 2)


def test_differences_without_spread_are_no_evidence():
    found = paired({0: 0.1, 1: 0.3}, {0: 0.2, 1: 0.4})
    assert found.p == 1
    assert found.difference == found.low == found.high == pytest.approx(-0.1)
    assert math.isnan(paired({0: 1.0, 1: 2.0}, {0: -1.0, 1: 1.0}).relative), "to a mean of 0"


def test_an_interval_by_hand():
    half = 12.706204736174705 / math.sqrt(2) * math.sqrt(2) / 2 * 2  # t quantile, df 1; sd sqrt(2)
    assert mean_interval([1.0, 3.0]) == pytest.approx((2, 2 - half, 2 + half))
