"""CommunitySampler with anyone's DataLoader."""

import pytest
import torch

from sqloss.training import CommunitySampler


def features():
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(100, 3, generator=draws)
    x[95:] += 50
    return x


def sampler(**options):
    return CommunitySampler(features(), neighbours=4, resolution=0.2, **options)


def test_a_loader_sees_the_rare_ones_more_often():
    own = sampler()
    loader = torch.utils.data.DataLoader(torch.arange(100), batch_size=10, sampler=own)
    drawn = torch.cat(
        [batch for epoch in range(20) for batch in [own.set_epoch(epoch), *loader][1:]]
    )
    assert len(loader) == 10 and len(drawn) == 2000
    expected = own.probabilities[95:].sum().item()
    assert expected > 0.1 and (drawn >= 95).double().mean() == pytest.approx(expected, abs=0.04)


def test_epochs_differ_and_repeat():
    own = sampler()
    first = list(own)
    assert first == list(own) == list(sampler())
    own.set_epoch(1)
    assert first != list(own)
    assert first != list(sampler(seed=1))


@pytest.mark.parametrize("ranks", [1, 3, 7])
def test_ranks_share_an_epoch(ranks):
    whole = list(sampler())
    parts = [list(sampler(num_replicas=ranks, rank=rank)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1 and len(parts[0]) == len(
        sampler(num_replicas=ranks)
    )
    together = [each for turn in zip(*parts, strict=True) for each in turn]
    assert together[:100] == whole and together[100:] == whole[: len(together) - 100]


def test_a_state_goes_on_where_it_was():
    own = sampler()
    own.set_epoch(3)
    whole = list(own)
    draws = iter(own)
    before = [next(draws) for _ in range(37)]
    state = own.state_dict()
    other = CommunitySampler(torch.zeros(100, 1))
    other.load_state_dict(state)
    other.set_epoch(3)
    assert before + list(other) == whole
    assert list(other) == whole, "the next epoch is whole"
    with pytest.raises(ValueError, match="CommunitySampler: state: expected one of 4 samples"):
        CommunitySampler(torch.zeros(4, 1)).load_state_dict(state)


def test_a_rank_out_of_range():
    with pytest.raises(ValueError, match=r"CommunitySampler: rank: expected .* below 2, got 2"):
        sampler(num_replicas=2, rank=2)


def test_what_is_lifted_is_told_and_is_part_of_the_state():
    options = {"min_stability": 0.4, "merge_overlap": 0.5, "target_min_share": 0.1, "min_draw": 0.8}
    own = sampler(**options)
    share = own.probabilities[own.groups == own.groups[99]].sum().item()
    assert own.stability.shape == (int(own.groups.max()) + 1,)
    stable = own.stability >= 0.4
    assert stable[own.groups[99]] and not stable.all()
    assert share >= 0.1 - 1e-9 and 0 < own.power < 1
    unstable = own.probabilities[~stable[own.groups]]
    assert (unstable <= own.probabilities.min() * (1 + 1e-12)).all()
    assert own.probabilities.min() * 100 >= 0.8 * (1 - 1e-12)
    other = CommunitySampler(torch.zeros(100, 1))
    assert other.stability is None and other.power == 1
    other.load_state_dict(own.state_dict())
    assert torch.equal(other.stability, own.stability) and other.power == own.power
    assert list(other) == list(sampler(**options))


def test_a_power_and_a_target_are_refused():
    with pytest.raises(ValueError, match="CommunitySampler: target_min_share: expected no power"):
        sampler(power=1.0, target_min_share=0.1)
    with pytest.raises(ValueError, match=r"target_min_share: expected a number in \[0, 1\), got 1"):
        sampler(target_min_share=1.0)
    with pytest.raises(ValueError, match="CommunitySampler: min_stability: expected a number in"):
        sampler(min_stability=1.1)
    with pytest.raises(ValueError, match="CommunitySampler: min_draw: expected a number in"):
        sampler(min_draw=-1.0)
    with pytest.raises(ValueError, match="CommunitySampler: merge_overlap: expected a number in"):
        sampler(merge_overlap=0.0)
