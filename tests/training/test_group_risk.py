from types import SimpleNamespace

import pytest
import torch

import sqloss
from sqloss.common.errors import UserError
from sqloss.common.flags import changed, configure
from sqloss.models.seeding import generator
from sqloss.training import checkpoint, sampling_report
from sqloss.training.gan.config import GANConfig
from sqloss.training.group_risk import Group
from sqloss.training.run import Run
from sqloss.training.samplers import SAMPLERS

numpy = pytest.importorskip("numpy")


class Data:
    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return 60


LABELS = torch.tensor([7] * 40 + [3] * 17 + [5] * 3)  # a group of each, of 67, 28 and 5 %


def begun(order=None, labels=LABELS, **settings):
    """The risk of a model, of the groups of these labels, in its first epoch."""
    risk = Group(groups="labels", **settings).of_model()
    training = SimpleNamespace(epoch=0, epochs=4, feature_names=())
    risk.start_epoch(torch.arange(60) if order is None else order, Data(labels), training)
    return risk


def reference(batches, groups, alpha, decay):
    """The values of batches one after another, and the weights of their losses, in plain Python."""
    sums, counts, values = {}, {}, []
    for rows, losses in batches:
        for group in set(groups[rows].tolist()):
            own = [x for x, row in zip(losses.tolist(), rows, strict=True) if groups[row] == group]
            sums[group] = sums.get(group, 0.0) * decay + sum(own)
            counts[group] = counts.get(group, 0.0) * decay + len(own)
        names = sorted(sums)
        means = torch.tensor([sums[n] / counts[n] for n in names], dtype=torch.float64)
        # A tail of so many groups: the worst first, the last one in part
        left, q = (1 - alpha) * len(names), dict.fromkeys(names, 0.0)
        for place in means.argsort(descending=True).tolist():
            q[names[place]] = min(1.0, max(0.0, left)) / max(1.0, (1 - alpha) * len(names))
            left -= 1
        q = {n: v / sum(q.values()) for n, v in q.items()}
        shares = {n: (groups == n).double().mean().item() for n in names}
        weights = [q[int(groups[row])] / shares[int(groups[row])] / len(rows) for row in rows]
        values.append((sum(w * x for w, x in zip(weights, losses.tolist(), strict=True)), weights))
    return values


@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.8, 0.99])
def test_it_is_the_plain_reference(alpha):
    draws = torch.Generator().manual_seed(0)
    batches = [
        (torch.randperm(60, generator=draws)[:size], torch.rand(size, generator=draws).double())
        for size in (9, 9, 2, 1, 9, 9, 9)
    ]
    risk = begun(alpha=alpha, group_decay=0.7)
    for (rows, losses), (value, weights) in zip(
        batches, reference(batches, LABELS, alpha, 0.7), strict=True
    ):
        at = losses.clone().requires_grad_()
        found = risk(at, rows=rows)
        (slope,) = torch.autograd.grad(found, at)
        torch.testing.assert_close(found.item(), value, rtol=1e-12, atol=0)
        torch.testing.assert_close(slope, torch.tensor(weights, dtype=torch.float64))


@pytest.mark.parametrize("batch", [3, 20, 60])
def test_over_an_epoch_each_group_weighs_its_q_however_rare_it_is(batch):
    """Group means that stay in their order, so that q is the same in every batch once all are."""
    losses = LABELS.double() + torch.rand(60, dtype=torch.float64)
    for alpha, q in ((0.0, [1 / 3] * 3), (0.5, [0, 1 / 3, 2 / 3]), (0.9, [0, 0, 1])):
        risk = begun(alpha=alpha)
        risk(losses, rows=torch.arange(60))
        weights = torch.zeros(60, dtype=torch.float64)
        for rows in torch.randperm(60).split(batch):
            at = losses[rows].requires_grad_()
            weights[rows] += torch.autograd.grad(risk(at, rows=rows), at)[0] * batch / 60
        totals = [weights[group == LABELS].sum().item() for group in (3, 5, 7)]
        assert totals == pytest.approx(q)


def test_all_of_the_data_at_once_are_the_superquantile_of_the_groups_means():
    losses = torch.rand(60, dtype=torch.float64)
    means = torch.stack([losses[group == LABELS].mean() for group in (3, 5, 7)])
    for alpha in (0.0, 0.5, 0.9):
        value = begun(alpha=alpha)(losses, rows=torch.arange(60))
        torch.testing.assert_close(value, sqloss.cvar(means, alpha))


def test_a_group_that_is_drawn_more_often_weighs_no_more_for_it():
    losses = LABELS.double() + torch.rand(60, dtype=torch.float64)
    drawn = SAMPLERS["balanced"]().order(Data(LABELS), generator(0, "order"), None)
    risk = begun(drawn, alpha=0.0)
    at = losses[drawn].requires_grad_()
    weights = torch.autograd.grad(risk(at, rows=drawn), at)[0]
    totals = [weights[LABELS[drawn] == group].sum().item() for group in (3, 5, 7)]
    assert totals == pytest.approx([1 / 3] * 3)
    without = torch.arange(57)  # of the smallest group the epoch has none
    value = begun(without, alpha=0.0)(losses[:57], rows=without)
    means = [losses[:57][LABELS[:57] == group].mean() for group in (3, 7)]
    torch.testing.assert_close(value, torch.stack(means).mean())


def test_groups_that_no_batch_has_had_do_not_count():
    rows, losses = torch.tensor([0, 1, 41]), torch.tensor([1.0, 2.0, 3.0])
    risk = begun(alpha=0.0)
    value = risk(losses, rows=rows)
    torch.testing.assert_close(value.item(), (1.5 * 60 / 40 + 1.5 * 60 / 17) / 3)
    assert risk.weights_of_groups().tolist() == [0.5, 0.0, 0.5]
    means = risk.means()
    assert means[[0, 2]].tolist() == [3.0, 1.5] and means[1].isnan()


def test_losses_that_are_not_finite_are_not_hidden():
    for wrong in (float("inf"), float("nan")):
        losses = torch.ones(60)
        losses[58] = wrong  # of the smallest group, which is the worst for it
        value = begun(alpha=0.9)(losses, rows=torch.arange(60))
        assert not value.isfinite()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"alpha": 1.0}, r"--alpha: expected a number in \[0, 1\), got 1"),
        ({"groups": "clusters"}, "--groups: expected communities, labels or FILE.npy, got clus"),
        ({"groups_from": 1.0}, r"--groups-from: expected a number in \[0, 1\)"),
        ({"group_decay": 1.0}, r"--group-decay: expected a number in \[0, 1\)"),
        (
            {"groups": "labels", "groups_from": 0.2},
            "--groups-from: expected --groups communities with it, got --groups labels",
        ),
    ],
)
def test_settings_out_of_range(settings, error):
    with pytest.raises(UserError, match=error):
        Group(**settings)


def test_groups_of_a_file(tmp_path):
    path = tmp_path / "groups.npy"
    training = SimpleNamespace(epoch=0, epochs=4, feature_names=())
    risk = Group(groups=str(path))
    assert risk.words == "CVaR 0.8 over groups"
    for content, error in (
        (numpy.zeros(59, int), r"expected a whole number for each of 60 .* torch.int64 59"),
        (numpy.zeros((60, 1), int), r"expected a whole number for each .* torch.int64 60 x 1"),
        (numpy.zeros(60), r"expected a whole number for each .* torch.float64 60"),
    ):
        numpy.save(path, content)
        with pytest.raises(UserError, match=f"--groups: {error}"):
            risk.check(Data(None), training)
    path.unlink()
    with pytest.raises(UserError, match=r"--groups: cannot read .*groups.npy"):
        risk.check(Data(None), training)
    numpy.save(path, LABELS.numpy().astype(numpy.int16))
    risk.check(Data(None), training)
    running = risk.of_model()
    running.start_epoch(torch.arange(60), Data(None), training)
    assert running.found["names"].tolist() == [3, 5, 7]
    assert torch.equal(running.found["names"][running.groups], LABELS)


def test_what_is_not_there_to_find_groups_in():
    training = SimpleNamespace(feature_names=())
    with pytest.raises(UserError, match=r"--groups: expected labels or FILE.npy, as the model has"):
        Group().check(Data(LABELS), training)
    with pytest.raises(UserError, match="--groups: expected data with labels for labels"):
        Group(groups="labels").check(Data(None), training)


@pytest.mark.parametrize("groups", ["communities", "labels"])
@pytest.mark.parametrize("stopped_after", [4, 8])
def test_a_run_resumes_with_the_groups_and_means_that_it_had(
    trainer, tmp_path, assert_same_run, signalling, groups, stopped_after
):
    trainer.config = changed(trainer.config, risk="group", groups=groups, alpha=0.5)
    whole, _ = trainer.train(trainer.run(tmp_path / "whole"))
    _, ended = trainer.train(trainer.run(tmp_path / "resumed"), signalling(stopped_after))
    assert not ended
    again = Run.resumed(type(trainer.config), tmp_path / "resumed", {})
    assert trainer.train(again)[1]
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    state = checkpoint.load(tmp_path / "resumed" / "checkpoints")["risks"]
    assert state.keys() == {"group"} and state["group"]["groups"].shape == (50,)
    assert state["group"]["epoch"] == (2 if groups == "communities" else 0)
    made = sampling_report.section(whole, trainer.data, trainer.data.class_names)
    (weighed,) = made["groups"].values()
    assert sum(group["size"] for group in weighed["groups"]) == 50
    assert sum(group["weight"] for group in weighed["groups"]) == pytest.approx(1)
    assert weighed["since_epoch"] == state["group"]["epoch"] + 1
    assert "## Groups of `group`" in sampling_report.note(made)
    standard, own = (whole.models[name].state_dict().values() for name in ("standard", "group"))
    assert any(not torch.equal(a, b) for a, b in zip(standard, own, strict=True))


def test_before_there_are_groups_it_is_the_mean(trainer, tmp_path):
    trainer.config = changed(trainer.config, risk="group", epochs=2, groups_from=0.9)
    training, _ = trainer.train(trainer.run(tmp_path / "run"))
    rows = training.history[:2]
    assert [row["model"] for row in rows] == ["standard", "group"]
    assert rows[0]["train_objective"] == rows[1]["train_objective"]
    assert "test_objective_group" not in rows[1]  # of test images no groups are known


def test_a_gan_takes_it_of_real_images_alone():
    config = configure(GANConfig, risk="group", groups="labels", tail_player="both")
    of_losses = config.risks_of_losses(config.risk)
    assert {of: each.name for of, each in of_losses.items()} == {
        "real": "group",
        "fake": "mean",
        "g": "mean",
    }
    assert config.risk_names["group"] == (
        "CVaR 0.8 over labels of the discriminator's losses on real images, the mean of those on "
        "generated ones and the mean of the generator's losses"
    )
    with pytest.raises(UserError, match="--tail-player: expected d or both with --risk group"):
        configure(GANConfig, risk="group", tail_player="g")
