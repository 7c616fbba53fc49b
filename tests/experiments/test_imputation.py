import csv
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sqloss import cli
from sqloss.common.flags import configure
from sqloss.datasets import load_dataset
from sqloss.experiments.imputation import (
    COLUMNS,
    ImputeConfig,
    baseline_methods,
    bottom_half,
    errors,
    impute,
    make_masks,
    mean_pixels,
    measure,
    nearest_neighbours,
    random_pixels,
    random_squares,
    structural_similarity,
    vae_methods,
)
from sqloss.experiments.imputation_plots import MISSING_COLOUR, draws_of_one_image, grid
from sqloss.models import VAE, classifier
from sqloss.models.classifier import Classifier
from sqloss.models.seeding import generator
from sqloss.training import UserError
from sqloss.training.progress import Silence
from sqloss.training.run import Run
from sqloss.training.vae.config import VAEConfig
from sqloss.training.vae.loop import begin

for needed in ("joblib", "matplotlib", "scipy", "sklearn", "tqdm"):
    pytest.importorskip(needed)
# So fails a torchvision built for another torch.
pytest.importorskip("torchmetrics", exc_type=(ImportError, RuntimeError))

SMALL = ImputeConfig(draws=3, iterations=4, burn_in=2, components=5, neighbour_images=100)
METHODS = ["one-shot", "pseudo-Gibbs", "mean", "PCA", "kNN"]
counts, sides, seeds = st.integers(1, 5), st.integers(1, 12), st.integers(0, 3)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module", params=["normal", "t"])
def methods(request, digits):
    torch.manual_seed(0)
    model = VAE(digits.shape, (16,), 4, prior=request.param)
    methods = vae_methods({"model": model}, digits.train_images, SMALL, 0)
    return by_name(methods | baseline_methods(digits.train_images, SMALL, 0))


def by_name(methods):
    return {name: method for (_, name), method in methods.items()}


def random_images(count, channels, height, width):
    return torch.rand(count, channels, height, width)


# masks


@given(counts, sides, sides, st.floats(0.001, 0.999), seeds)
def test_random_pixels_are_the_stated_share_of_every_image(count, height, width, share, seed):
    mask = random_pixels(count, height, width, share, generator(seed))
    assert (mask.shape, mask.dtype) == ((count, 1, height, width), torch.bool)
    assert mask.sum((1, 2, 3)).tolist() == [max(1, round(share * height * width))] * count
    assert mask.equal(random_pixels(count, height, width, share, generator(seed)))


@given(counts, sides, sides, st.integers(1, 3), st.integers(1, 15), seeds)
def test_random_squares_are_of_the_stated_side(count, height, width, squares, side, seed):
    mask = random_squares(count, height, width, squares, side, generator(seed))
    assert (mask.shape, mask.dtype) == ((count, 1, height, width), torch.bool)
    cut = min(side, height, width)
    sizes = mask.sum((1, 2, 3))
    assert (sizes >= cut**2).all()
    assert (sizes <= squares * cut**2).all()
    # Every missing pixel lies in a whole missing square.
    corners = torch.nn.functional.unfold(mask.double(), cut).eq(1).all(1)
    assert (corners.sum(1) >= 1).all()
    covered = torch.nn.functional.fold(
        corners.double()[:, None].expand(-1, cut * cut, -1), (height, width), cut
    )
    assert (covered > 0).equal(mask)
    assert mask.equal(random_squares(count, height, width, squares, side, generator(seed)))


def test_a_single_square_goes_everywhere_it_fits():
    mask = random_squares(500, 5, 4, 1, 2, generator(0))
    assert (mask.sum((1, 2, 3)) == 4).all()
    assert len(mask.unique(dim=0)) == 4 * 3


@pytest.mark.parametrize(("height", "missing"), [(28, 14), (5, 3), (1, 1)])
def test_the_bottom_half(height, missing):
    mask = bottom_half(2, height, 3)
    assert (mask.shape, mask.dtype) == ((2, 1, height, 3), torch.bool)
    assert mask[:, :, -missing:].all()
    assert not mask[:, :, :-missing].any()


@pytest.mark.parametrize(("side", "expected"), [(28, 7), (64, 7), (8, 2), (3, 1)])
def test_squares_fit_the_images(side, expected):
    masks = make_masks(torch.zeros(50, 3, side, side), ImputeConfig(squares=1), 0)
    assert (masks["random squares"].sum((1, 2, 3)) == expected**2).all()
    assert masks["random squares"].shape == (50, 1, side, side)


def test_masks_differ_by_seed_only():
    images = torch.zeros(20, 1, 28, 28)
    first, again, other = (make_masks(images, ImputeConfig(), seed) for seed in (0, 0, 1))
    assert list(first) == ["random pixels", "random squares", "bottom half"]
    assert all(first[name].equal(again[name]) for name in first)
    assert not first["random pixels"].equal(other["random pixels"])
    assert not first["random squares"].equal(other["random squares"])


# methods


@pytest.mark.parametrize("name", METHODS)
def test_a_method_sees_the_mask_and_not_the_values_below_it(methods, digits, name):
    images = digits.test_images[:20] / 255
    for mask in make_masks(images, SMALL, 0).values():
        imputed = impute(methods[name], images, mask)
        others = [
            torch.where(mask, value, images) for value in (0.0, 1.0, torch.rand_like(images), 1e9)
        ]
        assert all(impute(methods[name], other, mask).equal(imputed) for other in others)
        observed = ~mask
        assert imputed[observed].equal(images[observed])
        assert imputed.isfinite().all()
        assert ((imputed >= 0) & (imputed <= 1)).all()
        assert not imputed[mask].equal(images[mask])


@pytest.mark.parametrize("name", METHODS)
def test_a_method_itself_keeps_what_is_observed(methods, digits, name):
    images = digits.test_images[:20] / 255
    mask = make_masks(images, SMALL, 0)["random pixels"]
    completed = methods[name](images.masked_fill(mask, torch.nan))
    assert completed[~mask].equal(images[~mask])


@pytest.mark.parametrize("name", METHODS)
def test_a_method_repeats(methods, digits, name):
    images = digits.test_images[:20] / 255
    mask = make_masks(images, SMALL, 0)["bottom half"]
    assert impute(methods[name], images, mask).equal(impute(methods[name], images, mask))


@pytest.mark.parametrize("name", METHODS)
def test_nothing_observed_and_nothing_missing(methods, digits, name):
    images = digits.test_images[:3] / 255
    nothing, everything = torch.zeros(3, 1, 8, 8).bool(), torch.ones(3, 1, 8, 8).bool()
    assert impute(methods[name], images, nothing).equal(images)
    assert impute(methods[name], images, everything).isfinite().all()


def test_what_the_encoder_sees_first_is_the_training_mean(digits):
    seen = []

    class Spy(VAE):
        def encode(self, x):
            seen.append(x)
            return super().encode(x)

    models = {"spy": Spy(digits.shape, (16,), 4)}
    methods = by_name(vae_methods(models, digits.train_images, SMALL, 0))
    images = digits.test_images[:5] / 255
    mask = make_masks(images, SMALL, 0)["random squares"]
    mean = (digits.train_images.double() / 255).mean(0).float()
    for name in ("one-shot", "pseudo-Gibbs"):
        seen.clear()
        impute(methods[name], images, mask)
        torch.testing.assert_close(seen[0], torch.where(mask, mean, images))


def test_pseudo_gibbs_is_the_mean_of_a_chain_that_feeds_its_guesses_back(digits):
    torch.manual_seed(0)
    model = VAE(digits.shape, (16,), 4)
    images = digits.test_images[:5] / 255
    mask = make_masks(images, SMALL, 0)["random pixels"]

    def imputed(iterations, burn_in):
        config = ImputeConfig(iterations=iterations, burn_in=burn_in)
        methods = vae_methods({"m": model}, digits.train_images, config, 0)
        return impute(methods["m", "pseudo-Gibbs"], images, mask)

    states = [imputed(iterations, iterations - 1) for iterations in (1, 2, 3)]
    torch.testing.assert_close(imputed(3, 1), (states[1] + states[2]) / 2)
    torch.testing.assert_close(imputed(3, 0), torch.stack(states).mean(0))

    seen = []
    encode = model.encode
    model.encode = lambda x: (seen.append(x), encode(x))[1]
    imputed(3, 0)
    assert seen[1].equal(states[0])
    assert seen[2].equal(states[1])
    assert not states[0].equal(states[1])


def test_one_shot_is_the_mean_of_its_draws(digits):
    """Far from its location a t draw is far: the mean of many is not the image at the mean."""
    model = VAE(digits.shape, (16,), 4)
    images = digits.test_images[:5] / 255
    mask = make_masks(images, SMALL, 0)["bottom half"]

    def imputed(draws, seed):
        config = ImputeConfig(draws=draws)
        methods = vae_methods({"m": model}, digits.train_images, config, seed)
        return impute(methods["m", "one-shot"], images, mask)

    def spread(draws):
        return (imputed(draws, 0) - imputed(draws, 1)).std().item()

    assert spread(400) < spread(1) / 5  # 1/20 expected


def test_nearest_neighbours_are_those_of_scikit_learn():
    from sklearn.impute import KNNImputer

    train = torch.randint(256, (60, 1, 4, 3), dtype=torch.uint8)
    x = torch.rand(20, 1, 4, 3)
    mask = torch.rand(20, 1, 4, 3) < 0.5
    method = nearest_neighbours(train, 4, 0, mean_pixels(train), seed=0)
    imputer = KNNImputer(n_neighbors=4).fit((train / 255).flatten(1).numpy())
    expected = imputer.transform(x.masked_fill(mask, torch.nan).flatten(1).numpy())
    torch.testing.assert_close(
        impute(method, x, mask).flatten(1), torch.from_numpy(expected).float()
    )


def test_nearest_neighbours_are_looked_for_among_so_many():
    train = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 1, 2) * 20
    method = nearest_neighbours(train, 1, 3, mean_pixels(train), seed=0)
    x = (torch.arange(10).view(10, 1, 1, 1) * 20 / 255).expand(10, 1, 1, 2).clone()
    mask = torch.tensor([True, False]).view(1, 1, 1, 2)
    assert len(impute(method, x, mask)[..., 0].unique()) == 3


def test_pca_finds_images_of_its_own_subspace():
    basis = torch.rand(2, 1, 4, 4)
    weights = torch.rand(40, 2)
    images = torch.einsum("nk,kchw->nchw", weights, basis) / 2
    train = (images * 255).round().to(torch.uint8)
    method = by_name(baseline_methods(train, ImputeConfig(components=2, neighbours=1), 0))["PCA"]
    mask = random_pixels(40, 4, 4, 0.3, generator(0))
    assert errors(impute(method, images, mask), images, mask)["rmse"] < 0.01


def test_pca_and_neighbours_beat_the_mean_on_digits(digits):
    methods = by_name(baseline_methods(digits.train_images, ImputeConfig(), 0))
    images = digits.test_images / 255
    for mask in make_masks(images, ImputeConfig(), 0).values():
        rmse = {
            n: errors(impute(m, images, mask), images, mask)["rmse"] for n, m in methods.items()
        }
        assert rmse["PCA"] < rmse["mean"]
        assert rmse["kNN"] < 0.9 * rmse["mean"]


# metrics


def test_errors_are_over_the_missing_pixels_only():
    originals = torch.tensor([0.0, 0.5, 1.0, 0.2]).view(2, 1, 1, 2)
    imputed = torch.tensor([0.3, 0.0, 0.6, 0.2]).view(2, 1, 1, 2)
    mask = torch.tensor([True, False, True, True]).view(2, 1, 1, 2)
    expected = {"rmse": math.sqrt((0.09 + 0.16 + 0) / 3), "mae": (0.3 + 0.4 + 0) / 3}
    assert errors(imputed, originals, mask) == pytest.approx(expected)


def test_all_channels_of_a_missing_pixel_count():
    originals = torch.zeros(1, 3, 1, 2)
    imputed = torch.tensor([[0.3, 9.0], [0.0, 9.0], [0.6, 9.0]]).view(1, 3, 1, 2)
    mask = torch.tensor([True, False]).view(1, 1, 1, 2)
    assert errors(imputed, originals, mask)["mae"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("shape", "window"), [((2, 1, 9, 12), 7), ((3, 3, 6, 8), 5), ((1, 1, 2, 9), 1)]
)
def test_structural_similarity_by_its_formula(shape, window):
    x, y = torch.rand(shape).double(), torch.rand(shape).double()

    def windows(images):
        half = window // 2
        padded = torch.nn.functional.pad(images, (half, half, half, half), mode="reflect")
        return torch.nn.functional.unfold(padded, window).view(len(images), shape[1], window**2, -1)

    wx, wy = windows(x), windows(y)
    mx, my = wx.mean(2), wy.mean(2)
    vx, vy = wx.var(2, correction=0), wy.var(2, correction=0)
    covariance = (wx * wy).mean(2) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    similarity = (
        (2 * mx * my + c1) * (2 * covariance + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    )
    assert structural_similarity(x, y) == pytest.approx(similarity.mean().item(), abs=1e-6)
    assert structural_similarity(x, x) == pytest.approx(1)


def test_a_row_per_mask_and_method(digits, methods):
    images, labels = digits.test_images[:30], digits.test_labels[:30]
    masks = make_masks(images, SMALL, 0)
    named = {("standard", name): method for name, method in methods.items()}
    torch.manual_seed(0)
    judge = Classifier(digits.shape, 10)
    rows, imputed = measure(named, images, labels, masks, judge)
    assert [(row["mask"], row["method"]) for row in rows] == [
        (m, n) for m in masks for n in METHODS
    ]
    for row in rows:
        assert tuple(row) == COLUMNS
        guess = imputed[row["mask"]]["standard", row["method"]]
        mask = masks[row["mask"]]
        assert guess.equal(impute(methods[row["method"]], images / 255, mask))
        assert errors(guess, images / 255, mask).items() <= row.items()
        assert row["missing"] == mask.double().mean().item()
        right = (judge(guess).argmax(1) == labels).double().mean().item()
        assert row["accuracy"] == right
    originals = (judge(images / 255).argmax(1) == labels).double().mean().item()
    assert {row["accuracy_of_originals"] for row in rows} == {originals}


# settings


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("missing", [0.0, 1.0, -0.1, math.nan]),
        ("squares", [0, 2**31]),
        ("square_side", [-1]),
        ("test_images", [-1]),
        ("draws", [0]),
        ("iterations", [0]),
        ("burn_in", [-1, 60, 61]),
        ("components", [0]),
        ("neighbours", [0]),
        ("neighbour_images", [-1, 2**31]),
    ],
)
def test_wrong_settings(name, values):
    for value in values:
        with pytest.raises(
            UserError, match=rf"^--{name.replace('_', '-')}: expected .*, got {value}"
        ):
            ImputeConfig(**{name: value})


# the command line


TINY = ["--draws", "2", "--iterations", "3", "--burn-in", "1", "--neighbour-images", "50"]
FEW = [*TINY, "--test-images", "20"]
TRAINING = ["--train-limit", "200", "--hidden", "8", "--latent", "3", "--epochs", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    config = configure(
        VAEConfig,
        **{"train_limit": 200, "hidden": "8", "latent": 3, "epochs": 1},
        **{"prior": "t", "df": 4.0, "num_samples": 20},
    )
    run = Run.new(directory, config)
    data = load_dataset("digits", train_limit=config.train_limit).imbalanced(
        config.imbalance, config.seed
    )
    training = begin(config, data)
    assert run.start(training, data).fit(Silence())
    return directory


@pytest.fixture
def quick_classifier(monkeypatch):
    monkeypatch.setattr(classifier, "STEPS", 5)


def test_a_run_imputes(run, capsys, quick_classifier):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert cli.main(["impute", str(run), *FEW]) == 0
    told = capsys.readouterr()
    made = {path for path in run.rglob("*") if path.is_file()} - before.keys()
    assert {path.name for path in made} == {
        "impute.csv",
        "imputation_bottom_half.png",
        "imputation_draws.png",
        "imputation_random_pixels.png",
        "imputation_random_squares.png",
    }
    assert all(path.read_bytes() == content for path, content in before.items())
    with (run / "impute.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    of_models = [(m, n) for m in ("standard", "cvar") for n in METHODS[:2]]
    names = [*of_models, *(("baseline", name) for name in METHODS[2:])]
    masks = ["random pixels", "random squares", "bottom half"]
    assert [(row["mask"], row["model"], row["method"]) for row in rows] == [
        (mask, *name) for mask in masks for name in names
    ]
    assert f"{float(rows[0]['rmse']):.4f}" in told.out
    assert "of the originals right" in told.err
    for path in made:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
                assert (600 < picture.width < 2500, 200 < picture.height < 1500) == (True, True)

    content = (run / "impute.csv").read_bytes()
    assert cli.main(["impute", str(run), *FEW]) == 0, "again"
    assert (run / "impute.csv").read_bytes() == content


def test_priors_are_compared_and_what_is_done_is_kept(tmp_path, capsys, quick_classifier):
    directory = tmp_path / "comparison"
    command = ["impute", "--compare", *FEW, *TRAINING, "--dfs", "3", "--betas", "none"]
    command += ["--output-dir", str(directory), "--seeds", "2"]
    assert cli.main(command) == 0
    first = capsys.readouterr()
    assert "6 of 6 runs to do" in first.err
    written = {path.name for path in directory.iterdir()}
    assert {"sweep.csv", "sweep.json", "sweep.md", "classifier.pt"} < written
    with (directory / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # Two seeds, three masks, two methods of two models each and three baselines.
    assert len(rows) == 2 * 3 * (2 * 2 + 3)
    report = (directory / "sweep.md").read_text()
    assert "RMSE: difference from normal" in report
    assert "Accuracy: difference from one-shot" in report
    assert "RMSE: difference from normal" in first.out

    assert cli.main(command) == 0
    second = capsys.readouterr()
    assert "0 of 6 runs to do" in second.err
    assert second.out == first.out

    assert cli.main([*command, "--draws", "3"]) == 2
    assert "these differ: draws" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "RUN_DIR: expected the directory of a run, or --compare, got neither"),
        (["RUN", "--compare"], "RUN_DIR: expected the directory of a run, or --compare, got both"),
        (["/nowhere"], "RUN_DIR: expected the directory of a run, with a config.json, got"),
        (["RUN", "--missing", "1"], "--missing: expected a number between 0 and 1, got 1.0"),
        (["RUN", "--epochs", "2"], "--epochs: expected no such flag with RUN_DIR"),
        (["RUN", "--seeds", "2"], "--seeds: expected no such flag with RUN_DIR"),
        (["RUN", "--output-dir", "x"], "--output-dir: expected no such flag with RUN_DIR"),
        (["--compare", "--dfs", "0.1"], "--compare: t, df 0.1: --df: expected a number from 0.5"),
        (["--compare", "--seeds", "1"], "--seeds: expected a whole number from 2"),
    ],
)
def test_wrong_flags(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    filled_in = [str(run) if argument == "RUN" else argument for argument in arguments]
    assert cli.main(["impute", *filled_in]) == 2
    assert capsys.readouterr().err.startswith(f"sqloss impute: error: {message}")
    assert not list(tmp_path.iterdir())


# pictures


def test_the_grid_has_a_row_each_and_a_colour_for_what_is_missing(digits):
    originals = digits.test_images[:4] / 255
    mask = bottom_half(4, 8, 8)
    guesses = {("standard", "one-shot"): torch.zeros(9, 1, 8, 8), ("baseline", "kNN"): originals}
    axes = grid(originals, mask, guesses).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["original", "masked", "standard, one-shot", "kNN"]
    shown = torch.as_tensor(axes.images[0].get_array().data)
    assert shown.shape == (4 * 9 - 1, 4 * 9 - 1, 3)
    column = slice(9, 17)  # of the second image
    torch.testing.assert_close(shown[9:13, column], originals[1, 0, :4, :, None].expand(4, 8, 3))
    assert shown[13:17, column].equal(torch.tensor(MISSING_COLOUR).expand(4, 8, 3))
    assert (shown[18:26, column] == 0).all()
    torch.testing.assert_close(shown[27:, column], originals[1, 0, :, :, None].expand(8, 8, 3))


def test_one_image_is_reconstructed_ten_times_and_drawn_thirty_times(digits):
    torch.manual_seed(0)
    models = {"standard": VAE(digits.shape, (8,), 3), "cvar": VAE(digits.shape, (8,), 3)}
    figure = draws_of_one_image(models, bottom_half(1, 8, 8), digits, seed=0)
    assert [axes.get_title() for axes in figure.axes] == ["standard", "cvar"]
    shown = torch.as_tensor(figure.axes[0].images[0].get_array().data)
    rows = [shown[9 * i : 9 * i + 8] for i in range(5)]
    cells = [[row[:, 9 * j : 9 * j + 8, 0] for j in range(10)] for row in rows]
    original = digits.test_images[0, 0] / 255
    torch.testing.assert_close(cells[0][0], original)
    draws = torch.stack([cell for row in cells[2:] for cell in row])
    assert draws[:, :4].equal(original[:4].expand(30, 4, 8)), "what is observed stays"
    assert len(draws.unique(dim=0)) == 30
    assert len(torch.stack(cells[1]).unique(dim=0)) == 10


def test_colour_images_are_drawn_too():
    originals = torch.rand(2, 3, 6, 5)
    axes = grid(originals, bottom_half(2, 6, 5), {("baseline", "mean"): originals}).axes[0]
    shown = torch.as_tensor(axes.images[0].get_array().data)
    torch.testing.assert_close(shown[:6, :5], originals[0].permute(1, 2, 0))
