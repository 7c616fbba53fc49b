"""Trainings on several ranks against those in one process."""

import csv
import dataclasses
import os
import runpy
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import on_ranks

from sqloss import cli
from sqloss.common import ranks
from sqloss.common.errors import UserError
from sqloss.common.flags import configure
from sqloss.datasets.cache import MappedImages
from sqloss.training import checkpoint
from sqloss.training.gan.config import GANConfig
from sqloss.training.vae.config import VAEConfig

# Batches of 20, 20 and 1: of the last one some ranks have no image.
IMAGES = 41
COMMON = {"epochs": 2, "batch_size": 20, "latent": 3, "num_samples": 40, "imbalance": "none"}
VAE = COMMON | {"hidden": "8", "lr": 0.02}
GAN = COMMON | {"width": 2, "lr_d": 2e-3, "lr_g": 2e-3}

VAE_VARIANTS = {
    "normal": {"backward": "dense"},
    "learnt df": {"prior": "t", "learn_df": True, "beta": 0.5, "backward": "dense"},
    "tail of reconstruction": {"tail_term": "reconstruction", "prior": "t", "beta": 2.0},
    "importance-weighted": {"iwae_samples": 3, "backward": "dense"},
    "conv, oversampled": {"architecture": "conv", "channels": "2,3", "sampling": "balanced"},
    "communities": {"sampling": "communities", "neighbours": 3, "min_stability": 0.0},
    "communities as groups": {"risk": "group", "alpha": 0.5},
    "tail alone": {"backward": "tail"},
    "microbatches": {"microbatch_size": 3},
    "microbatches of a mean": {"alpha": 0.0, "tail_term": "reconstruction", "microbatch_size": 3},
}
GAN_VARIANTS = {
    "nonsaturating": {},
    "least squares, conditional": {"loss": "lsgan", "conditional": True, "tail_player": "d"},
    "hinge, codes, average": {"loss": "hinge", "info_codes": 2, "ema": 0.9},
    "saturating, augmented": {"loss": "saturating", "augment": True, "sampling": "balanced"},
    "groups": {"risk": "group", "groups": "labels", "alpha": 0.5},
    "top-k": {"risk": "topk", "tail_player": "g", "topk_decay": 0.5},
    "penalty": {"loss": "wgan-gp", "d_steps": 2, "info_codes": 1, "conditional": True},
}
# In float32 sums in another order differ by some 1e-7, of which Adam, that divides gradients by
# their size, makes up to 2e-4 in the smallest. Each rank's own tail would differ by 1e-2.
ROUNDING = {"rtol": 1e-3, "atol": 2e-5}
CURVE = {"rel": 1e-4, "abs": 1e-6}


@pytest.fixture(scope="module")
def torchrun():
    torchrun = on_ranks.Torchrun(3)
    yield torchrun
    torchrun.close()


@pytest.fixture
def data(trainer):
    """Random images, in batches whose last one has fewer than there are ranks."""
    draws = torch.Generator().manual_seed(0)
    return dataclasses.replace(
        trainer.data,
        train_images=torch.randint(256, (IMAGES, 1, 8, 8), generator=draws, dtype=torch.uint8),
        train_labels=torch.randint(3, (IMAGES,), generator=draws),
        test_images=torch.randint(256, (20, 1, 8, 8), generator=draws, dtype=torch.uint8),
    )


@pytest.fixture
def train(torchrun, data, assert_same):
    """Train on so many ranks; the state after it, which all ranks have, and what the first told."""

    def on(count, command, directory, interrupted=(None, 0), **given):
        arguments = on_ranks.train, command, directory, given, data, interrupted
        results = torchrun.run(count, on_ranks.joined, *arguments)
        for result in results:
            if isinstance(result, Exception):
                raise result
        finished, state, told = results[0]
        for other_finished, other, nothing in results[1:]:
            assert (other_finished, nothing) == (finished, "")
            assert_same(other, state)
        return finished, state, told

    return on


def assert_close(first, second):
    torch.testing.assert_close(learnt(first), learnt(second), **ROUNDING)
    assert first["epoch"] == second["epoch"]
    assert torch.equal(first["noise"], second["noise"])
    for a, b in zip(first["history"], second["history"], strict=True):
        assert a.keys() == b.keys() and a["model"] == b["model"]
        for metric in a.keys() - {"model"}:
            assert a[metric] == pytest.approx(b[metric], **CURVE), metric


def learnt(state):
    """The weights, those of the moving averages too, and the statistics of batch norm."""
    averages = {n: each["average"] or {} for n, each in state.get("contenders", {}).items()}
    return {"models": state["models"], "averages": averages}


# the same training


@pytest.mark.parametrize(
    ("command", "variant", "count"),
    [
        *(("vae", variant, 2) for variant in VAE_VARIANTS),
        *(("vae", variant, 3) for variant in ("normal", "tail alone", "microbatches of a mean")),
        *(("gan", variant, 2) for variant in GAN_VARIANTS),
        ("gan", "nonsaturating", 3),
    ],
)
def test_ranks_train_as_one_process_does(train, data, tmp_path, command, variant, count):
    given = (
        VAE | VAE_VARIANTS[variant] | {"epochs": 3}
        if command == "vae"
        else GAN | GAN_VARIANTS[variant]
    )
    _, one, _ = on_ranks.train(command, tmp_path / "one", given, data)
    finished, several, told = train(count, command, tmp_path / "several", **given)
    assert finished
    assert_close(several, one)
    assert told.count(f"epoch {given['epochs']}/{given['epochs']}: ") == 1
    # One run directory, by the first rank.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "several"]
    assert not Path("/nowhere").exists()
    names = [sorted(p.name for p in (tmp_path / d).iterdir()) for d in ("one", "several")]
    assert names[0] == names[1]


def test_ranks_train_against_a_reference_as_one_process_does(train, data, tmp_path, quick_reports):
    for needed in ("matplotlib", "scipy", "sklearn", "tqdm"):
        pytest.importorskip(needed)
    line = ["--train-limit", "60", "--hidden", "4", "--latent", "2", "--num-samples", "20"]
    line += ["--epochs", "1", "--alpha", "0", "--output-dir", str(tmp_path / "reference")]
    assert cli.main(["vae", *line]) == 0  # on the digits, of the same shape
    given = VAE | {"reference": str(tmp_path / "reference")}
    _, one, _ = on_ranks.train("vae", tmp_path / "one", given, data)
    _, several, _ = train(2, "vae", tmp_path / "several", **given)
    assert_close(several, one)
    assert one["brought"] == several["brought"]


def test_images_in_a_file_train_as_those_in_memory(torchrun, data, tmp_path, assert_same):
    images = data.train_images
    (tmp_path / "images").write_bytes(images.numpy().tobytes())
    rows = torch.arange(IMAGES)
    mapped = MappedImages(tmp_path / "images", IMAGES, tuple(images.shape[1:]), rows, workers=1)
    states = [
        torchrun.run(2, on_ranks.joined, on_ranks.train, "vae", tmp_path / name, VAE, of_run)
        for name, of_run in (
            ("memory", data),
            ("file", dataclasses.replace(data, train_images=mapped)),
        )
    ]
    for in_memory, in_file in zip(*states, strict=True):
        assert not isinstance(in_file, Exception), in_file
        assert_same(in_memory[1], in_file[1])


@pytest.mark.parametrize("batch", [7, 1])
@pytest.mark.parametrize("variant", GAN_VARIANTS)
def test_gradients_of_both_players_are_those_of_one_process(torchrun, variant, batch):
    arguments = COMMON | {"width": 2} | GAN_VARIANTS[variant], batch, (8, 7)
    expected = on_ranks.gan_gradients(*arguments)
    for player in ("discriminator", "generator"):
        assert any(each.abs().max() > 0 for n, each in expected[0].items() if player in n)
    for result in torchrun.run(3, on_ranks.joined, on_ranks.gan_gradients, *arguments):
        torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("sizes", [[2, 3, 1], [0, 5, 0], [0, 0, 1]])
@pytest.mark.parametrize(
    ("sides", "dtype", "close"),
    [
        ((4, 5), torch.float32, 1e-4),
        *((sides, torch.float64, 1e-9) for sides in ((4, 5), (2, 3, 4), (9,), ())),
    ],
)
def test_batch_norm_is_that_of_all_samples(torchrun, sizes, is_training, sides, dtype, close):
    # A mean of 100 standard deviations: the mean square minus the squared mean, in float32, would
    # leave three digits.
    torch.manual_seed(0)
    if is_training and sum(sizes) == 1 and not sides:
        pytest.skip("torch refuses a batch norm of one value")
    whole = torch.randn(2, sum(sizes), 3, *sides, dtype=torch.float64) + 100
    expected = on_ranks.batch_norm(sizes, is_training, whole)
    results = torchrun.run(
        3, on_ranks.joined, on_ranks.batch_norm, sizes, is_training, whole.to(dtype)
    )
    for rank, result in enumerate(results):
        for name in ("output", "input gradient"):
            part = expected[name].split(sizes)[rank].to(dtype)
            torch.testing.assert_close(result[name], part, rtol=close, atol=close)
        for name in ("gradients", "state"):
            torch.testing.assert_close(
                result[name], expected[name], rtol=close, atol=close, check_dtype=False
            )


def test_what_ranks_agree_upon(torchrun):
    results = torchrun.run(3, on_ranks.joined, on_ranks.agreements)
    rows = torch.arange(7).tensor_split(3)
    for number, result in enumerate(results):
        assert torch.arange(7)[result["part"]].tolist() == rows[number].tolist()
        assert result["whole"].tolist() == torch.arange(14.0).view(2, 7).tolist()
        assert result["none"].tolist() == [1.0]
        assert result["summed"].tolist() == [6.0, 6.0]
        assert result["any of"] == [False, True]
        assert result["of first"] == "from 0"
        assert result["turn"] == [number]
        assert result["refusal"] == "refused by 0"


# a user's own model


def test_a_model_with_batch_norm_trains_as_in_one_process(torchrun, tmp_path):
    metrics, state = on_ranks.train_own(tmp_path / "one")
    for result in torchrun.run(2, on_ranks.train_own, tmp_path / "two"):
        assert not isinstance(result, Exception), result
        torch.testing.assert_close(result[1], state, **ROUNDING)
        for one, other in zip(metrics, result[0], strict=True):
            assert one["train_objective"] == pytest.approx(other["train_objective"], **CURVE)


def test_parameters_that_no_loss_depends_on(torchrun, tmp_path):
    for error in torchrun.run(2, on_ranks.train_own, tmp_path / "refused", True):
        assert isinstance(error, UserError)
        assert "got none of unused.weight, unused.bias; give find_unused" in str(error)
    metrics, _ = on_ranks.train_own(tmp_path / "one", True)
    settings = partial(on_ranks.train_own, find_unused_parameters=True)
    for result in torchrun.run(2, settings, tmp_path / "two", True):
        assert not isinstance(result, Exception), result
        assert result[0][-1]["train_objective"] == pytest.approx(
            metrics[-1]["train_objective"], **CURVE
        )


# stopping and resuming


@pytest.mark.parametrize("command", ["vae", "gan"])
def test_other_numbers_of_ranks_go_on(train, data, tmp_path, command):
    given = (VAE if command == "vae" else GAN | {"ema": 0.9}) | {"epochs": 4}
    _, one, _ = on_ranks.train(command, tmp_path / "one", given, data)

    parts = tmp_path / "parts"
    finished, _, _ = train(2, command, parts, (1, 4), **given)
    assert not finished
    finished, state, _ = on_ranks.train(command, parts, {}, data, (0, 4))
    assert not finished
    assert (state["epoch"], state["step"]) == (2, 2)
    finished, several, _ = train(3, command, parts)
    assert finished
    assert_close(several, one)


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_stop_after_the_same_step(train, tmp_path, rank):
    finished, state, _ = train(2, "vae", tmp_path, (rank, 4), **VAE)
    assert not finished
    assert (state["epoch"], state["step"]) == (1, 1)
    saved = checkpoint.load(tmp_path / "checkpoints")
    assert (saved["epoch"], saved["step"]) == (1, 1)


# errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vae", "--bogus"], "unrecognized arguments: --bogus"),
        (["vae", "--alpha", "2"], "--alpha: expected a number in [0, 1), got 2.0"),
        (
            ["gan", "--batch-size", "1"],
            "--batch-size: expected a sample at least for each of 2 processes, got 1",
        ),
        (
            ["vae", "--backend", "numpy"],
            "--backend: expected torch with several processes, got numpy with 2",
        ),
        (["sweep", "vae", "--grid", "lr=1,2"], "expected one process, got 2 of torchrun"),
        (["evaluate", "/nowhere"], "expected one process, got 2 of torchrun"),
        (["impute", "/nowhere"], "expected one process, got 2 of torchrun"),
        (["vae", "--resume", "/nowhere"], "expected the directory of a run"),
        (["vae", "--dataset", "folder", "--data-dir", "/nowhere"], "--dataset folder: expected"),
        (["vae", "--output-dir", "USED"], "expected a directory without a run, got"),
        (
            ["vae", "--lr", "1e30", "--train-limit", "50", "--hidden", "4", "--output-dir", "NEW"],
            "model is no longer finite after ",
        ),
    ],
)
def test_an_error_of_all_ranks_is_told_once(torchrun, tmp_path, arguments, message):
    (tmp_path / "config.json").touch()
    places = {"USED": str(tmp_path), "NEW": str(tmp_path / "new")}
    arguments = [places.get(each, each) for each in arguments]
    (status, out, told), *others = torchrun.run(2, on_ranks.command, arguments)
    assert (status, out) == (2, "")
    assert told.count("error: ") == 1 and message in told
    assert others == [(2, "", "")]
    assert not (tmp_path / "new" / "config.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "folder", "--data-dir", "/nowhere"], "--dataset folder: expected "),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_an_error_of_one_rank_ends_all(torchrun, tmp_path, flags, message):
    arguments = ["vae", "--output-dir", str(tmp_path / "run")]
    results = torchrun.run(2, on_ranks.command, arguments, [[], flags], 0.2)
    assert [(status, out) for status, out, _ in results] == [(2, ""), (2, "")]
    assert "error" not in results[0][2]
    told = results[1][2]
    assert told.startswith("rank 1: ") and told.count("error: ") == 1 and message in told
    assert not (tmp_path / "run").exists()


def test_an_error_of_a_later_rank_is_told_after_an_earlier_joining_too(torchrun):
    assert torchrun.run(2, on_ranks.end_twice, 0.2) == [[""], ["rank 1: only here\n"]]


@pytest.mark.parametrize(("kind", "code"), [(UserError, 2), (MemoryError, 2)])
def test_where_the_first_rank_cannot_write_all_end(torchrun, tmp_path, kind, code):
    arguments = ["vae", "--train-limit", "50", "--hidden", "4", "--output-dir", str(tmp_path)]
    (status, _, told), other = torchrun.run(
        2, on_ranks.command, arguments, None, 60.0, (kind, "the disk is full")
    )
    assert status == code
    assert told.count("error: ") == 1 and "the disk is full" in told
    assert other == (code, "", "")
    assert not (tmp_path / "config.json").exists()


def test_flags_that_differ_are_refused(torchrun):
    errors = torchrun.run(2, on_ranks.joined, on_ranks.differ, "--lr", 1, [0.1, 0.2])
    for error in errors:
        assert isinstance(error, UserError)
        assert str(error) == (
            "--lr: expected the same on all ranks, got 0.1 on rank 0 and 0.2 on rank 1"
        )
    assert torchrun.run(2, on_ranks.joined, on_ranks.differ, "--lr", 1, [0.1, 0.1]) == [None, None]


def test_machines_with_and_without_gpus_do_not_train_together(torchrun, data):
    for error in torchrun.run(2, on_ranks.joined, on_ranks.differ_in_device, data):
        assert isinstance(error, UserError)
        assert str(error) == (
            "--device: expected the same on all ranks, got cpu on rank 0 and cuda on rank 1"
        )


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda:0", 2, "--device: expected auto, cpu or cuda with several processes"),
        ("auto", 1, "--device: expected a GPU for every process of a machine, or cpu, got 1"),
        ("auto", 2, None),
    ],
)
def test_each_rank_has_a_gpu_of_its_own(monkeypatch, device, gpus, message):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", "1")
    config = configure(GANConfig, device=device)
    if message is None:
        config.check_ranks()
        return
    with pytest.raises(UserError) as raised:
        config.check_ranks()
    assert str(raised.value).startswith(message)


def test_one_process_of_torchrun_joins_nobody(monkeypatch):
    for name in ranks.GIVEN:
        monkeypatch.setenv(name, "1")
    with ranks.joined():
        assert (ranks.count(), ranks.number(), ranks.is_first()) == (1, 0, True)
        configure(VAEConfig, backend="numpy").check_ranks()


def test_one_process_needs_no_torch_distributed(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.distributed.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    of_ranks = runpy.run_path(ranks.__file__)
    with of_ranks["joined"]():
        assert of_ranks["count"]() == 1


# the whole of a run


def test_a_registered_trainer_runs_on_ranks(torchrun, tmp_path):
    flags = ["toy", "--train-limit", "100", "--epochs", "2"]
    rows = []
    for count in (1, 2):
        directory = tmp_path / str(count)
        arguments = [*flags, "--output-dir", str(directory)]
        (status, _, told), *_ = torchrun.run(count, on_ranks.toy_command, arguments)
        assert status == 0, told
        assert (directory / "report.json").exists()
        rows.append(list(csv.DictReader((directory / "metrics.csv").open())))
    for one, other in zip(*rows, strict=True):
        assert (one["epoch"], one["model"]) == (other["epoch"], other["model"])
        assert float(one["value"]) == pytest.approx(float(other["value"]), rel=1e-4)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_torchrun_is_interrupted_and_others_go_on(torchrun, tmp_path):
    """As users start and interrupt it, and with the report, which the first rank makes alone."""
    flags = ["--hidden", "4", "--train-limit", "60", "--batch-size", "32", "--num-samples", "20"]
    process = subprocess.Popen(
        [*TORCHRUN, "-m", "sqloss", "vae", "--epochs", "100000", *flags],
        cwd=tmp_path,
        env=os.environ | on_ranks.LOOPBACK | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/checkpoints/*.pt")) and time.monotonic() < until:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert told.count("stopped and saved after") == 1, told
    [directory] = (tmp_path / "runs").iterdir()
    done = checkpoint.load(directory / "checkpoints")["epoch"] + 1

    arguments = ["vae", "--resume", str(directory), "--epochs", str(done)]
    (status, out, told), other = torchrun.run(2, on_ranks.command, arguments)
    assert status == 0, told
    assert told.count(f"epoch {done}/{done}: ") == 1
    assert "| mean -ELBO" in out
    assert other == (0, "", "")
    assert (directory / "report.md").exists()
