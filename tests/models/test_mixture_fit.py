import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqloss.models.mixture_fit import (
    SHRINKAGE,
    aggregate_draws,
    families,
    fit_mixture,
)

F64 = torch.float64


def toy(n: int, d: int = 3, groups: int = 3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Locations and scales of posteriors that lie in groups of different sizes."""
    draws = torch.Generator().manual_seed(seed)
    of = (torch.rand(n, generator=draws).square() * groups).long()
    of[:groups] = torch.arange(groups)
    turned = torch.randn(groups, d, d, dtype=F64, generator=draws)
    noise = torch.randn(n, 1, d, dtype=F64, generator=draws)
    loc = 3 * torch.randn(groups, d, dtype=F64, generator=draws)[of] + (noise @ turned[of])[:, 0]
    return loc, 0.1 + torch.rand(n, d, dtype=F64, generator=draws), of


def reference(loc, scale, groups, variance_of_noise=1.0):
    """Sizes, means and covariances, by loops."""
    found = []
    for group in range(int(groups.max()) + 1):
        rows = [i for i in range(len(loc)) if groups[i] == group]
        n, d = len(rows), loc.shape[1]
        mean = [sum(loc[i, a].item() for i in rows) / n for a in range(d)]
        covariance = torch.zeros(d, d, dtype=F64)
        for a in range(d):
            for b in range(d):
                both = sum(
                    (loc[i, a].item() - mean[a]) * (loc[i, b].item() - mean[b]) for i in rows
                )
                covariance[a, b] = both / n
                if a != b:
                    covariance[a, b] *= n / (n + SHRINKAGE)
                else:
                    own = sum(scale[i, a].item() ** 2 for i in rows) / n
                    covariance[a, b] += own * variance_of_noise
        found.append((n, torch.tensor(mean, dtype=F64), covariance))
    return [list(each) for each in zip(*found, strict=True)]


def covariances(mixture) -> torch.Tensor:
    df = mixture.df.item()
    variance = 1 if math.isinf(df) else df / (df - 2)
    return variance * mixture.scale_tril @ mixture.scale_tril.mT


def test_the_fit_is_that_of_the_definition():
    loc, scale, groups = toy(60)
    sizes, means, squares = reference(loc, scale, groups)
    mixture = fit_mixture(loc, scale, groups)
    assert mixture.sizes.tolist() == sizes
    assert mixture.df.isinf() and mixture.power == 0
    torch.testing.assert_close(mixture.loc, torch.stack(means))
    torch.testing.assert_close(covariances(mixture), torch.stack(squares))


@pytest.mark.parametrize("df", [2.5, 5.0, 40.0])
def test_the_second_moment_of_t_posteriors(df):
    """Whatever the family, but for the one whose scale is that of the posteriors."""
    loc, scale, groups = toy(60)
    mixture = fit_mixture(loc, scale, groups, df=df)
    _, means, squares = reference(loc, scale, groups, df / (df - 2))
    torch.testing.assert_close(mixture.loc, torch.stack(means))
    if mixture.df == df:  # by covariance or by scale
        _, _, by_scale = reference(loc, scale, groups)
        own = mixture.scale_tril @ mixture.scale_tril.mT
        by_covariance = covariances(mixture)
        assert torch.allclose(own, torch.stack(by_scale)) or torch.allclose(
            by_covariance, torch.stack(squares)
        )
    else:
        torch.testing.assert_close(covariances(mixture), torch.stack(squares))


def test_draws_from_a_fit_of_many_images_have_the_moments_of_the_aggregate_posterior():
    loc, scale, groups = toy(20_000)
    mixture = fit_mixture(loc, scale, groups)
    draws = aggregate_draws(loc, scale)
    found = mixture.sample(20_000, torch.tensor(3))
    torch.testing.assert_close(found.mean(0), draws.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(found.T.cov(), draws.T.cov(), rtol=0.05, atol=0.2)


def test_t_posteriors_without_a_variance_have_t_components_of_their_df():
    loc, scale, groups = toy(60)
    for df in (0.5, 1.0, 2.0):
        mixture = fit_mixture(loc, scale, groups, df=df)
        assert mixture.df == df
        _, _, squares = reference(loc, scale, groups)
        own = mixture.scale_tril @ mixture.scale_tril.mT
        torch.testing.assert_close(own, torch.stack(squares))


def test_the_family_that_explains_held_out_draws_best_is_taken():
    """Posteriors all over one place are nearly t; those of narrow noise are nearly normal."""
    draws = torch.Generator().manual_seed(0)
    one_group = torch.zeros(4000, dtype=torch.int64)
    loc = torch.randn(4000, 1, dtype=F64, generator=draws)
    heavy = fit_mixture(0.01 * loc, torch.ones(4000, 1), one_group, df=3.0)
    light = fit_mixture(loc, torch.full((4000, 1), 1e-3), one_group, df=3.0)
    assert heavy.df == 3
    torch.testing.assert_close(heavy.scale_tril[0, 0, 0].item(), 1.0, rtol=0.01, atol=0)
    assert light.df > 6
    assert families(math.inf) == [(math.inf, True)]


@given(
    n=st.integers(1, 12),
    d=st.integers(1, 4),
    copies=st.booleans(),
    exponent=st.integers(-160, 8),
    df=st.sampled_from([math.inf, 1.5, 3.0]),
)
@settings(max_examples=60, deadline=None)
def test_small_and_singular_groups_have_a_density(n, d, copies, exponent, df):
    draws = torch.Generator().manual_seed(n)
    loc = torch.randn(n, d, dtype=F64, generator=draws)
    if copies:
        loc = loc[:1].repeat(n, 1)
    loc[:, 1:] = loc[:, :1]  # of rank one
    scale = torch.full((n, d), 10.0**exponent, dtype=F64)
    mixture = fit_mixture(
        loc, scale, torch.arange(n) % 2 if n > 1 else torch.zeros(1).long(), df=df
    )
    assert mixture.log_prob(loc).isfinite().all()
    assert mixture.sample(20, torch.tensor(0)).isfinite().all()


def test_the_order_of_the_images_makes_no_difference():
    loc, scale, groups = toy(200)
    order = torch.randperm(200)
    first, second = (
        fit_mixture(loc, scale, groups),
        fit_mixture(*(t[order] for t in (loc, scale, groups))),
    )
    torch.testing.assert_close(first.loc, second.loc)
    torch.testing.assert_close(first.scale_tril, second.scale_tril)


def test_the_fit_is_repeatable():
    loc, scale, groups = toy(200)
    first, second = (fit_mixture(loc, scale, groups, df=5.0) for _ in range(2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


LOC, SCALE, GROUPS = toy(10)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((LOC[:0], SCALE[:0], GROUPS[:0]), "of one image or more, got [0, 3] and [0, 3]"),
        ((LOC, SCALE[:5], GROUPS), "got [10, 3] and [5, 3]"),
        ((LOC * math.nan, SCALE, GROUPS), "finite loc, and finite scale above 0"),
        ((LOC, 0 * SCALE, GROUPS), "finite loc, and finite scale above 0"),
        ((LOC, SCALE, GROUPS[:5]), "expected int64 of shape [10], got torch.int64 of shape [5]"),
        ((LOC, SCALE, GROUPS.int()), "groups: expected int64 of shape [10], got torch.int32"),
        ((LOC, SCALE, GROUPS + 1), "groups: expected the numbers from 0 up, each of an image"),
        ((LOC, SCALE, GROUPS - 1), "groups: expected the numbers from 0 up, each of an image"),
        ((LOC, SCALE, 2 * GROUPS), "groups: expected the numbers from 0 up, each of an image"),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted(arguments, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        fit_mixture(*arguments)
