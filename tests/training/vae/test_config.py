import pytest
import torch

from sqloss.common.errors import UserError
from sqloss.common.flags import configure
from sqloss.training.vae.config import VAEConfig

SIZES = "whole numbers from 1 to 2147483647, such as 400 or 512,256"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("alpha", 1.0, "a number in [0, 1)"),
        ("alpha", -0.1, "a number in [0, 1)"),
        ("alpha", float("nan"), "a number in [0, 1)"),
        ("epochs", 0, "a whole number from 1 to 2147483647"),
        ("batch_size", 0, "a whole number from 1 to 2147483647"),
        ("num_samples", 0, "a whole number from 1 to 2147483647"),
        ("checkpoint_every", 0, "a whole number from 1 to 2147483647"),
        ("hidden", "2147483648", f"{SIZES}"),
        ("hidden", "400,-1", f"{SIZES}"),
        ("hidden", "many", f"{SIZES}"),
        ("hidden", "", f"{SIZES}"),
        ("channels", "32,", f"{SIZES}"),
        ("architecture", "transformer", "one of mlp, conv"),
        ("prior", "cauchy", "one of normal, t"),
        ("backend", "jax", "one of torch, numpy"),
        ("df", 0.0, "a number from 0.5 to 1e+06 (the limit is --prior normal)"),
        ("df", float("inf"), "a number from 0.5 to 1e+06 (the limit is --prior normal)"),
        ("latent", 0, "a whole number from 1 to 2147483647"),
        ("lr", -1e-3, "a number from 0 up"),
        ("lr", float("inf"), "a number from 0 up"),
        ("beta", -1.0, "a number from 0 up"),
        ("iwae_samples", -1, "a whole number from 0 to 2147483647"),
        ("microbatch_size", -1, "a whole number from 0 to 2147483647"),
        ("backward", "sparse", "one of auto, tail, dense"),
        ("train_limit", -1, "a whole number from 0 to 2147483647"),
        ("image_size", -1, "a whole number from 0 to 2147483647"),
        ("seed", -1, "a whole number from 0 up"),
        ("threads", -1, "a whole number from 0 up"),
        ("dataset", "imagenet", "one of celeba, digits, folder, mnist, fashion, cifar10"),
        ("tail_term", "kl", "one of elbo, reconstruction"),
    ],
)
def test_a_bad_value_names_its_flag_what_is_expected_and_what_came(name, value, expected):
    with pytest.raises(UserError) as raised:
        configure(VAEConfig, **{name: value})
    assert str(raised.value) == f"--{name.replace('_', '-')}: expected {expected}, got {value}"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "--learn-df: expected --prior t, whose df it learns, got --prior normal"),
        (
            {"prior": "t", "df": 0.5},
            "--df: expected a number between 1 and 1e+06 with --learn-df, got 0.5",
        ),
    ],
)
def test_a_df_that_cannot_be_learnt(values, told):
    with pytest.raises(UserError) as raised:
        configure(VAEConfig, learn_df=True, **values)
    assert str(raised.value) == told


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"df": 3.0}, "--df: expected --prior t with it, got --prior normal"),
        (
            {"channels": "8"},
            "--channels: expected --architecture conv with it, got --architecture mlp",
        ),
    ],
)
def test_a_flag_without_effect(values, told):
    with pytest.raises(UserError) as raised:
        configure(VAEConfig, **values)
    assert str(raised.value) == told


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"tail_term": "reconstruction"}, "--tail-term: expected elbo with --iwae-samples"),
        ({"beta": 2.0}, "--beta: expected 1 with --iwae-samples"),
    ],
)
def test_the_importance_weighted_bound_has_no_terms_of_its_own(values, told):
    with pytest.raises(UserError, match=told):
        configure(VAEConfig, iwae_samples=2, **values)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"architecture": "conv"}, "--architecture: expected mlp with --backend numpy, got conv"),
        (
            {"prior": "t", "learn_df": True},
            "--learn-df: expected --backend torch with it, got --backend numpy",
        ),
        ({"iwae_samples": 5}, "--iwae-samples: expected 0 with --backend numpy, got 5"),
        ({"microbatch_size": 5}, "--microbatch-size: expected 0 with --backend numpy, got 5"),
        (
            {"backward": "tail"},
            "--backward: expected auto or dense with --backend numpy, got tail",
        ),
        ({"device": "cuda"}, "--device: expected auto or cpu with --backend numpy, got cuda"),
    ],
)
def test_what_the_numpy_backend_does_not_do(values, told):
    with pytest.raises(UserError) as raised:
        configure(VAEConfig, backend="numpy", **values)
    assert str(raised.value) == told


ALL_IMAGES = "--tail-term reconstruction, whose KL is that of all images"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"backward": "tail", "alpha": 0.0},
            "--backward: expected auto or dense with --alpha 0, which has no tail that all of the "
            "gradient is of, got tail",
        ),
        (
            {"backward": "tail", "tail_term": "reconstruction"},
            f"--backward: expected auto or dense with {ALL_IMAGES}, got tail",
        ),
        (
            {"microbatch_size": 8, "tail_term": "reconstruction"},
            f"--microbatch-size: expected 0 with {ALL_IMAGES}, got 8",
        ),
        (
            {"microbatch_size": 8, "backward": "dense"},
            "--microbatch-size: expected 0 with --backward dense, which takes all images at once, "
            "got 8",
        ),
    ],
)
def test_what_the_tail_alone_cannot_do(values, told):
    with pytest.raises(UserError) as raised:
        configure(VAEConfig, **values)
    assert str(raised.value) == told
    if "microbatch_size" in values:  # without a tail, any mean has microbatches
        configure(VAEConfig, **values | {"alpha": 0.0})


def test_each_backend_has_a_learning_rate_of_its_own():
    assert VAEConfig().learning_rate == 1e-3
    assert configure(VAEConfig, backend="numpy").learning_rate == 1e-2
    assert configure(VAEConfig, backend="numpy", lr=0.5).learning_rate == 0.5


def test_numpy_runs_on_the_cpu():
    assert configure(VAEConfig, backend="numpy").torch_device == torch.device("cpu")


def test_sizes_are_numbers_between_commas():
    config = configure(VAEConfig, architecture="conv", hidden="512,256", channels="8")
    assert (config.hidden_sizes, config.channel_sizes) == ((512, 256), (8,))


def test_the_device_is_one_that_is_there():
    best = "cuda" if torch.cuda.is_available() else "cpu"
    assert configure(VAEConfig, device="auto").torch_device == torch.device(best)
    assert configure(VAEConfig, device="cpu").torch_device == torch.device("cpu")
    for absent in ("tpu", "cuda:99"):
        with pytest.raises(UserError, match=f"--device: expected auto or.*got {absent}"):
            _ = configure(VAEConfig, device=absent).torch_device


def test_the_measured_tail_is_the_trained_one_or_the_usual_one():
    assert configure(VAEConfig, alpha=0.5).metric_alpha == 0.5
    assert configure(VAEConfig, alpha=0.0).metric_alpha == 0.8


def test_threads_that_no_machine_could_start():
    assert configure(VAEConfig, threads=2).cpu_threads == 2
    with pytest.raises(UserError, match=r"--threads: expected at most \d+ on this machine, got"):
        _ = configure(VAEConfig, threads=100_000).cpu_threads
