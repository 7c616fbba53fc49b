import io
import json
import os
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

import sqloss
from sqloss import cli
from sqloss.common import files
from sqloss.common.flags import configure
from sqloss.datasets import Dataset
from sqloss.datasets.digits import Digits
from sqloss.training.threads import set_threads
from sqloss.training.vae import loop as vae_loop
from sqloss.training.vae import report as vae_report
from sqloss.training.vae.config import VAEConfig
from sqloss.training.vae.loop import build_model

for needed in ("matplotlib", "scipy", "sklearn", "tqdm"):
    pytest.importorskip(needed)


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


TINY = ["--train-limit", "300", "--hidden", "16", "--latent", "4", "--num-samples", "50"]
PRODUCTS = {
    "config.json",
    "metrics.csv",
    "report.json",
    "report.md",
    "vae_loss_curves.png",
    "vae_loss_distribution.png",
    "vae_reconstructions.png",
    "vae_samples.png",
}


TINY_GAN = ["--train-limit", "200", "--width", "2", "--latent", "4", "--num-samples", "50"]
TINY_GAN += ["--epochs", "1"]
GAN_PRODUCTS = {
    "config.json",
    "metrics.csv",
    "report.json",
    "report.md",
    "gan_loss_curves.png",
    "gan_loss_distribution.png",
    "gan_nearest.png",
    "gan_samples.png",
}


def require_or_skip(package: str) -> None:
    """A package for another torch fails in other ways than one that is not there."""
    pytest.importorskip(package, exc_type=(ImportError, RuntimeError))


def sqloss_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "sqloss", *map(str, arguments)]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """One thread, and the package found from any folder."""
    root = Path(sqloss.__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


# The modules that are heavy, where the command line has imported them; and then a command, whose
# classifier learns for less than a second.
QUICK = """
import sys, sqloss.cli
from sqloss.models import classifier

heavy = {"torchvision", "sklearn", "scipy", "matplotlib", "tensorboard"}
print(sorted(heavy & sys.modules.keys()))
classifier.STEPS = 100
sys.exit(sqloss.cli.main())
"""


@pytest.fixture(scope="module")
def whole_command(tmp_path_factory, environment):
    """What a command tells in a process of its own, and where its run went."""
    place = tmp_path_factory.mktemp("whole")
    flags = [*TINY, "--epochs", "2", "--output-dir", str(place / "run")]
    done = subprocess.run(
        [sys.executable, "-c", QUICK, "vae", *flags],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=place,
    )
    return done, place / "run"


def test_the_whole_command(whole_command):
    done, run = whole_command
    assert {path.name for path in run.iterdir()} >= PRODUCTS
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 + 2 * 2
    assert "epoch 1/2: standard -ELBO" in done.stderr
    report = json.loads((run / "report.json").read_text())
    assert f"{report['models']['cvar']['test']['negative_elbo_cvar']:.2f}" in done.stdout
    assert report["classifier_test_accuracy"] > 0.8
    assert report["train_images"][0] < report["train_images_before_imbalance"][0]


def test_the_command_line_is_light(whole_command):
    assert whole_command[0].stdout.startswith("[]\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_saves_and_tells_how_to_go_on(tmp_path, environment):
    run = tmp_path / "a run"
    long = ["--epochs", 1_000_000, "--checkpoint-every", 1_000_000]
    process = subprocess.Popen(
        sqloss_command("vae", *TINY, *long, "--output-dir", run),
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    kill = threading.Timer(60, process.kill)
    kill.start()
    try:
        assert any(line.startswith("epoch 2/") for line in process.stderr), "it never got there"
        assert not (run / "checkpoints").exists()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate()
    finally:
        kill.cancel()
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "stopped and saved after" in told
    assert f"sqloss vae --resume '{run}'" in told
    assert "Traceback" not in told
    assert len(list((run / "checkpoints").iterdir())) == 1, "made by the Ctrl-C"
    assert not (run / "report.md").exists()


# within this process


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_a_run_is_resumed_or_only_reported_again(capsys, tmp_path, quick_reports, backend):
    flags = [*TINY, "--backend", backend, "--epochs", "2"]
    assert cli.main(["vae", *flags, "--output-dir", str(tmp_path)]) == 0
    first = capsys.readouterr()

    assert cli.main(["vae", "--resume", str(tmp_path)]) == 0
    again = capsys.readouterr()
    assert again.out == first.out
    assert "epoch 1/2" not in again.err

    assert cli.main(["vae", "--resume", str(tmp_path), "--epochs", "3"]) == 0
    more = capsys.readouterr()
    assert "epoch 3/3" in more.err
    assert "epoch 2/3" not in more.err
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + 3 * 2


def initial_weights(monkeypatch, *arguments: object) -> torch.Tensor:
    """Those of a run that is stopped as soon as it has them."""
    given = []

    def take(config, shape):
        model = build_model(config, shape)
        given.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        raise KeyboardInterrupt

    monkeypatch.setattr(vae_loop, "build_model", take)
    assert cli.main(["vae", *TINY, *map(str, arguments)]) == 130
    return given[0]


def test_the_seed_is_that_of_the_initial_weights_too(monkeypatch):
    first = initial_weights(monkeypatch, "--seed", 1)
    assert torch.equal(first, initial_weights(monkeypatch, "--seed", 1))
    assert not torch.equal(first, initial_weights(monkeypatch, "--seed", 2))


def test_the_classifier_learns_from_the_data_before_the_imbalance(tmp_path, monkeypatch):
    counts = []

    def spy(_models, _losses, whole, data, *_):
        counts.append((whole.class_counts()[0], data.class_counts()[0]))
        raise KeyboardInterrupt

    monkeypatch.setattr(vae_report, "make_report", spy)
    run = ["--output-dir", str(tmp_path / "run"), "--epochs", "1"]
    cli.main(["vae", *TINY, *run, "--imbalance", "0:0.1"])
    [(before, after)] = counts
    assert after == round(0.1 * before) < before


@pytest.mark.parametrize(
    "flags",
    [
        ["--prior", "t", "--df", "3", "--tail-term", "reconstruction"],
        ["--prior", "t", "--learn-df", "--iwae-samples", "2"],
        ["--architecture", "conv", "--channels", "3,4", "--hidden", "8"],
    ],
)
def test_every_kind_of_model_is_trained_reported_and_evaluated(
    capsys, tmp_path, quick_reports, flags
):
    given = [*TINY, "--epochs", "1", *flags, "--output-dir", str(tmp_path)]
    assert cli.main(["vae", *given]) == 0
    assert {path.name for path in tmp_path.iterdir()} >= PRODUCTS
    report = json.loads((tmp_path / "report.json").read_text())
    capsys.readouterr()

    assert cli.main(["evaluate", str(tmp_path), "--iwae-samples", "3", "--images", "50"]) == 0
    table = capsys.readouterr().out
    found = json.loads((tmp_path / "evaluation.json").read_text())
    for name, model in found["models"].items():
        elbo, bound = model["negative_elbo"], model["negative_iw_bound"]
        assert f"{elbo['mean']:.2f}" in table
        assert bound["mean"] < elbo["mean"]
        assert elbo["mean"] == pytest.approx(
            report["models"][name]["test"]["negative_elbo"], abs=8 * elbo["standard_error"]
        )


def test_what_cannot_be_evaluated(capsys, tmp_path):
    def told_by_evaluate(*arguments: object) -> str:
        return told(capsys, *arguments, command="evaluate")

    missing = told_by_evaluate(tmp_path / "nothing")
    assert "RUN_DIR: expected the directory of a run" in missing
    message = "--iwae-samples: expected a whole number from 1 to 2147483647, got 0"
    assert message in told_by_evaluate(tmp_path, "--iwae-samples", 0)
    message = "--images: expected a whole number from 0 to 2147483647, got -1"
    assert message in told_by_evaluate(tmp_path, "--images", -1)


def test_a_gan_is_trained_reported_and_resumed(capsys, tmp_path, quick_reports):
    pytest.importorskip("torchmetrics", exc_type=(ImportError, RuntimeError))
    run, judge = tmp_path / "run", tmp_path / "judge.pt"
    flags = ["--conditional", "--info-codes", 1, "--ema", 0.5, "--tail-player", "g"]
    given = map(str, [*TINY_GAN, *flags, "--classifier", judge, "--output-dir", run])
    assert cli.main(["gan", *given]) == 0
    first = capsys.readouterr()
    assert {path.name for path in run.iterdir()} >= GAN_PRODUCTS | {"gan_codes.png"}
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 + 2
    assert "epoch 1/1: standard D " in first.err
    report = json.loads((run / "report.json").read_text())
    cvar = report["models"]["cvar"]
    assert f"{cvar['quality']['cfid']:.2f}" in first.out
    assert f"{cvar['label_agreement']['share']:.1%}" in first.out
    assert first.out.strip() in (run / "report.md").read_text()
    assert report["train_images"][0] < report["train_images_before_imbalance"][0]

    content = judge.read_bytes()
    assert cli.main(["gan", "--resume", str(run)]) == 0
    again = capsys.readouterr()
    assert again.out == first.out
    assert "epoch 1/1" not in again.err
    assert judge.read_bytes() == content

    # another classifier, kept at another place, makes it no other run
    other = tmp_path / "other.pt"
    changes = ["--epochs", "2", "--classifier", str(other)]
    assert cli.main(["gan", "--resume", str(run), *changes]) == 0
    assert "epoch 2/2" in capsys.readouterr().err
    assert other.exists()
    assert json.loads((run / "config.json").read_text())["classifier"] == str(other)

    message = told(capsys, "--resume", run)
    assert "expected a run of sqloss vae, got one of sqloss gan" in message
    message = told(capsys, run, command="evaluate")
    assert "expected a run of sqloss vae, got one of sqloss gan" in message
    message = told(capsys, "--resume", run, "--width", 3, command="gan")
    assert "--width: expected 2, with which" in message
    machine = "--epochs, --device, --threads, --data-dir, --download, --workers, --cache-dir"
    assert f"only {machine}, --classifier," in message


def test_version_and_config(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"sqloss {sqloss.__version__}\n"
    sqloss.show_config()
    shown = capsys.readouterr().out
    assert cli.main(["config"]) == 0
    assert capsys.readouterr().out == shown != ""


RUN_FLAGS = {
    "groups",
    "groups-from",
    "group-decay",
    "topk-share",
    "topk-decay",
    "risk",
    "dataset",
    "data-dir",
    "download",
    "image-size",
    "train-limit",
    "cache-dir",
    "celeba-attribute",
    "folder-attribute",
    "workers",
    "imbalance",
    "sampling",
    "features",
    "sampling-power",
    "sampling-lift",
    "sampling-from",
    "sampling-refresh",
    "min-community",
    "neighbours",
    "resolution",
    "min-stability",
    "merge-overlap",
    "target-min-share",
    "min-draw",
    "clusters",
    "alpha",
    "no-baseline",
    "epochs",
    "batch-size",
    "seed",
    "device",
    "threads",
    "num-samples",
    "checkpoint-every",
}
VAE_FLAGS = {
    "reference",
    "backward",
    "microbatch-size",
    "tail-term",
    "lr",
    "hidden",
    "latent",
    "architecture",
    "channels",
    "prior",
    "df",
    "learn-df",
    "iwae-samples",
    "backend",
    "beta",
}
GAN_FLAGS = {
    "tail-player",
    "loss",
    "conditional",
    "info-codes",
    "info-weight",
    "gp-weight",
    "d-steps",
    "g-steps",
    "lr-d",
    "lr-g",
    "beta1",
    "augment",
    "ema",
    "width",
    "latent",
    "classifier",
    "fid-weights",
}


@pytest.mark.parametrize(("command", "own"), [("vae", VAE_FLAGS), ("gan", GAN_FLAGS)])
def test_help_tells_every_flag_with_its_default(capsys, command, own):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    flags = RUN_FLAGS | own
    assert {flag for flag in flags | {"output-dir", "resume"} if f"--{flag} " not in text} == set()
    assert text.count("(default: ") == len(flags) + 1


@pytest.mark.parametrize("command", ["vae", "gan"])
def test_each_trainer_is_a_command_of_its_own(monkeypatch, command):
    called = []
    monkeypatch.setattr(cli, "main", lambda arguments: called.append(arguments) or 0)
    line = ["--dataset", "mnist", "--alpha", "0.8", "--epochs", "400"]
    monkeypatch.setattr(sys, "argv", [command, *line])
    assert getattr(cli, command)() == 0
    assert called == [[command, *line]]


def test_what_is_given_is_what_is_trained(monkeypatch):
    given = {}
    monkeypatch.setattr(cli, "train", lambda _, **flags: given.update(flags) or 0)
    assert cli.main(["vae", "--alpha", "0.5", "--batch-size", "7", "--download"]) == 0
    assert given == {"alpha": 0.5, "batch_size": 7, "download": True}


def told(capsys, *arguments: object, command: str = "vae") -> str:
    """The message of a user error."""
    assert cli.main([command, *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith(f"sqloss {command}: error: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_bad_values(capsys, tmp_path):
    run = ["--output-dir", tmp_path / "run"]
    assert "--alpha: expected a number in [0, 1), got 1.0" in told(capsys, "--alpha", 1, *run)
    assert "--epochs: expected a whole number from 1 to" in told(capsys, "--epochs", 0, *run)
    assert "--data-dir: expected a directory" in told(capsys, "--data-dir", "", *run)
    assert "--imbalance: expected one of the c" in told(capsys, "--imbalance", "11:0", *run)
    assert "--device: expected auto or" in told(capsys, "--device", "abacus", *run)
    assert "--threads: expected at most" in told(capsys, "--threads", 999_999, *run)
    assert not (tmp_path / "run").exists(), "nothing is left of a run that never began"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gp-weight", 1], "--gp-weight: expected --loss wgan-gp with it, got none"),
        (["--info-weight", 2], "--info-weight: expected --info-codes above 0 with it, got none"),
        (
            ["--alpha", 0, "--tail-player", "d"],
            "--tail-player: expected another risk than the mean with it, got none",
        ),
        (
            ["--alpha", 0, "--no-baseline"],
            "--no-baseline: expected another risk than the mean with it, got --alpha 0",
        ),
        (["--lr-g", 0], "--lr-g: expected a number above 0, got 0.0"),
        (["--d-steps", 8], "--d-steps: expected at most 7, the batches of an epoch"),
        (["--image-size", 4], "--image-size: expected images of at least 5 pixels a side, got 4 x"),
        (["--train-limit", 1], "--dataset: expected at least 2 training images, got 1"),
        (["--width", 2**31 - 1], "use a smaller --batch-size, --width, --latent, --image-size,"),
        (["--classifier", __file__], "--classifier: expected a file with the classifier of this"),
        (["--classifier", "none/x.pt"], "--classifier: expected a file in a folder that is there"),
    ],
)
def test_what_a_gan_refuses_before_the_training(capsys, tmp_path, flags, message):
    pytest.importorskip("torchmetrics", exc_type=(ImportError, RuntimeError))
    given = [*TINY_GAN, "--imbalance", "none", *flags, "--output-dir", tmp_path / "run"]
    assert message in told(capsys, *given, command="gan")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", ["matplotlib.figure", "scipy.stats", "sklearn.neighbors"])
def test_what_the_report_on_a_gan_needs_is_told_before(capsys, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    message = told(capsys, *TINY_GAN, "--output-dir", tmp_path / "run", command="gan")
    assert f"{module.partition('.')[0]} is needed here" in message
    assert not (tmp_path / "run").exists()


def test_a_missing_torchmetrics_is_told_before(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    message = told(capsys, *TINY_GAN, "--output-dir", tmp_path / "run", command="gan")
    assert "torchmetrics is needed here" in message
    assert not (tmp_path / "run").exists()


def test_missing_weights_of_inception_are_told_before(capsys, tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics", exc_type=(ImportError, RuntimeError))
    flags = [*TINY_GAN, "--fid-weights", "none.pth", "--output-dir", tmp_path / "run"]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    assert "got none.pth, which is no file" in told(capsys, *flags, command="gan")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    message = told(capsys, *flags, command="gan")
    assert "pip install 'sqloss[fid]'" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "high"], "sqloss vae: error: argument --alpha: invalid float value: 'high'"),
        (["--dataset", "x"], "sqloss vae: error: argument --dataset: invalid choice: 'x'"),
        (["--resume", "a", "--output-dir", "b"], "not allowed with argument"),
    ],
)
def test_what_argparse_refuses(capsys, arguments, message):
    with pytest.raises(SystemExit) as left:
        cli.main(["vae", *arguments])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        *(["vae", "--output-dir"], ["gan", "--resume"], ["sweep", "vae", "--output-dir"]),
        *(["sample", "run", "--output-dir"], ["sample", "run", "--folder"], ["sample"]),
        *(["evaluate"], ["impute"], ["impute", "--compare", "--output-dir"]),
    ],
)
def test_no_directory_has_an_empty_name(capsys, arguments):
    with pytest.raises(SystemExit):
        cli.main([*arguments, ""])
    name = arguments[-1] if arguments[-1].startswith("--") else "RUN_DIR"
    expected = f"argument {name}: expected a directory, got an empty name"
    assert expected in capsys.readouterr().err


def test_directories(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "which holds one" in told(capsys, "--output-dir", tmp_path)
    assert "cannot use" in told(capsys, "--resume", tmp_path)
    assert "expected the directory of a run" in told(capsys, "--resume", tmp_path / "nothing")


ODD_NAMES = ["$$", "_a|b_", "two\nlines", "猫", os.fsdecode(b"caf\xe9")]


@pytest.fixture
def make_folder(tmp_path, monkeypatch, quick_reports):
    """Makes five images in each of some classes, below the working directory of the test."""
    require_or_skip("torchvision")
    from PIL import Image

    monkeypatch.chdir(tmp_path)

    def make(names, size=(6, 5)):
        for value, name in enumerate(names):
            (tmp_path / "data" / name).mkdir(parents=True)
            for i in range(5):
                image = Image.new("L", size, 20 * value + i)
                image.save(tmp_path / "data" / name / f"{i}.png")
        return ["--dataset", "folder"]

    return make


TINY_FOLDER = ["--epochs", "1", "--latent", "2", "--num-samples", "9"]


def test_odd_folders_are_trained_reported_and_used(capsys, tmp_path, monkeypatch, make_folder):
    given = make_folder(ODD_NAMES, size=(6, 1))
    given += [*TINY_FOLDER, "--hidden", "4", "--imbalance", "$$:0.25,猫:0.5"]
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, "ascii"))
    assert cli.main(["vae", *given, "--output-dir", "run"]) == 0
    assert cli.main(["evaluate", "run", "--iwae-samples", "2"]) == 0
    few = ["--draws", "2", "--iterations", "2", "--burn-in", "1"]
    assert cli.main(["impute", "run", *few]) == 0
    counts = r"per class $$: 1 of 4, _a|b_: 4, caf\udce9: 4, two\nlines: 4, 猫: 2 of 4;"
    assert counts in capsys.readouterr().err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["class_names"] == sorted(ODD_NAMES)
    assert report["train_images"] == [1, 4, 4, 4, 2]
    lines = (tmp_path / "run" / "report.md").read_text(encoding="utf-8").splitlines()
    for name in (r"\$\$", r"\_a\|b\_", r"caf\\udce9", r"two\\nlines", "猫"):
        assert sum(line.startswith(f"| {name} ") for line in lines) == 2
    assert rb"| \u732b " in terminal.getvalue()


def test_odd_classes_of_a_gan(tmp_path, make_folder):
    require_or_skip("torchmetrics")
    given = [*make_folder(ODD_NAMES), *TINY_FOLDER, "--width", "1", "--conditional"]
    assert cli.main(["gan", *given, "--output-dir", "run"]) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} >= GAN_PRODUCTS


@pytest.mark.parametrize(
    "command",
    [["vae"], ["gan"], ["vae", "--output-dir", "a/run"], ["sweep", "vae"], ["impute", "--compare"]],
)
def test_output_among_the_images_is_refused_before_the_training(
    capsys, tmp_path, monkeypatch, make_folder, command
):
    if "gan" in command:
        require_or_skip("torchmetrics")
    given = [*make_folder("ab"), "--data-dir", "."]
    monkeypatch.chdir(tmp_path / "data")
    name, *rest = command
    message = told(capsys, *rest, *given, command=name)
    assert "--output-dir: expected a directory outside of the images" in message
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["a", "b"]


def test_a_full_disk(capsys, tmp_path, monkeypatch):
    def no_space(descriptor: int) -> None:
        if (tmp_path / "run" / "checkpoints").exists():
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", no_space)
    message = told(capsys, *TINY, "--epochs", 1, "--output-dir", tmp_path / "run")
    assert "cannot save the checkpoint" in message
    assert "No space left on device" in message
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_missing_package_is_told_before_the_training(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = told(capsys, *TINY, "--output-dir", tmp_path / "run")
    assert "matplotlib is needed here" in message
    assert "pip install 'sqloss[train]'" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("threads", "side", "expected"), [(3, 8, 3), (3, 28, 3), (0, 8, 1), (0, 16, 1), (0, 28, 2)]
)
@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_threads(threads, side, expected, backend):
    threadpoolctl = pytest.importorskip("threadpoolctl")
    torch.set_num_threads(2)
    images = torch.zeros(1, 1, side, side, dtype=torch.uint8)
    labels = torch.zeros(1, dtype=torch.int64)
    config = configure(VAEConfig, threads=threads, backend=backend)
    with threadpoolctl.threadpool_limits(2, "blas"):
        set_threads(config, Dataset("d", ("a",), images, labels, images, labels))
        blas = threadpoolctl.ThreadpoolController().select(user_api="blas").info()
        assert torch.get_num_threads() == expected
    assert {library["num_threads"] for library in blas} == {expected if backend == "numpy" else 2}


def test_too_little_memory(capsys, tmp_path):
    sizes = ["--hidden", 2**31 - 1, "--latent", 2**20]
    message = told(capsys, *sizes, "--output-dir", tmp_path / "run")
    assert "expected work that fits into memory" in message
    assert "use --microbatch-size, or a smaller --batch-size, --hidden" in message


def test_an_error_that_is_not_the_users_is_not_hidden(monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Digits, "read", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["vae"])


def test_the_home_folder_is_understood(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert f"got {tmp_path / 'run'}, which holds" in told(capsys, "--output-dir", "~/run")
    assert f"cannot use {tmp_path / 'run'}" in told(capsys, "--resume", "~/run")


def test_ctrl_c_while_the_report_is_made(capsys, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        assert "now a small classifier judges" in capsys.readouterr().err
        raise KeyboardInterrupt

    monkeypatch.setattr(vae_report, "make_report", interrupted)
    run = tmp_path / "run"
    assert cli.main(["vae", *TINY, "--epochs", "1", "--output-dir", str(run)]) == 130
    message = capsys.readouterr().err
    assert f"the training is saved, make the report with: sqloss vae --resume {run}" in message
    assert len(list((run / "checkpoints").iterdir())) == 1


def test_ctrl_c_outside_the_training(capsys, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Digits, "read", interrupted)
    assert cli.main(["vae"]) == 130
    assert "sqloss vae: interrupted" in capsys.readouterr().err
