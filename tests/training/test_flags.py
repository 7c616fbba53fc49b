"""Flags that were renamed: the old name works for one release, and for ever in ``config.json``."""

import dataclasses
import json

import pytest

from sqloss import cli
from sqloss.common.errors import UserError
from sqloss.common.flags import as_flag, changed, configure, flag, flat, renamed, settings_of
from sqloss.experiments.sweep import parse_grids
from sqloss.training.config import from_stored, to_stored
from sqloss.training.gan.config import GANConfig
from sqloss.training.run import Run
from sqloss.training.samplers import SAMPLERS, Shuffle
from sqloss.training.vae.config import VAEConfig

# Command, former flag, the arguments, today's setting and its value.
RENAMED = [
    ("vae", "--alone", [], "no_baseline", True),
    ("vae", "--limit", ["100"], "train_limit", 100),
    ("vae", "--tail", ["reconstruction"], "tail_term", "reconstruction"),
    ("gan", "--tail-of", ["d"], "tail_player", "d"),
    ("gan", "--penalty", ["2.5"], "gp_weight", 2.5),
    ("sweep vae", "--limit", ["100"], "train_limit", 100),
    ("impute --compare", "--tail", ["reconstruction"], "tail_term", "reconstruction"),
]


def parsed(command: str, *flags: str) -> dict[str, object]:
    return vars(cli.parser().parse_args([*command.split(), *flags]))


@pytest.mark.parametrize(("command", "former", "value", "name", "expected"), RENAMED)
def test_a_former_flag_does_what_the_new_one_does(capsys, command, former, value, name, expected):
    by_former = parsed(command, former, *value)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"sqloss: warning: {former} is now {as_flag(name)};")
    by_new = parsed(command, as_flag(name), *value)
    assert capsys.readouterr().err == ""
    assert str(by_former) == str(by_new)
    assert by_new[name] == expected


def test_all_of_them_are_tested():
    tested = {former.lstrip("-").replace("-", "_"): name for _, former, _, name, _ in RENAMED}
    assert tested == renamed(VAEConfig) | renamed(GANConfig)


@pytest.mark.parametrize("command", ["vae", "gan", "sweep vae", "sweep gan", "impute"])
def test_help_shows_the_new_names_alone(capsys, command):
    with pytest.raises(SystemExit):
        parsed(command, "--help")
    words = capsys.readouterr().out.replace("[", " ").replace("]", " ").split()
    assert "--train-limit" in words
    assert not {"--alone", "--limit", "--tail", "--tail-of", "--penalty"} & set(words)


@pytest.mark.parametrize(
    "flags", [["--limit", "5", "--train-limit", "6"], ["--train-limit", "5", "--limit", "6"]]
)
def test_both_names_at_once(capsys, flags):
    with pytest.raises(SystemExit, match="2"):
        parsed("vae", *flags)
    assert f"argument {flags[2]}: not allowed with argument {flags[0]}" in capsys.readouterr().err


# "--tail" was short for --tail-of once, and "--train" is not short for --train-limit.
@pytest.mark.parametrize(
    ("command", "flags"), [("gan", ["--tail", "d"]), ("vae", ["--train", "5"])]
)
def test_no_flag_may_be_shortened(capsys, command, flags):
    with pytest.raises(SystemExit, match="2"):
        parsed(command, *flags)
    assert f"unrecognized arguments: {' '.join(flags)}" in capsys.readouterr().err


def test_grids_take_a_former_name(capsys):
    assert parse_grids("vae", ["limit=100,200"]) == {"train_limit": [100, 200]}
    assert "warning: --limit is now --train-limit" in capsys.readouterr().err
    with pytest.raises(UserError, match="expected every flag once, got tail-term twice"):
        parse_grids("vae", ["tail=elbo", "tail-term=reconstruction"])


@pytest.mark.parametrize(
    ("name", "owner"), [("seed", "VAEConfig"), ("alpha", "CVaR"), ("sharpness", "Sharp")]
)
def test_two_settings_of_one_name_are_refused(name, owner):
    """A sampler's, of the configuration itself, of a risk, of another type than another's."""

    def sampler(title, kind):
        made = dataclasses.make_dataclass(
            title, [(name, kind, flag(kind(), ""))], bases=(Shuffle,), frozen=True
        )
        made.name = title.lower()
        return SAMPLERS.register(made)

    try:
        sampler("Sharp", int)
        if owner == "Sharp":
            settings_of(VAEConfig)
            sampler("Blunt", float)
        expected = f"expected a setting of another name or type than one of .*{owner}.*, got {name}"
        for use in (settings_of, configure, lambda kind: from_stored(to_stored(kind()), kind)):
            with pytest.raises(ValueError, match=expected):
                use(VAEConfig)
    finally:
        for title in ("sharp", "blunt"):
            if title in SAMPLERS:
                SAMPLERS.unregister(title)


CONFIGURATIONS = [
    configure(VAEConfig, no_baseline=True, train_limit=70, tail_term="reconstruction"),
    configure(GANConfig, loss="wgan-gp", gp_weight=3.0, tail_player="g"),
]


def as_before(config) -> dict[str, object]:
    """What ``config.json`` was before the flags were renamed and risks could be chosen."""
    former = {name: former for former, name in renamed(type(config)).items()}
    stored = {former.get(name, name): value for name, value in to_stored(config).items()}
    return {name: value for name, value in stored.items() if name not in ("format", "risk")}


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=["vae", "gan"])
def test_an_older_configuration_has_the_former_names(config):
    before = as_before(config)
    assert before.keys() >= {"alone", "limit"} and "train_limit" not in before
    read = flat(from_stored(before, type(config)))
    absolute = {name: to_stored(config)[name] for name in config.paths}
    assert read == flat(config) | absolute


def test_a_configuration_with_both_names():
    with pytest.raises(UserError, match="missing or unknown in this version of sqloss: limit"):
        from_stored(to_stored(CONFIGURATIONS[0]) | {"limit": 3}, VAEConfig)


def test_a_run_with_the_former_names_is_resumed_bit_for_bit(trainer, tmp_path, assert_same_run):
    trainer.config = changed(trainer.config, no_baseline=True, train_limit=40)
    for directory in ("whole", "resumed"):
        epochs = 4 if directory == "whole" else 2
        trainer.train(Run.new(tmp_path / directory, changed(trainer.config, epochs=epochs)))
    path = tmp_path / "resumed" / "config.json"
    path.write_text(json.dumps(as_before(changed(trainer.config, epochs=2))))
    trainer.train(Run.resumed(VAEConfig, tmp_path / "resumed", {"epochs": 4, "train_limit": 40}))
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    assert "alone" not in json.loads(path.read_text()), "it has today's names now"
