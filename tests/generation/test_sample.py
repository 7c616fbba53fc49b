import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from sqloss import cli
from sqloss.generation import command, files
from sqloss.generation.files import write_images
from sqloss.generation.measures import Samples, measure, tables
from sqloss.models import classifier
from sqloss.models.mixture import Mixture
from sqloss.models.seeding import generator
from sqloss.student_t import draw_seed
from sqloss.training.saved_run import load_saved_run
from sqloss.training.shares import class_shares, share
from sqloss.training.trainer import Drawn
from sqloss.training.trainers import GAN, VAE
from sqloss.training.vae import priors
from sqloss.training.vae.report import generated

np = pytest.importorskip("numpy")
for needed in ("matplotlib", "scipy", "sklearn", "tqdm"):
    pytest.importorskip(needed)

PAGE = Path(__file__).parents[2] / "docs" / "sampling.md"
TINY = ["--train-limit", "120", "--num-samples", "30", "--epochs", "1", "--latent", "3"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few steps for the classifier, and communities of every third image."""
    before = torch.get_num_threads()
    monkeypatch.setattr(classifier, "STEPS", 5)
    monkeypatch.setattr(
        priors, "communities", lambda features, **_: torch.arange(len(features)) % 3
    )
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def run(trained_once, tmp_path, capsys):
    """A run of its own, a copy of one."""
    if not (trained_once / "vae").exists():
        given = ["--hidden", "8", "--output-dir", str(trained_once / "vae")]
        assert cli.main(["vae", *TINY, *given]) == 0
        capsys.readouterr()
    return shutil.copytree(trained_once / "vae", tmp_path / "run")


@pytest.fixture
def gan_run(tmp_path, capsys):
    pytest.importorskip("torchmetrics", exc_type=(ImportError, RuntimeError))
    place = tmp_path / "gan"
    given = ["--width", "2", "--ema", "0.9", "--conditional", "--output-dir", str(place)]
    assert cli.main(["gan", *TINY, *given]) == 0
    capsys.readouterr()
    return place


def sample(run, *arguments) -> int:
    return cli.main(["sample", str(run), *map(str, arguments)])


def told(capsys, run, *arguments) -> str:
    assert sample(run, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("sqloss sample: error: ")
    return captured.err


def contents(directory) -> dict:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_whole_command(run, tmp_path, capsys):
    before = contents(run)
    out, folder = tmp_path / "out", tmp_path / "images"
    given = ["--count", 70, "--prior", "communities", "--power", 1.5, "--temperature", 0.9]
    assert sample(run, *given, "--model", "standard", "--output-dir", out, "--folder", folder) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        *("samples.png", "samples.npz", "samples.json", "samples.md", "communities.png"),
    }
    assert (out / "samples.md").read_text() == printed
    for name in ("samples.png", "communities.png"):
        assert Image.open(out / name).size[0] > 100

    report = json.loads((out / "samples.json").read_text(), parse_constant=pytest.fail)
    assert (report["model"], report["prior"], report["power"]) == ("standard", "communities", 1.5)
    assert report["trained_for"] == "1 epoch and 0 steps"
    trained = load_saved_run(VAE, run, {})
    prior = priors.prior_of(trained, run, "standard", priors.PriorConfig("communities"))
    mixture = prior.mixture.with_power(1.5)
    assert [c["size"] for c in report["by_component"]] == mixture.sizes.tolist()
    assert [c["weight"] for c in report["by_component"]] == mixture.weights.tolist()
    assert sum(c["drawn"] for c in report["by_component"]) == 70

    stored = np.load(out / "samples.npz")
    draw = draw_seed(generator=generator(0, "samples"))
    expected = trained.models["standard"].sample(70, draw, prior=mixture, temperature=0.9)
    assert torch.equal(torch.from_numpy(stored["images"]), (255 * expected).round().byte())
    assert torch.equal(torch.from_numpy(stored["component"]), mixture.components(70, draw))
    counts = np.bincount(stored["classes"], minlength=10).tolist()
    assert report["generated"] == [share(count, 70) for count in counts]

    images = sorted(folder.iterdir())
    assert [path.name for path in images] == [f"{number:02}.png" for number in range(70)]
    for number in (0, 69):
        read = np.asarray(Image.open(images[number]))
        assert (read == stored["images"][number, 0]).all()

    after = contents(run)
    assert {path: after[path] for path in before} == before, "what was there stays as it is"
    assert {path.name for path in after.keys() - before.keys()} == {"classifier.pt"}


def test_the_default_is_what_the_report_counts(run, capsys):
    """The models' own prior, the seed and the batches of the report."""
    assert sample(run, "--count", 30) == 0
    [place] = run.glob("samples-*")
    report = json.loads((place / "samples.json").read_text())
    of_run = json.loads((run / "report.json").read_text())
    assert report["generated"] == of_run["models"]["cvar"]["generated"]
    assert report["classifier_test_accuracy"] == of_run["classifier_test_accuracy"]
    assert not (place / "communities.png").exists()
    trained = load_saved_run(VAE, run, {})
    [expected] = generated(trained.models["cvar"], trained.config)
    images = np.load(place / "samples.npz")["images"]
    assert torch.equal(torch.from_numpy(images), (255 * expected).round().byte())
    # The classifier that was kept is used, and another sampling has a place of its own
    kept = (run / "classifier.pt").read_bytes()
    assert sample(run, "--count", 30, "--prior", "mixture", "--components", 3, "--seed", 1) == 0
    assert (run / "classifier.pt").read_bytes() == kept
    assert len(list(run.glob("samples-*"))) == 2


@pytest.mark.skipif(not PAGE.exists(), reason="an sdist has no docs")
def test_the_example_of_the_page(run):
    trained = load_saved_run(VAE, run, {})
    model = trained.models["cvar"]
    priors.prior_of(trained, run, "cvar", priors.PriorConfig("communities"))
    path = run / "priors" / "communities-cvar-neighbours-10-resolution-1.pt"
    names = {"path": path, "model": model, "x": trained.data.test_images[:5] / 255}
    [block] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(block, names)
    assert names["images"].shape == (64, 1, 8, 8)
    assert names["losses"]["kl"].shape == (5,)
    assert names["groups"].shape == (len(trained.data),)


def test_a_generator_is_sampled_from_its_own_prior(gan_run, tmp_path, capsys):
    message = told(capsys, gan_run, "--prior", "communities")
    assert "--prior: expected standard for a run of sqloss gan, whose models have no enc" in message
    assert sample(gan_run, "--count", 30, "--output-dir", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "samples.json").read_text())
    of_run = json.loads((gan_run / "report.json").read_text())
    assert report["generated"] == of_run["models"]["cvar"]["generated"]
    assert set(np.load(tmp_path / "out" / "samples.npz")["label"]) <= set(range(10))
    training = load_saved_run(GAN, gan_run, {}).training
    draws = [generator(0, "samples") for _ in range(2)]
    hot, cold = (
        next(GAN.draw(training, "cvar", 9, each, command.Latents(None, temperature))).images
        for each, temperature in zip(draws, (1.0, 0.1), strict=True)
    )
    assert cold.std(0).mean() < hot.std(0).mean()


def test_what_is_refused_before_any_work(run, tmp_path, capsys, monkeypatch):
    before = contents(run)
    monkeypatch.setattr(command, "load_saved_run", pytest.fail)
    (tmp_path / "there").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"command": "flow"}')
    (tmp_path / "other2").mkdir()
    (tmp_path / "other2" / "config.json").write_text("{}")
    there = tmp_path / "there"
    for arguments, message in (
        (["--count", 0], "--count: expected a whole number from 1 to 2147483647, got 0"),
        (["--temperature", "nan"], "--temperature: expected a number from 0 up, got nan"),
        (["--seed", -1], "--seed: expected a whole number from 0 up, got -1"),
        (["--power", 1], "--power: expected --prior communities or mixture with it, got --prior s"),
        (["--output-dir", there], "--output-dir: expected a directory that is not there yet, got"),
        (["--folder", there], "--folder: expected a directory that is not there yet, got"),
        (
            ["--folder", there / "a" / "b", "--output-dir", there / "a"],
            "--folder: expected a directory outside of --output-dir",
        ),
    ):
        assert message in told(capsys, run, *arguments)
    for other, message in (
        ("nothing", "RUN_DIR: expected the directory of a run, with a config.json, got"),
        ("other", "RUN_DIR: expected a run of sqloss gan or sqloss vae, got one of sqloss flow"),
        ("other2", "RUN_DIR: cannot use"),
    ):
        assert message in told(capsys, tmp_path / other)
    assert contents(run) == before
    assert not list(there.iterdir())


def test_a_model_that_is_not_there(run, capsys):
    assert "--model: expected one of standard, cvar, got dro" in told(capsys, run, "--model", "dro")


def test_a_classifier_of_something_else_is_told(run, capsys):
    (run / "classifier.pt").write_bytes(b"nothing")
    assert "RUN_DIR: expected a file with the classifier of this data set" in told(capsys, run)


@pytest.mark.parametrize("failing", ["write_samples", "draw_communities", "write_images"])
def test_nothing_is_left_half_written(run, tmp_path, capsys, monkeypatch, failing):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, failing, full)
    out, folder = tmp_path / "out", tmp_path / "images"
    message = told(
        *(capsys, run, "--count", 9, "--prior", "communities"),
        *("--output-dir", out, "--folder", folder),
    )
    assert "No space left on device" in message
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"run"}


# its parts


def drawn() -> list[Drawn]:
    draws = torch.Generator().manual_seed(0)
    return [
        Drawn(torch.rand(n, 1, 8, 8, generator=draws), {"component": torch.arange(n) % 2})
        for n in (7, 4)
    ]


class Judge:
    """Sees class 1 in bright images; is sure of it in the brightest."""

    classes = 3

    def see(self, x):
        brightness = x.flatten(1).mean(1)
        probabilities = torch.stack([1 - brightness, brightness, 0 * brightness], 1)
        return None, probabilities

    def predict(self, x):
        return self.see(x)[1].argmax(1)


def test_samples_are_seen_by_the_classifier():
    samples = Samples.of(drawn(), Judge())
    assert samples.images.dtype == torch.uint8 and samples.images.shape == (11, 1, 8, 8)
    images = torch.cat([batch.images for batch in drawn()])
    assert torch.equal(samples.images, (255 * images).round().byte())
    assert samples.made_of["component"].tolist() == [0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1]
    measured = measure(samples, 3, None)
    assert measured["generated"] == class_shares(Judge(), [images])
    assert measured["clear"] == share(0, 11)
    assert measured["generated_clear"] is None


def test_components_without_a_draw_are_told_too():
    samples = Samples.of(drawn(), Judge())
    mixture = Mixture(
        torch.tensor([5.0, 4.0, 1.0]), torch.zeros(3, 1), torch.ones(3, 1, 1), power=1
    )
    measured = measure(samples, 3, mixture)
    assert [c["drawn"] for c in measured["by_component"]] == [6, 5, 0]
    assert measured["by_component"][2]["class"] is None
    report = measured | {
        "class_names": ["a|b", "*c*", "d"],
        "train_images": [5, 4, 1],
        "count": 11,
    }
    text = tables(report)
    assert r"\*c\*" in text
    assert re.search(r"\| 2 +\| +1 \| +33.33% \| +0 \| +- \|", text)


def test_colour_and_grey_images_are_written(tmp_path):
    for channels in (1, 3):
        images = torch.randint(256, (11, channels, 5, 4), dtype=torch.uint8)
        place = tmp_path / str(channels)
        place.mkdir()
        write_images(place, images)
        read = np.asarray(Image.open(place / "10.png")).reshape(5, 4, channels)
        assert (torch.from_numpy(read.copy()) == images[10].permute(1, 2, 0)).all()


@pytest.mark.parametrize("count", [1, 8, 11, 100])
def test_the_grid_has_the_first_images(count):
    images = torch.randint(256, (count, 1, 3, 3), dtype=torch.uint8)
    files.grid(images).savefig(io.BytesIO(), format="png")
