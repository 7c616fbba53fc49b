"""Trainings on the regret against the model of another run."""

import json
import shutil

import pytest
import torch

import sqloss
from sqloss import cli
from sqloss.common.errors import UserError
from sqloss.common.flags import changed, configure
from sqloss.models import VAE
from sqloss.models.seeding import generator
from sqloss.training.vae.backends import Batch, Torch
from sqloss.training.vae.config import VAEConfig
from sqloss.training.vae.evaluation import evaluate
from sqloss.training.vae.loop import VAETraining

TINY = ["--train-limit", "60", "--hidden", "4", "--latent", "2", "--num-samples", "20"]
TINY += ["--epochs", "2", "--batch-size", "20"]


def make(seed, latent=2):
    torch.manual_seed(seed)
    return VAE((1, 4, 3), (5,), latent).double()


@pytest.mark.parametrize(
    ("term", "backward"), [("elbo", "dense"), ("elbo", "tail"), ("reconstruction", "dense")]
)
def test_a_step_is_on_the_difference_at_the_same_draws(term, backward):
    config = configure(VAEConfig, alpha=0.6, beta=0.5, tail_term=term, backward=backward)
    x, rows = torch.rand(30, 1, 4, 3, dtype=torch.float64), torch.arange(30)
    model, reference, seed = make(0), make(1, latent=3), torch.tensor(7)
    optimiser = Torch(model, config.risk, config, reference.requires_grad_(False))
    value = optimiser.step(Batch(x, rows, 30), seed)
    gradients = [parameter.grad for parameter in model.parameters()]

    same = make(0)
    own, others = (each.losses(x, seed, rows=rows) for each in (same, reference))
    regret = {name: own[name] - others[name].detach() for name in own}
    if term == "elbo":
        plain = sqloss.cvar(regret["reconstruction"] + 0.5 * regret["kl"], 0.6)
    else:
        plain = sqloss.cvar(regret["reconstruction"], 0.6) + 0.5 * regret["kl"].mean()
    plain.backward()
    torch.testing.assert_close(value, plain.detach())
    torch.testing.assert_close(gradients, [parameter.grad for parameter in same.parameters()])
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_a_model_has_no_regret_against_itself():
    config = configure(VAEConfig, alpha=0.6)
    optimiser = Torch(make(0), config.risk, config, make(0).requires_grad_(False))
    x = torch.rand(30, 1, 4, 3, dtype=torch.float64)
    assert optimiser.step(Batch(x, torch.arange(30), 30), torch.tensor(7)) == 0


def test_the_standard_model_is_trained_as_without(trainer):
    torch.manual_seed(3)
    reference = VAE(trainer.data.shape, (5,), 3).requires_grad_(False)
    config = changed(trainer.config, alpha=0.5)
    trainings = [
        VAETraining(trainer.begin(config).models["standard"], config, r) for r in (None, reference)
    ]
    for training in trainings:
        training.noise = generator(0, "noise")
        training.train_step((trainer.data.train_images, trainer.data.train_labels))
    plain, against = ({n: m.state_dict() for n, m in t.models.items()} for t in trainings)
    assert all(torch.equal(plain["standard"][n], against["standard"][n]) for n in plain["standard"])
    assert any(not torch.equal(plain["cvar"][n], against["cvar"][n]) for n in plain["cvar"])
    row, _ = trainings[1].measure(trainer.data)
    tested, of_reference = (
        evaluate(model, trainer.data, config.seed)["negative_elbo"]
        for model in (trainings[1].models["standard"], reference)
    )
    expected = sqloss.cvar(tested - of_reference, 0.5).item()
    assert row["test_objective_cvar"] == pytest.approx(expected)
    assert row["test_objective_standard"] == pytest.approx(tested.mean().item())


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"alpha": 0.0}, "--reference: expected none with --alpha 0, as a constant moves no mean"),
        ({"risk": "mean"}, "--reference: expected none with --risk mean"),
        ({"backend": "numpy"}, "--reference: expected none with --backend numpy, got runs/one"),
    ],
)
def test_what_it_does_not_go_with(given, error):
    with pytest.raises(UserError, match=error):
        configure(VAEConfig, reference="runs/one", **given)


def test_the_words():
    given = {"reference": "/runs/one", "alpha": 0.8}
    for more, words in (
        ({}, "CVaR 0.8 of regret against one, by -ELBO"),
        ({"beta": 2.0}, "CVaR 0.8 of regret against one, by (reconstruction + 2 KL)"),
        ({"iwae_samples": 5}, "CVaR 0.8 of regret against one, by -IW-5 bound"),
        (
            {"tail_term": "reconstruction"},
            "CVaR 0.8 of regret against one, by reconstruction + mean of KL",
        ),
    ):
        assert configure(VAEConfig, **given, **more).objective_names["cvar"] == words
    assert configure(VAEConfig, **given).objective_names["standard"] == "mean of -ELBO"


def test_a_run_against_another(tmp_path, monkeypatch, quick_reports, assert_same_run, capsys):
    for needed in ("matplotlib", "scipy", "sklearn", "tqdm"):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["vae", *TINY, "--alpha", "0", "--output-dir", "one"]) == 0
    line = ["vae", *TINY, "--reference", "one", "--risk", "cvar", "--latent", "3"]
    assert cli.main([*line, "--output-dir", "whole"]) == 0
    report = (tmp_path / "whole" / "report.md").read_text()
    assert f"--reference {tmp_path / 'one'}" in report
    assert report.count("CVaR 0.8 of regret against one, by -ELBO") >= 3  # and a row of the table
    made = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert "objective_cvar" in made["models"]["standard"]["test"]

    assert cli.main([*line, "--epochs", "1", "--output-dir", "resumed"]) == 0
    monkeypatch.chdir(tmp_path / "one")
    assert cli.main(["vae", "--resume", "../resumed", "--epochs", "2"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")

    def refused(*arguments):
        capsys.readouterr()
        assert cli.main(["vae", *arguments]) == 2
        return capsys.readouterr().err

    resume = ["--resume", str(tmp_path / "resumed"), "--epochs", "3"]
    assert cli.main(["vae", "--resume", str(tmp_path / "one"), "--epochs", "3"]) == 0
    assert "--reference: expected a model with the hash" in refused(*resume)
    monkeypatch.chdir(tmp_path)
    shutil.move("one", "elsewhere")
    error = refused(*resume)
    assert f"--reference: expected the directory of a run, with a config.json, got {tmp_path}" in (
        error
    )
    line[line.index("one")] = "elsewhere"
    assert "--reference: expected a run on images of 1 x 16 x 16, got 1 x 8 x 8" in refused(
        *line[1:], "--image-size", "16", "--output-dir", "larger"
    )
