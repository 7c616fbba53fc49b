import pytest
import torch

from sqloss.common.errors import UserError
from sqloss.common.flags import changed
from sqloss.models.seeding import generator
from sqloss.training import checkpoint, sampling_report
from sqloss.training.run import Run
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
    expected = ["shuffle", "balanced", "communities", "clusters", "leverage", "density"]
    assert {name: kind.name for name, kind in SAMPLERS.items()} == {name: name for name in expected}


# --- the samplers without labels


class Rare(Data):
    """Rows around centres far apart; the last class is rare."""

    def __init__(self, counts=(90, 80, 9)):
        super().__init__(counts)
        draws = generator(0, "rare")
        centres = 50 * torch.randn(len(counts), 3, generator=draws)
        self.x = torch.randn(len(self), 3, generator=draws) + centres[self.labels]


class Trained:
    """What a sampler asks of a training."""

    feature_names = ("means", "pixels")

    def __init__(self, epochs=4):
        self.epochs, self.epoch, self.step, self.seed = epochs, 0, 0, 0
        self.of_sampler = {}
        self.risks = {}
        self.asked = []

    def features(self, name, data):
        self.asked.append((name, self.epoch))
        return data.x


FOUND = {"resolution": 0.2, "min_stability": 0.0}
BY_FEATURES = {
    "communities": FOUND,
    "clusters": {"clusters": 3},
    "leverage": {},
    "density": {},
}


def epoch_of(sampler, data, training, epoch):
    training.epoch = epoch
    return sampler.order(data, generator(0, "order", epoch), training)


@pytest.mark.parametrize("name", BY_FEATURES)
def test_they_begin_with_their_share_of_the_training_and_are_found_once(name):
    sampler, data, training = SAMPLERS[name](**BY_FEATURES[name]), Rare(), Trained()
    for epoch in (0, 1):
        assert sorted(epoch_of(sampler, data, training, epoch).tolist()) == list(range(179))
        assert not training.of_sampler
    for epoch in (2, 3):
        drawn = epoch_of(sampler, data, training, epoch)
        assert len(drawn) == 179 and drawn.min() >= 0 and drawn.max() < 179
        assert torch.equal(drawn, epoch_of(sampler, data, training, epoch))
    assert training.asked == [("means", 2)]
    refreshed = SAMPLERS[name](**BY_FEATURES[name], sampling_from=0.0, sampling_refresh=2)
    training = Trained(6)
    for epoch in range(6):
        epoch_of(refreshed, data, training, epoch)
    assert training.asked == [("means", epoch) for epoch in (0, 2, 4)]


def test_a_refresh_leaves_the_epoch_under_way_as_it_is():
    sampler = SAMPLERS["communities"](**FOUND, sampling_from=0.0, sampling_refresh=1)
    data, training = Rare(), Trained()
    drawn = epoch_of(sampler, data, training, 1)
    training.step = 3
    assert torch.equal(drawn, epoch_of(sampler, data, training, 1)) and len(training.asked) == 1


def test_communities_draw_a_rare_class_more_often():
    data = Rare()
    for lift in (True, False):
        sampler = SAMPLERS["communities"](**FOUND, sampling_lift=lift, sampling_from=0.0)
        drawn = torch.cat([epoch_of(sampler, data, Trained(), epoch) for epoch in range(20)])
        assert (data.labels[drawn] == 2).double().mean() > 0.2  # 5 % of the data
    for guarded in ({"min_community": 10}, {"sampling_power": 0.0}):
        sampler = SAMPLERS["communities"](**FOUND, **guarded, sampling_from=0.0)
        training = Trained()
        epoch_of(sampler, data, training, 0)
        weights = training.of_sampler["p"][data.labels == 2]
        assert (weights <= training.of_sampler["p"].min() * (1 + 1e-9)).all()


def test_what_is_not_stable_is_not_lifted():
    data, training = Rare(), Trained()
    sampler = SAMPLERS["communities"](resolution=0.2, sampling_from=0.0, min_stability=1.0)
    epoch_of(sampler, data, training, 0)
    kept = training.of_sampler
    weights = kept["p"] * len(data)
    unstable = (kept["stability"] < 1)[kept["groups"]]
    assert kept["stability"].shape == (int(kept["groups"].max()) + 1,)
    if unstable.any():
        assert (weights[unstable] <= weights.min() + 1e-12).all()


def test_a_share_to_reach_and_a_share_to_keep():
    data, training = Rare(), Trained()
    options = {**FOUND, "sampling_from": 0.0, "merge_overlap": 0.05, "min_draw": 0.9}
    epoch_of(SAMPLERS["communities"](**options, target_min_share=0.12), data, training, 0)
    kept = training.of_sampler
    drawn = torch.bincount(kept["groups"], kept["p"])
    assert drawn.min() == pytest.approx(0.12) and kept["reached"] == pytest.approx(0.12)
    assert kept["p"].min() * 179 >= 0.9 * (1 - 1e-12) and 0 < kept["power"] < 1
    plain = Trained()
    epoch_of(SAMPLERS["communities"](**FOUND, sampling_from=0.0), data, plain, 0)
    parts = torch.bincount(plain.of_sampler["groups"])
    assert kept["parts"].sum() == len(parts) > len(kept["parts"])
    text = sampling_report.note(sampling_report.section(training, data, ("a", "b", "rare")))
    assert "From epoch 1 on, with power 0." in text
    assert "every group that may be lifted is 12.00%\nof the draws or more." in text
    assert "Groups joined of several communities, and of how many: 0 (" in text
    assert "No sample is drawn less than 0.9" in text
    for name in ("leverage", "density"):
        kept = Trained()
        bound = SAMPLERS[name](sampling_from=0.0, sampling_power=3.0, min_draw=0.9)
        epoch_of(bound, data, kept, 0)
        assert kept.of_sampler["p"].min() * 179 == pytest.approx(0.9)


def test_a_share_that_nothing_may_be_lifted_to():
    data, training = Rare(), Trained()
    settings = {**FOUND, "sampling_from": 0.0, "min_community": 1000, "target_min_share": 0.1}
    epoch_of(SAMPLERS["communities"](**settings), data, training, 0)
    report = sampling_report.section(training, data, ("a", "b", "rare"))
    assert report["sampling"]["reached"] is None
    assert "on, with power 0, as no group may be lifted." in sampling_report.note(report)


def test_a_share_to_reach_chooses_the_power():
    with pytest.raises(UserError, match=r"--target-min-share: .* no --sampling-power 1\.5 with"):
        SAMPLERS["clusters"](sampling_power=1.5, target_min_share=0.05)


def test_features_of_a_file(tmp_path):
    numpy = pytest.importorskip("numpy")
    data, training = Rare(), Trained()
    numpy.save(tmp_path / "f.npy", data.x.numpy())
    of_file = SAMPLERS["communities"](**FOUND, sampling_from=0.0, features=str(tmp_path / "f.npy"))
    of_file.check(data, training)
    drawn = epoch_of(of_file, data, training, 0)
    assert not training.asked
    own = SAMPLERS["communities"](**FOUND, sampling_from=0.0)
    assert torch.equal(drawn, epoch_of(own, data, Trained(), 0))
    numpy.save(tmp_path / "f.npy", data.x.numpy()[1:])
    with pytest.raises(UserError, match=r"--features: expected a row for each of 179 .* 178 x 3"):
        of_file.check(data, training)
    numpy.save(tmp_path / "f.npy", data.x.numpy() * float("nan"))
    with pytest.raises(UserError, match="--features: expected finite numbers"):
        of_file.check(data, training)
    (tmp_path / "f.npy").write_text("none")
    with pytest.raises(UserError, match=r"--features: cannot read .*f.npy"):
        of_file.check(data, training)


def test_features_that_a_trainer_has_not():
    sampler = SAMPLERS["density"](features="hidden")
    with pytest.raises(UserError, match="--features: expected one of means, pixels, FILE"):
        sampler.check(Rare(), Trained())
    training = Trained()
    training.feature_names = ()
    with pytest.raises(UserError, match=r"--features: expected one of FILE.npy here, got auto"):
        SAMPLERS["density"]().check(Rare(), training)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("leverage", {"sampling_power": -1.0}),
        ("leverage", {"sampling_from": 1.0}),
        ("density", {"sampling_refresh": -1}),
        ("clusters", {"clusters": 0}),
        ("clusters", {"min_community": 0}),
        ("communities", {"neighbours": 0}),
        ("communities", {"resolution": 0.0}),
        ("communities", {"min_stability": 1.5}),
        ("communities", {"merge_overlap": 0.0}),
        ("clusters", {"target_min_share": 1.0}),
        ("density", {"min_draw": 1.1}),
    ],
)
def test_settings_out_of_range(name, setting):
    (field,) = setting
    with pytest.raises(UserError, match=f"--{field.replace('_', '-')}: expected"):
        SAMPLERS[name](**setting)


def test_what_the_report_says():
    data, training = Rare(), Trained()
    epoch_of(SAMPLERS["communities"](resolution=0.2, sampling_from=0.0), data, training, 0)
    report = sampling_report.section(training, data, ("a", "b", "rare"))
    found = report["sampling"]
    assert sum(group["size"] for group in found["groups"]) == 179
    assert sum(group["drawn"] for group in found["groups"]) == pytest.approx(1)
    assert 0 < found["effective_sample_size"] < 1
    assert found["classes_that_pay"].keys() <= {"a", "b"} and found["classes_that_pay"]
    text = sampling_report.note(report)
    assert "From epoch 1 on" in text and "| 0 |" in text and "drawn less for it: " in text
    assert sampling_report.section(Trained(), data, ("a",)) == {} and sampling_report.note({}) == ""


@pytest.mark.parametrize("stopped_after", [4, 8, 11])
def test_a_run_resumes_with_the_groups_that_it_had(
    trainer, tmp_path, assert_same_run, signalling, stopped_after
):
    trainer.config = changed(
        trainer.config, sampling="communities", neighbours=3, sampling_refresh=1, alpha=0.5
    )
    trainer.train(trainer.run(tmp_path / "whole"))
    _, ended = trainer.train(trainer.run(tmp_path / "resumed"), signalling(stopped_after))
    assert not ended
    again = Run.resumed(type(trainer.config), tmp_path / "resumed", {})
    assert trainer.train(again)[1]
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    state = checkpoint.load(tmp_path / "resumed" / "checkpoints")
    assert state["sampler"]["epoch"] == 3 and state["sampler"]["p"].shape == (50,)


@pytest.mark.parametrize(("stopped_after", "begins"), [(2, 2), (5, 1), (None, 1)])
def test_it_begins_by_the_epochs_that_are_known_when_it_would(
    trainer, tmp_path, signalling, stopped_after, begins
):
    """Two epochs resumed to four: one that has begun goes on, one that has not begins later."""
    trainer.config = changed(trainer.config, epochs=2, sampling="communities", neighbours=3)
    stop = signalling(stopped_after) if stopped_after else None
    trainer.train(trainer.run(tmp_path), stop)
    before = checkpoint.load(tmp_path / "checkpoints")["sampler"]
    assert bool(before) == (begins == 1)
    again = Run.resumed(type(trainer.config), tmp_path, {"epochs": 4})
    assert trainer.train(again)[1]
    after = checkpoint.load(tmp_path / "checkpoints")["sampler"]
    assert after["epoch"] == begins
    assert not before or torch.equal(before["p"], after["p"])
