import pytest
import torch

from sqloss.models.seeding import generator
from sqloss.training.errors import UserError
from sqloss.training.samplers import SAMPLERS, Balanced, Shuffle


class Data:
    def __init__(self, counts):
        self.labels = (
            None
            if counts is None
            else torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        )

    def __len__(self):
        return len(self.labels)


def order(sampler, data):
    return sampler.order(data, generator(0, "order"), None)


def test_a_shuffled_epoch_has_every_sample_once():
    assert sorted(order(Shuffle(), Data([50, 5, 1])).tolist()) == list(range(56))


def test_a_balanced_epoch_has_every_class_equally_often():
    data = Data([9000, 900, 0])
    drawn = order(Balanced(), data)
    counts = torch.bincount(data.labels[drawn], minlength=3)
    assert len(drawn) == 9900 and counts[2] == 0
    assert abs(counts[0].item() - 4950) < 5 * 9900**0.5 / 2  # five standard deviations
    assert torch.equal(drawn, order(Balanced(), data))


def test_balanced_needs_labels():
    with pytest.raises(UserError, match="--sampling: expected data with labels for balanced"):
        order(Balanced(), Data(None))


def test_every_sampler_has_its_name():
    assert {name: kind.name for name, kind in SAMPLERS.items()} == {
        "shuffle": "shuffle",
        "balanced": "balanced",
    }
