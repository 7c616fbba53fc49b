import pytest
import torch

from sqloss.common.errors import UserError
from sqloss.common.flags import configure
from sqloss.models.gan_losses import GAN_LOSSES
from sqloss.training.config import from_stored, to_stored
from sqloss.training.gan.config import GANConfig


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("alpha", 1.0, "a number in [0, 1)"),
        ("epochs", 0, "a whole number from 1 to 2147483647"),
        ("batch_size", 0, "a whole number from 1 to 2147483647"),
        ("num_samples", 1, "a whole number from 2 to 2147483647"),
        ("tail_player", "all", "one of d, g, both"),
        ("loss", "vanilla", f"one of {', '.join(GAN_LOSSES)}"),
        ("info_codes", -1, "a whole number from 0 to 2147483647"),
        ("info_weight", -0.1, "a number from 0 up"),
        ("info_weight", float("inf"), "a number from 0 up"),
        ("gp_weight", -1.0, "a number from 0 up"),
        ("gp_weight", float("nan"), "a number from 0 up"),
        ("d_steps", 0, "a whole number from 1 to 2147483647"),
        ("g_steps", 0, "a whole number from 1 to 2147483647"),
        ("lr_d", 0.0, "a number above 0"),
        ("lr_g", -1.0, "a number above 0"),
        ("lr_g", float("inf"), "a number above 0"),
        ("beta1", 1.0, "a number in [0, 1)"),
        ("beta1", -0.5, "a number in [0, 1)"),
        ("ema", 1.0, "a number in [0, 1)"),
        ("ema", float("nan"), "a number in [0, 1)"),
        ("width", 0, "a whole number from 1 to 2147483647"),
        ("latent", 2**31, "a whole number from 1 to 2147483647"),
    ],
)
def test_a_bad_value_names_its_flag_what_is_expected_and_what_came(name, value, expected):
    with pytest.raises(UserError) as raised:
        configure(GANConfig, **{name: value})
    assert str(raised.value) == f"--{name.replace('_', '-')}: expected {expected}, got {value}"


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        ({"gp_weight": 1.0}, "--gp-weight: expected --loss wgan-gp with it"),
        ({"gp_weight": 1.0, "loss": "hinge"}, "--gp-weight: expected --loss wgan-gp with it"),
        ({"info_weight": 2.0}, "--info-weight: expected --info-codes above 0 with it"),
        (
            {"tail_player": "d", "alpha": 0.0},
            "--tail-player: expected another risk than the mean with it",
        ),
    ],
)
def test_a_flag_without_effect(values, needed):
    with pytest.raises(UserError) as raised:
        configure(GANConfig, **values)
    assert str(raised.value) == f"{needed}, got none"


def test_flags_with_effect():
    configure(GANConfig, gp_weight=1.0, loss="wgan-gp")
    configure(GANConfig, info_weight=2.0, info_codes=1)
    configure(GANConfig, tail_player="d", alpha=0.5)


@pytest.mark.parametrize(
    ("tail_player", "tails", "words"),
    [
        ("d", "d", "CVaR 0.75 of the discriminator's and the mean of the generator's losses"),
        ("g", "g", "mean of the discriminator's and the CVaR 0.75 of the generator's losses"),
        (
            "both",
            "dg",
            "CVaR 0.75 of the discriminator's and the CVaR 0.75 of the generator's losses",
        ),
    ],
)
def test_the_risks_are_those_of_the_words(tail_player, tails, words):
    config = configure(GANConfig, alpha=0.75, tail_player=tail_player)
    losses = torch.arange(8.0)
    mean, tail = losses.mean().item(), 6.5  # the worst two of eight
    risks = {of: risk(losses).item() for of, risk in config.risks_of_losses(config.risk).items()}
    of_d, of_g = (tail if player in tails else mean for player in ("d", "g"))
    assert risks == {"real": of_d, "fake": of_d, "g": of_g}
    assert config.risk_names["cvar"] == words

    of_mean = config.risks_of_losses(config.risks["standard"]).values()
    assert [risk(losses).item() for risk in of_mean] == [mean] * 3
    expected = "mean of the discriminator's and the mean of the generator's losses"
    assert config.risk_names["standard"] == expected


def test_files_are_found_from_every_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = configure(GANConfig, classifier="judge.pt", fid_weights="~/inception.pth")
    assert config.fid_weights_file == tmp_path / "home" / "inception.pth"
    stored = to_stored(config)
    assert stored["classifier"] == str(tmp_path / "judge.pt")
    assert stored["fid_weights"] == str(tmp_path / "home" / "inception.pth")
    monkeypatch.chdir("/")
    assert from_stored(stored, GANConfig).classifier_file == tmp_path / "judge.pt"


def test_without_files_there_are_none():
    stored = to_stored(GANConfig())
    assert (stored["classifier"], stored["fid_weights"]) == ("", "")
    config = from_stored(stored, GANConfig)
    assert (config.classifier_file, config.fid_weights_file) == (None, None)
