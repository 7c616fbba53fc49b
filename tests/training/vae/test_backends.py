"""Steps on the tail alone, and on microbatches, against steps on all images at once."""

import pytest
import torch

from sqloss.common.flags import changed, configure
from sqloss.models import VAE
from sqloss.training.run import Run
from sqloss.training.vae.backends import Batch, Losses, Torch, tail_pays
from sqloss.training.vae.config import VAEConfig

VARIANTS = {
    "normal": {},
    "t": {"prior": "t", "df": 3.0, "beta": 0.5},
    "learnt df": {"prior": "t", "learn_df": True},
    "importance-weighted": {"iwae_samples": 3},
    "conv": {"architecture": "conv", "channels": "2,3"},
}
# Sums of float32 in another order differ by some 1e-7, of which Adam, that divides gradients by
# their size, makes more in the smallest: up to 4e-6 here. Models differ by 1e-3 and more.
ROUNDING = {"rel": 1e-4}


def train(trainer, directory, **changes):
    config = changed(trainer.config, lr=0.02, **changes)
    training, _ = trainer.train(Run.new(directory, config))
    return training


def assert_curves_agree(first, second):
    assert len(first.history) == len(second.history) > 0
    for a, b in zip(first.history, second.history, strict=True):
        assert (a.pop("epoch"), a.pop("model")) == (b.pop("epoch"), b.pop("model"))
        assert a == pytest.approx(b, **ROUNDING)


def takes_tail(training):
    return {name: each.takes_tail for name, each in training.optimisers.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tail_alone_trains_as_all_images_do(trainer, tmp_path, variant, assert_same):
    dense = train(trainer, tmp_path / "dense", backward="dense", **VARIANTS[variant])
    tail = train(trainer, tmp_path / "tail", backward="tail", **VARIANTS[variant])
    assert takes_tail(dense) == {"standard": False, "cvar": False}
    assert takes_tail(tail) == {"standard": False, "cvar": True}
    assert_curves_agree(dense, tail)
    models = [training.models["standard"].state_dict() for training in (dense, tail)]
    assert_same(*models)
    standard, cvar = dense.latest_rows()
    assert cvar["test_objective_cvar"] != pytest.approx(standard["test_objective_cvar"], rel=1e-3)


def test_gradients_are_those_of_all_images():
    """In float64, where nothing but the method could make them differ."""
    config = configure(VAEConfig, backward="tail", hidden="8", latent=3)
    x, seed = torch.rand(50, 1, 4, 3, dtype=torch.float64), torch.tensor(7)
    grads = []
    for changes in ({"backward": "dense"}, {}, *({"microbatch_size": n} for n in (1, 7, 99))):
        torch.manual_seed(0)
        model = VAE((1, 4, 3), (8,), 3).double()
        optimiser = Torch(model, config.risk, changed(config, **changes))
        value = optimiser.step(Batch(x, torch.arange(50), 50), seed)
        grads.append([value, *(parameter.grad for parameter in model.parameters())])
    assert all(grad.abs().max() > 0 for grad in grads[0])
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 20, 1000])
@pytest.mark.parametrize("variant", ["normal", "learnt df"])
def test_microbatches_train_as_whole_batches_do(trainer, tmp_path, size, variant, monkeypatch):
    seen = []
    forward = Losses.forward

    def recorded(self, x, seed, rows):
        seen.append(len(x))
        return forward(self, x, seed, rows)

    whole = train(trainer, tmp_path / "whole", backward="dense", **VARIANTS[variant])
    monkeypatch.setattr(Losses, "forward", recorded)
    parts = train(trainer, tmp_path / "parts", microbatch_size=size, **VARIANTS[variant])
    assert takes_tail(parts) == {"standard": False, "cvar": True}
    assert max(seen) == min(size, 20)
    assert_curves_agree(whole, parts)


def test_a_mean_has_microbatches_whatever_its_tail_would_be(trainer, tmp_path):
    mean = {"alpha": 0.0, "tail_term": "reconstruction", "beta": 2.0}
    whole = train(trainer, tmp_path / "whole", **mean)
    assert_curves_agree(whole, train(trainer, tmp_path / "parts", microbatch_size=6, **mean))


@pytest.mark.parametrize(
    ("changes", "takes"),
    [
        ({}, False),
        ({"batch_size": 256}, True),
        ({"batch_size": 256, "alpha": 0.5}, False),
        ({"alpha": 0.99}, True),
        ({"batch_size": 32, "architecture": "conv"}, True),
        ({"batch_size": 16, "iwae_samples": 50}, True),
        ({"batch_size": 16, "microbatch_size": 4}, True),
        ({"batch_size": 16, "backward": "tail"}, True),
        ({"batch_size": 256, "backward": "dense"}, False),
        ({"batch_size": 256, "tail_term": "reconstruction"}, False),
    ],
)
def test_auto_takes_the_tail_where_it_pays(changes, takes):
    config = configure(VAEConfig, **changes)
    model = VAE((1, 28, 28), architecture=config.architecture)
    assert Torch(model, config.risk, config).takes_tail == takes
    assert not Torch(model, config.risks["standard"], config).takes_tail


def test_auto_takes_all_of_small_images():
    assert not Torch(VAE((1, 8, 8)), VAEConfig().risk, VAEConfig()).takes_tail
    assert not tail_pays(10**15, alpha=0.33)  # 1 + 3 (1 - alpha) is more than 3
    assert tail_pays(10**15, alpha=0.34)
