import dataclasses
import math
import re

import pytest
import torch

from sqloss.common.errors import UserError
from sqloss.common.flags import changed
from sqloss.datasets.digits import Digits
from sqloss.models.mixture_fit import fit_mixture
from sqloss.student_t import draw_seed
from sqloss.training.saved_run import load_saved_run
from sqloss.training.trainers import VAE
from sqloss.training.vae import priors
from sqloss.training.vae.bounds import BoundsConfig, bounds_table, estimate, measure_bounds
from sqloss.training.vae.evaluation import evaluate, importance_weighted
from sqloss.training.vae.loop import build_model
from sqloss.training.vae.priors import (
    PriorConfig,
    TrainedModel,
    fitted_prior,
    posteriors,
    prior_of,
    read_prior,
)

pytest.importorskip("scipy.stats")
pytest.importorskip("sklearn")

FAMILIES = {"normal": {}, "t": {"prior": "t", "df": 3.0}, "wild": {"prior": "t", "df": 1.5}}
COMMUNITIES, MIXTURE = PriorConfig("communities"), PriorConfig("mixture", components=4)


@pytest.fixture
def groups(monkeypatch, trainer) -> torch.Tensor:
    """The communities, given: all that the fit needs of them."""
    given = torch.arange(len(trainer.data)) % 5 // 2
    monkeypatch.setattr(priors, "communities", lambda *_, **__: given)
    return given


@pytest.fixture(params=FAMILIES)
def trained(trainer, groups, tmp_path, request) -> TrainedModel:
    config = changed(trainer.config, **FAMILIES[request.param])
    model = build_model(config, trainer.data.shape)
    return TrainedModel(tmp_path, "cvar", model, trainer.data, 0, "4 epochs and 0 steps")


def test_the_prior_is_fitted_to_the_posteriors_of_the_training_images(trained, groups):
    fitted = fitted_prior(trained, COMMUNITIES)
    assert torch.equal(fitted.groups, groups)
    posterior = trained.model.encode(trained.data.train_images / 255)
    scale = (posterior.logvar.double() / 2).exp()
    df = getattr(posterior, "df", math.inf)
    expected = fit_mixture(posterior.loc, scale, groups, df=df).state_dict()
    for name, value in fitted.mixture.state_dict().items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("config", [COMMUNITIES, MIXTURE], ids=lambda config: config.prior)
def test_a_stored_prior_is_taken_up_and_another_power_is_no_other_fit(trained, config, monkeypatch):
    if config is MIXTURE and trained.model.df == 1.5:
        with pytest.raises(UserError, match="--prior: expected standard or communities for latent"):
            fitted_prior(trained, config)
        return
    first = fitted_prior(trained, config)
    monkeypatch.setattr(priors, "fit", pytest.fail)
    again = fitted_prior(trained, dataclasses.replace(config, power=1.5))
    assert torch.equal(again.groups, first.groups)
    assert again.mixture.power == 0
    for name, value in first.mixture.state_dict().items():
        assert torch.equal(value, again.mixture.state_dict()[name])


def test_a_prior_of_other_weights_or_data_is_fitted_anew(trained):
    fitted_prior(trained, COMMUNITIES)
    [path] = (trained.directory / "priors").iterdir()
    before = path.read_bytes()
    with torch.no_grad():
        next(trained.model.parameters()).add_(0.1)
    fitted_prior(trained, COMMUNITIES)
    after = path.read_bytes()
    assert after != before
    other = dataclasses.replace(
        trained.data, train_labels=1 - trained.data.train_labels.clamp(max=1)
    )
    fitted_prior(dataclasses.replace(trained, data=other), COMMUNITIES)
    assert path.read_bytes() != after
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing else is left"


def test_a_prior_whose_communities_another_library_found_is_fitted_anew(
    trained, monkeypatch, capsys
):
    for library, told in (
        ("one", ""),
        ("another", "found by one, here it is another"),
        ("another", ""),
    ):
        monkeypatch.setattr(priors, "library", lambda library=library: library)
        fitted_prior(trained, COMMUNITIES)
        assert told in capsys.readouterr().err if told else not capsys.readouterr().err
        [path] = (trained.directory / "priors").iterdir()
        assert fitted_from(path)["library"] == library
    state = torch.load(path, weights_only=True)
    del state["fitted_from"]["library"]  # as those of before there was it
    torch.save(state, path)
    fitted_prior(trained, COMMUNITIES)
    assert fitted_from(path)["library"] == "another"


def test_other_settings_are_another_file(trained):
    fitted_prior(trained, COMMUNITIES)
    fitted_prior(trained, PriorConfig("communities", neighbours=5, resolution=0.5))
    names = {path.name for path in (trained.directory / "priors").iterdir()}
    assert names == {
        "communities-cvar-neighbours-10-resolution-1.pt",
        "communities-cvar-neighbours-5-resolution-0.5.pt",
    }


@pytest.mark.parametrize("break_it", ["cut", "bit", "format", "code"])
def test_an_unreadable_prior_is_told_and_runs_no_code(trained, break_it):
    fitted_prior(trained, COMMUNITIES)
    [path] = (trained.directory / "priors").iterdir()
    content = bytearray(path.read_bytes())
    if break_it == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif break_it == "bit":
        weights = content.index(fitted_from(path)["weights"].encode())
        content[weights] ^= 1
        path.write_bytes(content)
    elif break_it == "format":
        torch.save(torch.load(path, weights_only=True) | {"format": 2}, path)
    else:
        torch.save(Code(trained.directory / "made"), path)
    with pytest.raises(UserError, match=f"cannot read the prior {re.escape(str(path))}.*delete it"):
        fitted_prior(trained, COMMUNITIES)
    assert not (trained.directory / "made").exists()


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (self.path.touch, ())


def fitted_from(path) -> dict:
    return read_prior(path)[0]


def test_what_a_prior_was_fitted_from(trained):
    fitted_prior(trained, PriorConfig("communities", power=1.5))
    [path] = (trained.directory / "priors").iterdir()
    stored = fitted_from(path)
    assert stored["model"] == "cvar"
    assert stored["trained_for"] == "4 epochs and 0 steps"
    assert stored["data"] == trained.data.fingerprint()
    assert (stored["prior"], stored["neighbours"], stored["resolution"]) == ("communities", 10, 1.0)
    assert "power" not in stored and "components" not in stored


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"prior": "flow"}, "--prior: expected one of standard, communities, mixture, got flow"),
        ({"power": 1.0}, "--power: expected --prior communities or mixture with it"),
        ({"prior": "communities", "power": -1.0}, "--power: expected a number from 0 up, got -1"),
        ({"prior": "communities", "power": math.nan}, "--power: expected a number from 0 up"),
        ({"prior": "mixture", "neighbours": 5}, "--neighbours: expected --prior communities"),
        ({"prior": "communities", "neighbours": 0}, "--neighbours: expected a whole number from 1"),
        ({"prior": "communities", "resolution": 0.0}, "--resolution: expected a number above 0"),
        ({"prior": "communities", "components": 5}, "--components: expected --prior mixture"),
        ({"prior": "mixture", "components": 0}, "--components: expected a whole number from 1"),
    ],
)  # fmt: skip
def test_what_is_no_prior(settings, told):
    with pytest.raises(UserError, match=re.escape(told)):
        PriorConfig(**settings)


def test_what_cannot_be_fitted(trained):
    with pytest.raises(UserError, match="--components: expected fewer than the 50 training images"):
        priors.fit_without_communities(*posteriors(trained.model, trained.data)[:2], 5.0, 50, 0)
    with torch.no_grad():
        next(trained.model.parameters()).fill_(math.nan)
    with pytest.raises(UserError, match="--prior communities: expected finite loc"):
        fitted_prior(trained, COMMUNITIES)


def test_communities_are_found_in_the_encoders_means(trainer, tmp_path):
    """Without a stand-in: images of two kinds come to lie in components of their own."""
    kinds = torch.arange(60) % 6 == 0
    images = torch.where(kinds[:, None, None, None], 255, 0).to(torch.uint8).repeat(1, 1, 4, 3)
    noise = torch.randint(
        20, images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    images = torch.where(kinds[:, None, None, None], images - noise, images + noise)
    data = dataclasses.replace(trainer.data, train_images=images, train_labels=kinds.long())
    model = build_model(trainer.config, data.shape)
    trained = TrainedModel(tmp_path, "standard", model, data, 0, "nothing")
    settings = PriorConfig("communities", neighbours=4, resolution=0.3)
    found = fitted_prior(trained, settings)
    assert not set(found.groups[kinds].tolist()) & set(found.groups[~kinds].tolist())
    assert found.mixture.sizes.sum() == 60


# what the losses are under it


def test_losses_and_bounds_under_a_prior(trained):
    prior, data = fitted_prior(trained, COMMUNITIES).mixture, trained.data
    own, under = (evaluate(trained.model, data, 0, prior=p) for p in (None, prior))
    assert torch.equal(own["reconstruction"], under["reconstruction"])
    rows = torch.arange(len(data.test_images))
    found = importance_weighted(trained.model, data.test_images, rows, 0, 60, prior=prior)
    assert (found["negative_iw_bound"] <= found["negative_elbo"] + 1e-9).all()
    if trained.model.df != 1.5:
        # Means over the images, by one draw of each and by sixty
        single, many = estimate(under["negative_elbo"]), found["negative_elbo"].mean().item()
        assert single["mean"] == pytest.approx(many, abs=6 * single["standard_error"])


@pytest.fixture
def run(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(Digits, "read", lambda *_: trainer.data)
    trainer.config = changed(trainer.config, epochs=1)
    trainer.train(trainer.run(tmp_path))
    return tmp_path


def test_the_bounds_of_a_run_under_a_prior(trainer, groups, run):
    trained, plain = load_saved_run(VAE, run, {}), BoundsConfig(7)
    without = measure_bounds(trained, plain)
    config = PriorConfig("communities", power=1.0)
    mixtures = {
        name: prior_of(trained, run, name, config).mixture.with_power(1) for name in trained.models
    }
    measured = measure_bounds(trained, plain, mixtures, config.in_words)
    rows = torch.arange(20)
    for name, model in trained.models.items():
        found = dict(measured["models"][name])
        under = found.pop("under_prior")
        assert found == without["models"][name], "nothing else is changed by it"
        expected = importance_weighted(
            model, trainer.data.test_images, rows, 0, 7, prior=mixtures[name]
        )
        own = importance_weighted(model, trainer.data.test_images, rows, 0, 7)
        for bound, values in expected.items():
            assert under[bound] == estimate(values)
            assert under[f"change_of_{bound}"] == estimate(values - own[bound])
    table = bounds_table(measured)
    assert "-IW-7 bound, communities, power 1" in table
    assert "communities" not in bounds_table(without)


def test_a_prior_belongs_to_its_model(trained):
    prior = fitted_prior(trained, COMMUNITIES).mixture.with_power(1)
    seed = draw_seed(generator=torch.Generator().manual_seed(0))
    assert trained.model.sample(9, seed, prior=prior).shape == (9, 1, 4, 3)
