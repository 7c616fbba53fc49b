import dataclasses
import signal

import pytest
import torch

import sqloss
from sqloss.common.errors import UserError
from sqloss.common.flags import changed
from sqloss.losses import binary_cross_entropy_with_logits
from sqloss.models import GAN
from sqloss.models.augment import augment, draw_augmentation
from sqloss.models.gan_losses import GAN_LOSSES
from sqloss.models.seeding import generator, initialisation
from sqloss.training import checkpoint
from sqloss.training.gan.config import GANConfig
from sqloss.training.gan.generation import Noise, draw_noise, generate
from sqloss.training.gan.loop import COLUMNS, Contender
from sqloss.training.gan.stability import EPOCHS_LOST
from sqloss.training.run import Run

STEPS_PER_EPOCH = 3

VARIANTS = {loss: {"loss": loss} for loss in GAN_LOSSES} | {
    "conditional": {"conditional": True},
    "codes": {"info_codes": 2, "info_weight": 0.5},
    "two discriminator steps": {"d_steps": 2},
    "two generator steps": {"g_steps": 2},
    "moving average": {"ema": 0.9},
    "augmented": {"augment": True},
    "balanced": {"sampling": "balanced"},
    "communities of what D sees": {
        "sampling": "communities",
        "features": "hidden",
        "neighbours": 3,
        "sampling_from": 0.0,
        "min_stability": 0.0,
    },
    "density of components": {
        "sampling": "density",
        "features": "components",
        "sampling_from": 0.0,
    },
    "groups": {"risk": "group", "groups_from": 0.0, "alpha": 0.5},
    "top-k": {"risk": "topk", "tail_player": "g", "topk_decay": 0.8},
    "alone": {"no_baseline": True},
    "standard only": {"alpha": 0.0},
    "tail of d": {"tail_player": "d"},
    "tail of g": {"tail_player": "g"},
    "all": {
        "loss": "wgan-gp",
        "conditional": True,
        "info_codes": 1,
        "d_steps": 2,
        "g_steps": 2,
        "ema": 0.5,
        "augment": True,
        "sampling": "balanced",
    },
}


def change(trainer, **changes) -> GANConfig:
    trainer.config = changed(trainer.config, **changes)
    return trainer.config


def mean(losses):
    return losses.mean()


def tail(losses):
    return sqloss.cvar(losses, 0.8)


def draw_by_hand(count, draws, config):
    """The latents, and how generated images are shifted."""
    return torch.randn(count, config.latent, generator=draws), draw_augmentation(
        count, (1, 8, 8), draws
    )


def losses_by_hand(loss, model, images, target):
    """Of a discriminator to which the images are real (1) or not (0)."""
    logits = model(images)
    if loss == "wgan-gp":
        return -logits if target else logits
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def penalty_by_hand(model, real, fake, mix):
    share = mix[:, None, None, None]
    x = torch.lerp(fake, real, share).requires_grad_()
    (slopes,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return ((slopes.flatten(1).norm(dim=1) - 1) ** 2).mean()


def train_by_hand(config, data, risk_d, risk_g):
    """A training of one GAN, and its generator's weights after each of its steps."""
    with initialisation(config.seed, "model"):
        gan = GAN(data.shape, config.latent, config.width, batch_norm=config.loss != "wgan-gp")
    d, g = gan.discriminator, gan.generator
    adams = [torch.optim.Adam(p.parameters(), 2e-4, (0.5, 0.999), fused=True) for p in (d, g)]
    draws = generator(config.seed, "noise")
    states, batches = [], 0
    for epoch in range(config.epochs):
        order = torch.randperm(50, generator=generator(config.seed, "order", epoch))
        for batch in order.split(20):
            real = data.train_images[batch] / 127.5 - 1
            z, shift_of_real = draw_by_hand(len(batch), draws, config)
            shift_of_fake = draw_augmentation(len(batch), (1, 8, 8), draws)
            mix = torch.rand(len(batch), generator=draws)
            fake = g(z).detach()
            if config.augment:
                real, fake = augment(real, shift_of_real), augment(fake, shift_of_fake)
            loss = risk_d(losses_by_hand(config.loss, d, real, 1))
            loss = loss + risk_d(losses_by_hand(config.loss, d, fake, 0))
            if config.loss == "wgan-gp":
                loss = loss + 10 * penalty_by_hand(d, real, fake, mix)
            adams[0].zero_grad()
            loss.backward()
            adams[0].step()

            batches += 1
            for _ in range(config.g_steps if batches % config.d_steps == 0 else 0):
                z, shift = draw_by_hand(len(batch), draws, config)
                fake = augment(g(z), shift) if config.augment else g(z)
                adams[1].zero_grad()
                risk_g(losses_by_hand(config.loss, d, fake, 1)).backward()
                adams[1].step()
                states.append({name: t.clone() for name, t in g.state_dict().items()})
    return gan, states


@pytest.fixture
def steps(monkeypatch) -> list:
    """What the steps of all contenders were given, in order."""
    taken = []

    def recorded(player):
        step = getattr(Contender, f"{player}_step")

        def recorder(contender, *given):
            taken.append((player[0], contender, given))
            return step(contender, *given)

        monkeypatch.setattr(Contender, f"{player}_step", recorder)

    recorded("discriminator")
    recorded("generator")
    return taken


# the models


def test_all_models_start_alike(trainer, assert_same):
    models = trainer.begin(trainer.config).models
    assert list(models) == ["standard", "cvar"]
    assert_same(models["standard"].state_dict(), models["cvar"].state_dict())
    for a, b in zip(models["standard"].parameters(), models["cvar"].parameters(), strict=True):
        assert a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize(
    ("changes", "names"), [({"alpha": 0.0}, ["standard"]), ({"no_baseline": True}, ["cvar"])]
)
def test_one_model(trainer, changes, names):
    training = trainer.begin(change(trainer, **changes))
    assert list(training.models) == list(training.generators) == names


def test_all_models_see_the_same_batches_and_noise(trainer, tmp_path, steps, assert_same):
    change(trainer, conditional=True, info_codes=2, augment=True)
    training, _ = trainer.train(trainer.run(tmp_path))
    standard, cvar = (
        [(player, given) for player, contender, given in steps if contender is each]
        for each in training.contenders.values()
    )
    assert len(standard) == len(cvar) == 2 * 4 * STEPS_PER_EPOCH
    for (player, given), (other_player, other_given) in zip(standard, cvar, strict=True):
        assert player == other_player
        # What their risks need of the samples, nothing here, is of each model
        assert all(a is b or a == b == {} for a, b in zip(given, other_given, strict=True))
    order = torch.randperm(50, generator=generator(0, "order", 0))[:20]
    real, noise, *_ = standard[0][1]
    assert_same(real, trainer.data.train_images[order] / 127.5 - 1)
    assert_same(noise.labels, trainer.data.train_labels[order])
    again = standard[1][1][1]
    assert_same(again.labels, noise.labels)
    assert not torch.equal(again.z, noise.z), "each step has noise of its own"


@pytest.mark.parametrize(
    "changes", [{"tail_player": "d"}, {"loss": "wgan-gp"}, {"alpha": 0.0}, {"augment": True}]
)
def test_the_standard_model_is_bit_for_bit_a_plain_training(
    trainer, tmp_path, assert_same, changes
):
    config = change(trainer, **changes, epochs=2)
    training, _ = trainer.train(trainer.run(tmp_path))
    plain, _ = train_by_hand(config, trainer.data, mean, mean)
    assert_same(training.models["standard"].state_dict(), plain.state_dict())


@pytest.mark.parametrize("loss", ["nonsaturating", "wgan-gp"])
@pytest.mark.parametrize(
    ("tail_player", "risks"), [("d", (tail, mean)), ("g", (mean, tail)), ("both", (tail, tail))]
)
def test_the_tail_is_that_of_real_and_of_generated_images_apart(
    trainer, tmp_path, assert_same, loss, tail_player, risks
):
    config = change(trainer, loss=loss, tail_player=tail_player, epochs=2)
    training, _ = trainer.train(trainer.run(tmp_path))
    plain, _ = train_by_hand(config, trainer.data, *risks)
    assert_same(training.models["cvar"].state_dict(), plain.state_dict())
    for player in ("discriminator", "generator"):  # each moves the other, from the second step on
        of_mean, of_tail = (
            next(getattr(model, player).parameters()) for model in training.models.values()
        )
        assert not torch.equal(of_mean, of_tail)


def test_mean_and_tail_are_of_one_scale(trainer, tmp_path):
    change(trainer, alpha=1e-6, epochs=1)
    training, _ = trainer.train(trainer.run(tmp_path))
    standard, cvar = training.history
    for name in COLUMNS[2:]:
        assert cvar[name] == pytest.approx(standard[name], rel=1e-4), name
    for row in training.history:
        assert row["d_loss_cvar"] == pytest.approx(row["d_loss_mean"], rel=1e-4)
        assert row["g_loss_cvar"] == pytest.approx(row["g_loss_mean"], rel=1e-4)


# the steps


@pytest.mark.parametrize(
    ("d_steps", "g_steps", "order"),
    [
        (1, 1, "dg" * 12),
        (1, 2, "dgg" * 12),
        (2, 1, "ddg" * 6),  # the third batch of an epoch and the first of the next are one turn's
        (3, 2, "dddgg" * 4),
    ],
)
def test_turns_go_on_across_epochs(trainer, tmp_path, steps, d_steps, g_steps, order):
    change(trainer, d_steps=d_steps, g_steps=g_steps, alpha=0.0)
    trainer.train(trainer.run(tmp_path))
    assert "".join(player for player, _, _ in steps) == order
    sizes = [len(given[0]) for player, _, given in steps if player == "d"]
    assert sizes == [20, 20, 10] * 4


def test_turns_go_on_after_an_interruption(trainer, tmp_path, steps, signalling):
    change(trainer, d_steps=2, alpha=0.0)
    trainer.train(trainer.run(tmp_path), signalling(5))
    assert "".join(player for player, _, _ in steps) == "ddgddgd"
    trainer.train(Run.resumed(GANConfig, tmp_path, {}))
    assert "".join(player for player, _, _ in steps) == "ddg" * 6


@pytest.mark.parametrize(("d_steps", "g_steps"), [(2, 1), (1, 2), (3, 2)])
def test_the_steps_of_a_turn_are_those_of_a_plain_training(
    trainer, tmp_path, assert_same, d_steps, g_steps
):
    config = change(trainer, d_steps=d_steps, g_steps=g_steps, epochs=2)
    training, _ = trainer.train(trainer.run(tmp_path))
    for name, risk in (("standard", mean), ("cvar", tail)):
        plain, _ = train_by_hand(config, trainer.data, risk, risk)
        assert_same(training.models[name].state_dict(), plain.state_dict())


def test_a_generator_without_a_turn_in_an_epoch_is_refused(trainer):
    trainer.begin(change(trainer, d_steps=3))
    with pytest.raises(UserError) as raised:
        trainer.begin(change(trainer, d_steps=4))
    assert str(raised.value) == (
        "--d-steps: expected at most 3, the batches of an epoch, after which the generator has its "
        "turn, got 4"
    )


def test_images_too_small_for_the_networks_are_refused(trainer):
    images = trainer.data.train_images[:, :, :4]
    trainer.data = dataclasses.replace(trainer.data, train_images=images)
    with pytest.raises(UserError) as raised:
        trainer.begin(trainer.config)
    expected = "--image-size: expected images of at least 5 pixels a side, got 4 x 8"
    assert str(raised.value) == expected


@pytest.mark.parametrize("changes", [{}, {"info_codes": 2}, {"loss": "wgan-gp"}])
def test_each_step_moves_one_player(trainer, assert_same, changes):
    config = change(trainer, **changes)
    contender = trainer.begin(config).contenders["cvar"]
    players = {"d": contender.model.discriminator, "g": contender.model.generator}
    real = trainer.data.train_images[:20] / 127.5 - 1
    draws = torch.Generator().manual_seed(1)
    noise = draw_noise(20, players["g"], draws)
    shift = draw_augmentation(20, (1, 8, 8), draws)

    def step(player):
        if player == "d":
            contender.discriminator_step(real, noise, (shift, shift), torch.rand(20), 20)
        else:
            contender.generator_step(real, noise, shift, 20)

    for player, other in (("d", "g"), ("g", "d")):
        for each in players.values():
            each.zero_grad()
        before = {p: [w.clone() for w in model.parameters()] for p, model in players.items()}
        step(player)
        assert all(w.grad is None for w in players[other].parameters())
        assert all(w.grad is not None for w in players[player].parameters())
        assert_same([w.detach() for w in players[other].parameters()], before[other])
        parameters = players[player].named_parameters()
        moved = {
            name
            for (name, after), w in zip(parameters, before[player], strict=True)
            if not torch.equal(after, w)
        }
        still = {name for name, _ in players[player].named_parameters()} - moved
        # what a critic adds to all logits cancels out
        assert still == ({"head.bias"} if player == "d" and "loss" in changes else set())


def test_of_the_other_player_only_the_statistics_of_batch_norm_move(trainer):
    contender = trainer.begin(trainer.config).contenders["standard"]
    real = trainer.data.train_images[:20] / 127.5 - 1
    d, g = contender.model.discriminator, contender.model.generator
    noise, shift = (
        draw_noise(20, g, torch.Generator()),
        draw_augmentation(20, (1, 8, 8), torch.Generator()),
    )
    [norm] = [module for module in d.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    seen = []
    norm.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    contender.generator_step(real, noise, shift, 20)
    [of_fake] = seen
    torch.testing.assert_close(norm.running_mean, 0.1 * of_fake.mean((0, 2, 3)))
    contender.discriminator_step(real, noise, (shift, shift), torch.rand(20), 20)
    assert norm.num_batches_tracked == 3
    of_g = [module for module in g.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert [module.num_batches_tracked for module in of_g] == [2] * len(of_g)


# the moving average


def test_the_moving_average_is_that_of_its_formula(trainer, tmp_path):
    config = change(trainer, ema=0.7)
    training, _ = trainer.train(trainer.run(tmp_path))
    for name, risk in (("standard", mean), ("cvar", tail)):
        _, states = train_by_hand(config, trainer.data, risk, risk)
        average = states[0]
        for state in states[1:]:
            average = {key: 0.7 * average[key] + 0.3 * state[key] for key in average}
        found = training.generators[name].state_dict()
        assert found.keys() == average.keys()
        assert any(key.endswith("running_var") for key in found)
        for key in found:
            if not key.endswith("num_batches_tracked"):  # which nothing depends on
                torch.testing.assert_close(found[key], average[key])


def test_the_moving_average_changes_nothing_in_the_training(trainer, tmp_path, assert_same):
    without, _ = trainer.train(trainer.run(tmp_path / "without"))
    change(trainer, ema=0.7)
    training, _ = trainer.train(trainer.run(tmp_path / "with"))
    for name, model in training.models.items():
        assert_same(model.state_dict(), without.models[name].state_dict())
        assert training.generators[name] is not model.generator
        assert without.generators[name] is without.models[name].generator
    noise = Noise(torch.randn(5, 3), None, None)
    images = [generate(each.generators["cvar"], noise) for each in (training, without)]
    assert not torch.equal(*images)


# resuming


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_and_two_epochs_with_an_interruption_are_four(
    trainer, tmp_path, variant, assert_same_run, signalling
):
    change(trainer, **VARIANTS[variant], checkpoint_every=4)
    trainer.train(trainer.run(tmp_path / "whole"))

    parts = tmp_path / "parts"
    change(trainer, epochs=2)
    assert trainer.train(trainer.run(parts))[1]
    assert not trainer.train(Run.resumed(GANConfig, parts, {"epochs": 4}), signalling(2))[1]
    newest = checkpoint.load(parts / "checkpoints")
    assert (newest["epoch"], newest["step"]) == (2, 2)
    assert trainer.train(Run.resumed(GANConfig, parts, {}))[1]
    assert_same_run(parts, tmp_path / "whole")


@pytest.mark.parametrize("after", [1, 2 * STEPS_PER_EPOCH, 4 * STEPS_PER_EPOCH])
def test_an_interrupted_run_goes_on_where_it_was(
    trainer, tmp_path, after, assert_same_run, signalling
):
    config = change(trainer, ema=0.9, d_steps=2)
    trainer.train(trainer.run(tmp_path / "whole"))
    parts = tmp_path / "parts"
    training, finished = trainer.train(trainer.run(parts), signalling(after, signal.SIGTERM))
    assert not finished
    newest = checkpoint.load(parts / "checkpoints")
    assert (newest["epoch"], newest["step"]) == (training.epoch, training.step)
    assert training.epoch * STEPS_PER_EPOCH + training.step == after
    trainer.train(Run.resumed(GANConfig, parts, {}))
    assert_same_run(parts, tmp_path / "whole")
    assert checkpoint.load(parts / "checkpoints")["epoch"] == config.epochs


@pytest.mark.parametrize("changes", [{"ema": 0.5}, {"width": 3}, {"conditional": True}])
def test_the_checkpoint_of_another_model_is_refused(trainer, tmp_path, changes):
    trainer.train(trainer.run(tmp_path))
    run = Run.resumed(GANConfig, tmp_path, {})
    other = Run(tmp_path, changed(run.config, **changes), is_new=False)
    with pytest.raises(UserError, match=r"--resume: expected the checkpoint .* does not fit"):
        trainer.train(other)


# what is measured


@pytest.mark.parametrize("alpha", [0.8, 0.5, 0.0])
def test_metrics_are_means_weighted_by_the_images_of_a_step(trainer, tmp_path, alpha):
    config = change(trainer, epochs=1, lr_d=1e-30, lr_g=1e-30, alpha=alpha)
    training, _ = trainer.train(trainer.run(tmp_path))

    model = trainer.begin(config).models["standard"]
    d, g = model.discriminator, model.generator
    draws = generator(config.seed, "noise")
    order = torch.randperm(50, generator=generator(config.seed, "order", 0))
    sums = dict.fromkeys(COLUMNS[2:], 0.0)
    with torch.no_grad():
        for batch in order.split(20):
            real = trainer.data.train_images[batch] / 127.5 - 1
            z, _ = draw_by_hand(len(batch), draws, config)
            draw_augmentation(len(batch), (1, 8, 8), draws)
            torch.rand(len(batch), generator=draws)
            of_real, of_fake = d(real), d(g(z))
            again, _ = draw_by_hand(len(batch), draws, config)
            fake = g(again)
            losses = [torch.nn.functional.softplus(x) for x in (-of_real, of_fake, -d(fake))]
            worst = round(len(batch) * (1 - (alpha or 0.8)))
            means = [each.mean() for each in losses]
            tails = [each.topk(worst).values.mean() for each in losses]
            higher = sum(float(r > f) for r in of_real for f in of_fake)
            spreads = [images.std(0, correction=0).mean() for images in (fake, real)]
            found = {
                "d_loss_mean": means[0] + means[1],
                "d_loss_cvar": tails[0] + tails[1],
                "d_auc": higher / len(batch) ** 2,
                "d_spread": torch.cat([of_real, of_fake]).std(),
                "g_loss_mean": means[2],
                "g_loss_cvar": tails[2],
                "g_spread": spreads[0] / spreads[1],
            }
            for name, value in found.items():
                sums[name] += len(batch) * float(value)
    for row in training.history:
        assert tuple(row) == COLUMNS
        for name, total in sums.items():
            assert row[name] == pytest.approx(total / 50, rel=1e-4), name


def test_the_history_has_a_row_per_epoch_and_model(trainer, tmp_path):
    training, finished = trainer.train(trainer.run(tmp_path))
    assert finished
    rows = [(row["epoch"], row["model"]) for row in training.history]
    assert rows == [(epoch, name) for epoch in (1, 2, 3, 4) for name in ("standard", "cvar")]
    header, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header.split(",") == list(COLUMNS)
    assert len(lines) == 8


def test_each_epoch_is_measured_anew(trainer, tmp_path):
    change(trainer, lr_d=1e-30, lr_g=1e-30, d_steps=2)
    training, _ = trainer.train(trainer.run(tmp_path))
    losses = [row["d_loss_mean"] for row in training.history]
    assert max(losses) < 1.5 * min(losses)


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"train_limit": 1}])
def test_a_single_image_is_no_collapse(trainer, tmp_path, capsys, changes):
    if "train_limit" in changes:
        trainer.data = dataclasses.replace(
            trainer.data,
            train_images=trainer.data.train_images[:1],
            train_labels=trainer.data.train_labels[:1],
        )
    change(trainer, **changes, epochs=1)
    training, _ = trainer.train(trainer.run(tmp_path))
    assert [row["g_spread"] for row in training.history] == [1.0, 1.0]
    assert "the generator has collapsed" not in capsys.readouterr().err


# what goes wrong


@pytest.mark.parametrize("broken", ["weights", "loss of d", "loss of g"])
def test_a_loss_that_is_not_finite_stops_without_saving(broken, stops_without_saving):
    def breaks(training) -> None:
        contender = training.contenders["cvar"]
        if broken == "weights":
            next(contender.model.parameters()).data.fill_(float("nan"))
        else:
            contender.totals[broken[-1]][0] += float("inf")

    stops_without_saving(breaks, "smaller --lr-d")


def test_a_broken_model_is_told_in_the_middle_of_an_epoch(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("sqloss.training.loop.CHECKED_EVERY", 2)
    change(trainer, lr_d=1e30, loss="lsgan", batch_size=5)
    with pytest.raises(UserError) as raised:
        trainer.train(trainer.run(tmp_path))
    assert (
        "the loss of the standard model is no longer finite after 0 epochs and 2 steps; expected a "
        "smaller --lr-d, got 1e+30, or --lr-g, got 0.0002; nothing was saved, and "
        f"{tmp_path} is free for the next try"
    ) in str(raised.value)
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("checkpoint_every", "kept"),
    [(1, "saved is what it was after {} and 0 steps"), (6, "nothing is saved yet")],
)
def test_a_collapse_is_told_when_it_begins(trainer, tmp_path, capsys, checkpoint_every, kept):
    change(trainer, loss="lsgan", lr_g=10.0, lr_d=0.01, width=8, batch_size=10, alpha=0.0)
    change(trainer, epochs=6, checkpoint_every=checkpoint_every)
    training, finished = trainer.train(trainer.run(tmp_path))
    assert finished, "it is told, and the training goes on"
    alike = [row["epoch"] for row in training.history if row["g_spread"] <= 0.05]
    assert alike == list(range(alike[0], 7))
    begun = EPOCHS_LOST if alike[0] == 1 else alike[0]  # it may be slow to begin
    lines = capsys.readouterr().err.splitlines()
    words = "standard: the generator has collapsed: it makes the same image of all noise"
    kept = kept.format(f"{begun} epochs")
    [place] = [number for number, line in enumerate(lines) if "collapsed" in line]
    assert lines[place] == f"epoch {begun}: {words}; {kept}"
    assert lines[place - 1].startswith(f"epoch {begun}/6: ")


def test_what_was_saved_before_is_told(trainer, tmp_path, capsys):
    change(trainer, checkpoint_every=2, alpha=0.0)
    training = trainer.begin(trainer.config)
    training.alarms = lambda: ["an alarm"]
    trainer.start = lambda *_: training
    trainer.train(trainer.run(tmp_path))
    told = [line for line in capsys.readouterr().err.splitlines() if "an alarm" in line]
    assert [line.partition("; ")[2] for line in told] == [
        "nothing is saved yet",
        "saved is what it was after 2 epochs and 0 steps",
        "saved is what it was after 2 epochs and 0 steps",
        "saved is what it was after 4 epochs and 0 steps",
    ]
