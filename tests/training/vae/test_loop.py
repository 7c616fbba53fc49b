import signal
import threading
from pathlib import Path

import pytest
import torch

import sqloss
from sqloss.common.errors import UserError
from sqloss.common.flags import changed
from sqloss.losses import binary_cross_entropy_with_logits
from sqloss.models import VAE
from sqloss.models.numpy_vae import train_step
from sqloss.models.seeding import generator, initialisation
from sqloss.student_t import draw_seed, normal_rsample_kl
from sqloss.training import checkpoint
from sqloss.training.run import Run
from sqloss.training.stop import StopSignal
from sqloss.training.vae.config import VAEConfig
from sqloss.training.vae.evaluation import evaluate
from sqloss.training.vae.loop import COLUMNS

USUAL = (
    *("epoch", "model", "train_objective", "test_objective_standard", "test_objective_cvar"),
    *COLUMNS,
)

STEPS_PER_EPOCH = 3

VARIANTS = {
    "t": {"prior": "t", "df": 3.0, "tail_term": "reconstruction"},
    "learnt df": {"prior": "t", "learn_df": True},
    "importance-weighted": {"iwae_samples": 3},
    "all": {
        "prior": "t",
        "learn_df": True,
        "iwae_samples": 3,
        "architecture": "conv",
        "channels": "2,3",
    },
    "the tail alone": {"backward": "tail"},
    "microbatches": {"microbatch_size": 7},
    "alone, oversampled": {"no_baseline": True, "sampling": "balanced"},
    "numpy": {"backend": "numpy"},
    "t in numpy": {"backend": "numpy", "prior": "t", "df": 3.0, "tail_term": "reconstruction"},
}


@pytest.fixture
def whole(trainer, tmp_path) -> Path:
    """Four epochs without a break."""
    trainer.train(trainer.run(tmp_path / "whole"))
    return tmp_path / "whole"


def test_all_models_start_alike(trainer, assert_same):
    models = trainer.begin(trainer.config).models
    assert list(models) == ["standard", "cvar"]
    assert_same(models["standard"].state_dict(), models["cvar"].state_dict())
    standard, cvar = (next(model.parameters()) for model in models.values())
    assert standard.data_ptr() != cvar.data_ptr()


def test_at_alpha_0_there_is_only_the_standard_model(trainer):
    assert list(trainer.begin(changed(trainer.config, alpha=0.0)).models) == ["standard"]


@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_the_standard_model_is_bit_for_bit_a_plain_training(trainer, tmp_path, alpha, assert_same):
    config = changed(trainer.config, alpha=alpha)
    training, _ = trainer.train(Run.new(tmp_path, config))

    with initialisation(config.seed, "model"):
        vae = VAE((1, 4, 3), (8,), config.latent)
    adam = torch.optim.Adam(vae.parameters(), lr=config.learning_rate, fused=True)
    noise = generator(config.seed, "noise")
    for epoch in range(config.epochs):
        order = torch.randperm(50, generator=generator(config.seed, "order", epoch))
        for start in range(0, 50, 20):
            x = trainer.data.train_images[order[start : start + 20]].float() / 255
            loc, logvar = vae.encoder(x).chunk(2, dim=1)
            # torch's own, but for rounding and the bits of the draws: tests/test_student_t.py
            z, kl = normal_rsample_kl(loc, logvar=logvar, seed=draw_seed(generator=noise))
            logits = vae.decoder(z).unflatten(1, (1, 4, 3))
            # torch's own, but for rounding: tests/test_losses.py
            reconstruction = binary_cross_entropy_with_logits(logits, x, reduction="sum")
            loss = (reconstruction + kl).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()

    assert_same(training.models["standard"].state_dict(), vae.state_dict())


@pytest.mark.parametrize("df", [None, 3.0])
def test_in_numpy_torch_only_measures(trainer, tmp_path, monkeypatch, df, assert_same):
    def fail(*_, **__):
        raise AssertionError("autograd")

    monkeypatch.setattr(torch.Tensor, "backward", fail)
    prior = {} if df is None else {"prior": "t", "df": df}
    config = changed(trainer.config, backend="numpy", tail_term="reconstruction", lr=0.1, **prior)
    training, _ = trainer.train(Run.new(tmp_path, config))

    initial = trainer.begin(config).models["cvar"].state_dict()
    cvar = {name: tensor.numpy().copy() for name, tensor in initial.items()}
    noise = generator(config.seed, "noise")
    for epoch in range(config.epochs):
        order = torch.randperm(50, generator=generator(config.seed, "order", epoch))
        total = 0.0
        for batch in order.split(20):
            x = (trainer.data.train_images[batch] / 255).flatten(1).numpy()
            seed = int(draw_seed(generator=noise)) % 2**64
            value = train_step(cvar, x, seed, lr=0.1, df=df, alpha=0.8, tail_term="reconstruction")
            total += value * len(x)
        assert training.history[2 * epoch + 1]["train_objective"] == pytest.approx(total / 50)

    trained = training.models["cvar"].state_dict()
    for name, tensor in trained.items():
        assert (tensor.numpy() == cvar[name]).all()
        assert not torch.equal(tensor, initial[name])
    # What is measured, reported and saved is what was trained.
    saved = checkpoint.load(tmp_path / "checkpoints")["models"]["cvar"]
    assert_same(dict(saved), dict(trained))


def test_the_models_of_another_alpha_differ(trainer, tmp_path):
    training, _ = trainer.train(trainer.run(tmp_path))
    standard, cvar = (next(m.parameters()) for m in training.models.values())
    assert not torch.equal(standard, cvar)


def test_alone_the_model_of_the_tail_is_what_it_is_beside_the_standard_one(
    trainer, tmp_path, assert_same
):
    beside, _ = trainer.train(trainer.run(tmp_path / "beside"))
    trainer.config = changed(trainer.config, no_baseline=True)
    alone, _ = trainer.train(trainer.run(tmp_path / "alone"))
    assert list(alone.models) == ["cvar"]
    assert_same(alone.models["cvar"].state_dict(), beside.models["cvar"].state_dict())
    assert alone.history == [row for row in beside.history if row["model"] == "cvar"]


def test_two_and_two_epochs_are_four(trainer, tmp_path, whole, assert_same_run):
    short = changed(trainer.config, epochs=2)
    trainer.train(Run.new(tmp_path / "parts", short))
    trainer.train(Run.resumed(VAEConfig, tmp_path / "parts", {"epochs": 4}))
    assert_same_run(tmp_path / "parts", whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [1, 4, 5, 2 * STEPS_PER_EPOCH, 4 * STEPS_PER_EPOCH])
def test_an_interrupted_run_goes_on_where_it_was(
    trainer, tmp_path, whole, after, number, assert_same_run, signalling
):
    parts = tmp_path / "parts"
    training, finished = trainer.train(trainer.run(parts), signalling(after, number))
    epoch, step = training.epoch, training.step
    assert epoch * STEPS_PER_EPOCH + step == after
    newest = checkpoint.load(parts / "checkpoints")
    assert (newest["epoch"], newest["step"]) == (epoch, step)

    trainer.train(Run.resumed(VAEConfig, parts, {}))
    assert not finished
    assert_same_run(parts, whole)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_run_goes_on_where_it_was(
    trainer, tmp_path, variant, assert_same_run, signalling
):
    changes = VARIANTS[variant] | {"hidden": "6,5"}
    trainer.config = changed(trainer.config, **changes)
    trainer.train(trainer.run(tmp_path / "whole"))
    trainer.train(trainer.run(tmp_path / "parts"), signalling(5))
    trainer.train(Run.resumed(VAEConfig, tmp_path / "parts", {}))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_learnt_df_moves_and_is_a_metric(trainer, tmp_path):
    trainer.config = changed(trainer.config, prior="t", learn_df=True)
    training, _ = trainer.train(trainer.run(tmp_path))
    assert all(tuple(row) == (*USUAL, "df") for row in training.history)
    for row, model in zip(training.latest_rows(), training.models.values(), strict=True):
        assert row["df"] == model.df.item() != pytest.approx(5, rel=1e-4)
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert header.split(",") == [*USUAL, "df"]


def test_the_importance_weighted_bound_is_what_is_trained_on(trainer, tmp_path):
    config = changed(trainer.config, epochs=1, lr=1e-30, iwae_samples=3)
    training, _ = trainer.train(Run.new(tmp_path, config))

    model = trainer.begin(config).models["standard"]
    noise = generator(config.seed, "noise")
    order = torch.randperm(50, generator=generator(config.seed, "order", 0))
    bounds, tails = [], []
    for batch in order.split(20):
        x = trainer.data.train_images[batch] / 255
        weights = model.log_weights(x, draw_seed(generator=noise), 3)
        bounds.append(-weights.exp().mean(0).log())
        tails.append(sqloss.cvar(bounds[-1], 0.8) * len(x))
    standard, cvar = training.history
    assert standard["train_objective"] == pytest.approx(torch.cat(bounds).mean().item(), rel=1e-6)
    assert cvar["train_objective"] == pytest.approx(sum(tails).item() / 50, rel=1e-6)

    tested = evaluate(model, trainer.data, config.seed, iwae_samples=3)["negative_iw_bound"]
    assert standard["test_objective_standard"] == pytest.approx(tested.mean().item())
    assert standard["test_objective_cvar"] == pytest.approx(sqloss.cvar(tested, 0.8).item())


def test_a_run_interrupted_again_and_again_is_the_same(
    trainer, tmp_path, whole, assert_same_run, signalling
):
    parts = tmp_path / "parts"
    trainer.train(trainer.run(parts), signalling(1))
    for _ in range(3):
        trainer.train(Run.resumed(VAEConfig, parts, {}), signalling(3))
    trainer.train(Run.resumed(VAEConfig, parts, {}))
    assert_same_run(parts, whole)


def test_a_run_without_a_checkpoint_yet_starts_from_the_beginning(
    trainer, tmp_path, whole, assert_same_run
):
    parts = tmp_path / "parts"
    trainer.run(parts).start(trainer.begin(trainer.config), trainer.data)
    trainer.train(Run.resumed(VAEConfig, parts, {}))
    assert_same_run(parts, whole)


def test_checkpoints_are_saved_as_often_as_asked_and_at_the_end(trainer, tmp_path):
    config = changed(trainer.config, epochs=5, checkpoint_every=2)
    trainer.train(Run.new(tmp_path, config))
    names = [path.name for path in checkpoint.saved(tmp_path / "checkpoints")]
    assert names == ["epoch-0004.pt", "epoch-0005.pt"]


def test_the_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopSignal():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_ctrl_c_acts_at_once():
    # Not that of pytest's process: a shell that starts it in the background has it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_training_works_outside_the_main_thread(trainer, tmp_path, whole, assert_same_run):
    thread = threading.Thread(target=trainer.train, args=[trainer.run(tmp_path / "thread")])
    thread.start()
    thread.join()
    assert_same_run(tmp_path / "thread", whole)


@pytest.mark.parametrize("broken", ["weights", "loss"])
def test_a_loss_that_is_not_finite_stops_without_saving(broken, stops_without_saving):
    def breaks(training) -> None:
        if broken == "weights":
            next(training.models["cvar"].parameters()).data.fill_(float("nan"))
        else:
            training.objective_sums["cvar"] += float("inf")

    stops_without_saving(breaks, "smaller --lr")


@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.filterwarnings("error")
def test_what_to_do_where_a_loss_is_not_finite(trainer, tmp_path, backend):
    config = changed(trainer.config, backend=backend, lr=1e30, beta=2.0)

    def told() -> str:
        with pytest.raises(UserError) as raised:
            trainer.train(Run.new(tmp_path, config))
        return str(raised.value)

    assert (
        "after 1 epoch and 0 steps; expected a smaller --lr, got 1e+30, or another --beta, got 2"
        in told()
    )
    assert f"nothing was saved, and {tmp_path} is free for the next try" in told(), "so it is"


def test_the_objectives_of_the_run_are_measured_of_every_model(trainer, tmp_path):
    config = changed(trainer.config, epochs=1, alpha=0.75, tail_term="reconstruction", beta=3.0)
    training, _ = trainer.train(Run.new(tmp_path, config))
    for row, model in zip(training.history, training.models.values(), strict=True):
        losses = evaluate(model, trainer.data, seed=0)
        kl = 3 * losses["kl"].mean().item()
        mean, worst = losses["reconstruction"].mean(), losses["reconstruction"].topk(5).values
        assert row["test_objective_standard"] == pytest.approx(mean.item() + kl)
        assert row["test_objective_cvar"] == pytest.approx(worst.mean().item() + kl)


@pytest.mark.parametrize(("alpha", "models"), [(0.8, 2), (0.0, 1)])
def test_by_default_the_objectives_are_the_bound_and_its_tail(trainer, tmp_path, alpha, models):
    config = changed(trainer.config, epochs=1, alpha=alpha)
    training, _ = trainer.train(Run.new(tmp_path, config))
    assert len(training.history) == models
    for row in training.history:
        assert tuple(row) == USUAL
        assert row["test_objective_standard"] == pytest.approx(row["test_negative_elbo"])
        assert row["test_objective_cvar"] == pytest.approx(row["test_negative_elbo_cvar"])


def test_the_objective_of_an_epoch_is_averaged_over_its_samples(trainer, tmp_path):
    config = changed(trainer.config, epochs=1, lr=1e-30, alpha=0.0, beta=0.5)
    training, _ = trainer.train(Run.new(tmp_path, config))

    model = trainer.begin(config).models["standard"]
    noise = generator(config.seed, "noise")
    order = torch.randperm(50, generator=generator(config.seed, "order", 0))
    total = 0.0
    for batch in order.split(20):
        x = trainer.data.train_images[batch] / 255
        losses = model.losses(x, draw_seed(generator=noise))
        total += (losses["reconstruction"] + 0.5 * losses["kl"]).sum().item()
    assert training.history[0]["train_objective"] == pytest.approx(total / 50, rel=1e-6)


def test_the_evaluation_repeats_itself_and_is_the_bound(trainer, monkeypatch):
    model = trainer.begin(trainer.config).models["standard"]
    first = evaluate(model, trainer.data, seed=0)
    seed = draw_seed(generator=generator(0, "evaluation"))
    direct = model.losses(trainer.data.test_images / 255, seed)
    torch.testing.assert_close(first["kl"], direct["kl"].double())
    torch.testing.assert_close(
        first["negative_elbo"], (direct["reconstruction"] + direct["kl"]).double()
    )
    monkeypatch.setattr("sqloss.training.vae.evaluation.BATCH_SIZE", 7)
    again = evaluate(model, trainer.data, seed=0)
    torch.testing.assert_close(first, again)


def test_the_history_has_a_row_per_epoch_and_model(trainer, tmp_path):
    training, finished = trainer.train(trainer.run(tmp_path))
    assert finished
    rows = [(row["epoch"], row["model"]) for row in training.history]
    assert rows == [(epoch, name) for epoch in (1, 2, 3, 4) for name in ("standard", "cvar")]
    last = training.history[-1]
    assert last["test_negative_elbo"] == pytest.approx(
        last["test_reconstruction"] + last["test_kl"]
    )
    assert last["test_negative_elbo_cvar"] > last["test_negative_elbo"]
