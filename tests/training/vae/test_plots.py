import dataclasses

import pytest
import torch
from PIL import Image

from sqloss.models import VAE
from sqloss.training.figures import BINS, edges, mosaic
from sqloss.training.vae.evaluation import evaluate
from sqloss.training.vae.plots import (
    draw_pictures,
    loss_curves,
    loss_distribution,
    reconstructions,
    samples,
)

pytest.importorskip("matplotlib")

PICTURES = [
    "vae_loss_curves.png",
    "vae_loss_distribution.png",
    "vae_reconstructions.png",
    "vae_samples.png",
]


@pytest.fixture
def trained(trainer, tmp_path_factory):
    training, _ = trainer.train(trainer.run(tmp_path_factory.mktemp("run")))
    losses = {n: evaluate(model, trainer.data, 0) for n, model in training.models.items()}
    return training, losses


def test_every_picture_is_a_png_of_a_sane_size(trainer, trained, tmp_path):
    training, losses = trained
    draw_pictures(tmp_path, training.models, losses, training.history, trainer.data, trainer.config)
    assert sorted(path.name for path in tmp_path.iterdir()) == PICTURES
    for name in PICTURES:
        with Image.open(tmp_path / name) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert 600 < picture.width < 2500
            assert 200 < picture.height < 1500
            assert len(picture.convert("L").getcolors(256)) > 10, "not blank"


def test_one_model_and_colour_images(trainer, tmp_path):
    images = torch.randint(256, (30, 3, 6, 5), dtype=torch.uint8)
    data = dataclasses.replace(trainer.data, test_images=images)
    models = {"standard": VAE((3, 6, 5), hidden=(4,), latent=2)}
    losses = {"standard": evaluate(models["standard"], data, 0)}
    objectives = {"test_objective_standard": 2.0, "test_objective_cvar": 3.0}
    history = [{"epoch": 1, "model": "standard"} | objectives]
    draw_pictures(tmp_path, models, losses, history, data, trainer.config)
    assert sorted(path.name for path in tmp_path.iterdir()) == PICTURES


def test_each_panel_measures_all_models_by_one_objective(trained):
    training, _ = trained
    figure = loss_curves(training.history, {"standard": "mean of -ELBO", "cvar": "the tail"})
    metrics = ["test_objective_standard", "test_objective_cvar"]
    assert [axes.get_title() for axes in figure.axes] == ["mean of $-$ELBO", "the tail"]
    for axes, metric in zip(figure.axes, metrics, strict=True):
        curves = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        assert curves == {
            name: [row[metric] for row in training.history if row["model"] == name]
            for name in ("standard", "cvar")
        }
        assert axes.get_ylabel() == "nats per test image"


def test_the_distribution_marks_mean_and_tail_on_common_bins(trained):
    _, losses = trained
    axes = loss_distribution(losses, alpha=0.8).axes[0]
    marked = sorted(line.get_xdata()[0] for line in axes.lines)
    bounds = [of_model["negative_elbo"] for of_model in losses.values()]
    expected = [b.mean().item() for b in bounds] + [b.topk(4).values.mean().item() for b in bounds]
    assert marked == pytest.approx(sorted(expected))
    edges = {tuple(patch.get_xy()[:, 0].tolist()) for patch in axes.patches if not patch.get_fill()}
    assert len(edges) == 1


def test_the_distribution_counts_every_image():
    # In float32, the edges of these would lie within them.
    bound = torch.rand(1000, dtype=torch.float64) * 0.3 + 0.1
    axes = loss_distribution({"standard": {"negative_elbo": bound}}, alpha=0.8).axes[0]
    filled = next(container for container in axes.containers if len(container) == BINS)
    assert sum(patch.get_height() for patch in filled) == 1000


@pytest.mark.parametrize("highest", [0.3, 0.1 + 1e-9, 0.1])
def test_the_edges_go_from_the_lowest_to_the_highest_value(highest):
    between = edges([torch.tensor([0.1, highest], dtype=torch.float64)])
    assert (between[0], between[-1], len(between)) == (0.1, highest, BINS + 1)
    assert between == sorted(between)


def test_samples_of_equal_models_are_equal(trained):
    training, _ = trained
    model = training.models["standard"]
    panels = samples({"standard": model, "cvar": model}, seed=0).axes
    first, second = (axes.images[0].get_array() for axes in panels)
    assert (first == second).all()


def test_the_worst_reconstructed_images_are_shown(trainer, trained):
    training, losses = trained
    average = sum(of_model["reconstruction"] for of_model in losses.values()) / 2
    worst = average.argmax()
    panel = reconstructions(training.models, losses, trainer.data).axes[1]
    shown = torch.as_tensor(panel.images[0].get_array().data)
    height, width = trainer.data.shape[1:]
    corner = shown[:height, :width]
    torch.testing.assert_close(corner, trainer.data.test_images[worst, 0] / 255)
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        "original",
        "standard",
        "cvar",
    ]


def test_a_mosaic_goes_row_by_row():
    images = torch.arange(6.0).reshape(6, 1, 1, 1) / 10
    expected = [[0.0, 1.0, 0.1, 1.0, 0.2], [1.0] * 5, [0.3, 1.0, 0.4, 1.0, 0.5]]
    assert torch.allclose(mosaic(images, columns=3)[:, :, 0], torch.tensor(expected))
