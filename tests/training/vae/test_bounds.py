import dataclasses
import json
import math

import pytest
import torch

from sqloss.common.errors import UserError
from sqloss.common.flags import changed
from sqloss.datasets.digits import Digits
from sqloss.models.seeding import generator
from sqloss.student_t import draw_seed
from sqloss.training.saved_run import load_saved_run
from sqloss.training.trainers import VAE
from sqloss.training.vae import evaluation
from sqloss.training.vae.bounds import (
    BoundsConfig,
    bounds_table,
    estimate,
    measure_bounds,
    write_bounds,
)
from sqloss.training.vae.evaluation import evaluate, importance_weighted, largest_layer
from sqloss.training.vae.loop import build_model

scipy_stats = pytest.importorskip("scipy.stats")

FAMILIES = {
    "normal": {},
    "t": {"prior": "t", "df": 3.0},
    "learnt df": {"prior": "t", "learn_df": True, "architecture": "conv", "channels": "2"},
}


@pytest.fixture(params=FAMILIES)
def model(trainer, request):
    config = changed(trainer.config, **FAMILIES[request.param])
    return build_model(config, trainer.data.shape)


def bounds(model, data, num_samples, rows=None) -> dict[str, torch.Tensor]:
    rows = torch.arange(len(data.test_images)) if rows is None else rows
    return importance_weighted(model, data.test_images, rows, 0, num_samples)


@pytest.mark.parametrize("num_samples", [1, 7, 50, 120])
def test_the_bounds_are_those_of_all_weights_at_once(trainer, model, num_samples):
    x, rows = trainer.data.test_images / 255, torch.arange(20)
    weights = torch.cat(
        [
            model.log_weights(x, draw_seed(generator=draws), count, rows=rows)
            for count, draws in (
                (min(50, num_samples - first), generator(0, "importance weights", first))
                for first in range(0, num_samples, 50)
            )
        ]
    ).double()
    found = bounds(model, trainer.data, num_samples)
    torch.testing.assert_close(found["negative_elbo"], -weights.mean(0))
    torch.testing.assert_close(
        found["negative_iw_bound"], math.log(num_samples) - weights.logsumexp(0)
    )
    assert (found["negative_iw_bound"] <= found["negative_elbo"] + 1e-9).all(), "as Jensen has it"


@pytest.mark.parametrize("values", [1, 2000, 10**9])
def test_the_bounds_do_not_depend_on_how_many_images_are_decoded_at_once(
    trainer, model, monkeypatch, values
):
    expected = bounds(model, trainer.data, 60)
    seen = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda z: seen.append(z.shape[:2].numel()) or decode(z))
    monkeypatch.setattr(evaluation, "VALUES_AT_ONCE", values)
    torch.testing.assert_close(bounds(model, trainer.data, 60), expected)
    # never less than one image, whose draws come fifty at a time
    assert max(seen) * largest_layer(model) <= max(values, 50 * largest_layer(model))


def test_an_images_bounds_do_not_depend_on_the_other_images(trainer, model):
    rows = torch.tensor([17, 3, 11])
    everything, some = bounds(model, trainer.data, 10), bounds(model, trainer.data, 10, rows)
    for name in everything:
        torch.testing.assert_close(some[name], everything[name][rows])


def test_the_bound_of_the_training_is_this_one(trainer, model):
    losses = evaluate(model, trainer.data, 0, iwae_samples=5)
    found = bounds(model, trainer.data, 5)["negative_iw_bound"]
    assert torch.equal(losses["negative_iw_bound"], found)


def test_the_largest_layer(trainer):
    config = changed(trainer.config, hidden="30,8")
    assert largest_layer(build_model(config, (1, 4, 3))) == 30
    assert largest_layer(build_model(config, (3, 4, 4))) == 48
    conv = changed(config, architecture="conv", channels="8,16", hidden="5")
    assert largest_layer(build_model(conv, (1, 8, 8))) == 8 * 4 * 4


def test_an_estimate_has_the_interval_of_students_t():
    values = torch.randn(15, generator=torch.Generator().manual_seed(0)).double()
    found = estimate(values)
    reference = scipy_stats.ttest_1samp(values.numpy(), 0.0).confidence_interval(0.95)
    assert found["mean"] == pytest.approx(values.mean().item())
    assert found["standard_error"] == pytest.approx(scipy_stats.sem(values.numpy()))
    assert (found["low"], found["high"]) == pytest.approx((reference.low, reference.high))


def test_an_estimate_of_one_image_has_no_interval():
    assert estimate(torch.tensor([3.0])) == {
        "mean": 3.0, "standard_error": None, "low": None, "high": None
    }  # fmt: skip


# of a run


@pytest.fixture
def run(trainer, tmp_path, monkeypatch):
    """A run whose data set is the trainer's."""
    monkeypatch.setattr(Digits, "read", lambda *_: trainer.data)
    trainer.config = changed(trainer.config, epochs=2, prior="t", learn_df=True)
    trainer.train(trainer.run(tmp_path))
    return tmp_path


def contents(directory) -> dict:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_trained_run_is_loaded_as_it_is(trainer, run):
    before = contents(run)
    trained = load_saved_run(VAE, run, {"threads": 1})
    assert contents(run) == before
    assert (trained.done, trained.config.threads) == ("2 epochs and 0 steps", 1)
    state = torch.load(run / "checkpoints" / "epoch-0002.pt", weights_only=True)
    for name, model in trained.models.items():
        for key, value in model.state_dict().items():
            assert torch.equal(value, state["models"][name][key])


def test_what_cannot_be_loaded(trainer, run, tmp_path):
    with pytest.raises(UserError, match="RUN_DIR: expected the directory of a run, with a config"):
        load_saved_run(VAE, tmp_path / "nothing", {})
    trainer.data = dataclasses.replace(trainer.data, test_images=trainer.data.train_images[:20])
    with pytest.raises(UserError, match="--data-dir: expected the data that"):
        load_saved_run(VAE, run, {})
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"RUN_DIR: expected a run with a checkpoint, got .*yet"):
        load_saved_run(VAE, run, {})


def test_the_bounds_of_a_run(trainer, run):
    trained = load_saved_run(VAE, run, {})
    measured = measure_bounds(trained, BoundsConfig(30))
    write_bounds(run, measured)
    stored = json.loads((run / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert stored == measured
    assert stored["trained_for"] == "2 epochs and 0 steps"
    assert (stored["images"], stored["iwae_samples"]) == (20, 30)
    assert list(stored["models"]) == ["standard", "cvar"]
    for name, model in trained.models.items():
        found = bounds(model, trainer.data, 30)
        for bound, values in found.items():
            assert stored["models"][name][bound] == estimate(values)
        assert stored["models"][name]["df"] == model.df.item()
    table = bounds_table(stored)
    low, high = (stored["models"]["cvar"]["negative_iw_bound"][end] for end in ("low", "high"))
    assert f"[{low:.2f}, {high:.2f}]" in table
    assert "-IW-30 bound" in table
    assert "learnt df" in table


def test_some_images_are_the_same_for_every_run(trainer, run):
    trained = load_saved_run(VAE, run, {})
    measured = []
    for seed in (0, 0, 1):
        config = dataclasses.replace(trained.config, seed=seed)
        trained_so = dataclasses.replace(trained, config=config)
        measured.append(measure_bounds(trained_so, BoundsConfig(4, images=6)))
    assert measured[0] == measured[1] != measured[2]
    assert measured[0]["images"] == 6
    alone = bounds_table(measure_bounds(trained, BoundsConfig(4, images=1)))
    assert alone.count(" - |") == 8, "neither error nor interval, of two bounds and two models"
    chosen = torch.randperm(20, generator=generator(0, "evaluated images"))[:6].sort().values
    found = bounds(trained.models["cvar"], trainer.data, 4, chosen)
    assert measured[0]["models"]["cvar"]["negative_elbo"] == estimate(found["negative_elbo"])
