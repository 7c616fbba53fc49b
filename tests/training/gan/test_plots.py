import dataclasses

import pytest
import torch
from PIL import Image

from sqloss.common.flags import changed
from sqloss.models.gan_losses import fake_losses, real_losses
from sqloss.models.pixels import pixels
from sqloss.models.seeding import generator as stream
from sqloss.training import figures
from sqloss.training.figures import BINS
from sqloss.training.gan import plots
from sqloss.training.gan.config import GANConfig
from sqloss.training.gan.generation import draw_noise, generate
from sqloss.training.gan.loop import D_METRICS, G_METRICS, GANTraining, begin
from sqloss.training.gan.plots import (
    CODE_STEPS,
    CODES_SHOWN,
    codes,
    draw_pictures,
    logits,
    loss_curves,
    loss_distribution,
    nearest,
    noise_by_code,
    samples,
)
from sqloss.training.run import Run

for needed in ("matplotlib", "sklearn"):
    pytest.importorskip(needed)

PICTURES = {
    "gan_loss_curves.png",
    "gan_loss_distribution.png",
    "gan_nearest.png",
    "gan_samples.png",
}


@pytest.fixture
def train(trainer, tmp_path_factory):
    """A run of two epochs with these changes to its settings."""

    def run(**changes) -> GANTraining:
        config = changed(trainer.config, epochs=2, **changes)
        return trainer.train(Run.new(tmp_path_factory.mktemp("run"), config))[0]

    return run


def draw_all(directory, training, data, history):
    draw_pictures(directory, training.models, training.generators, history, data, training.config)


def shown(axes) -> torch.Tensor:
    """The mosaic of a panel, [rows, columns, C]."""
    image = torch.as_tensor(axes.images[0].get_array().data)
    return image if image.dim() == 3 else image[:, :, None]  # matplotlib drops a single channel


def tile(axes, row: int, column: int, shape) -> torch.Tensor:
    """One of the images of a mosaic, [C, H, W]."""
    _, height, width = shape
    top, left = row * (height + 1), column * (width + 1)
    return shown(axes)[top : top + height, left : left + width].permute(2, 0, 1)


def test_every_picture_is_a_png_of_a_sane_size(trainer, train, tmp_path):
    training = train(conditional=True, info_codes=2)
    draw_all(tmp_path, training, trainer.data, training.history)
    expected = PICTURES | {"gan_codes.png"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    for name in expected:
        with Image.open(tmp_path / name) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert 500 < picture.width < 2500, name
            assert 100 < picture.height < 1500, name
            assert len(picture.convert("L").getcolors(256)) > 10, "not blank"


def test_colour_images_that_are_no_squares(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "DPI", 20)
    images = torch.randint(256, (30, 3, 9, 6), dtype=torch.uint8)
    data = dataclasses.replace(
        trainer.data, train_images=images, train_labels=torch.arange(30) % 3, test_images=images
    )
    training = begin(changed(trainer.config, alpha=0.0), data)
    row = {"epoch": 1, "model": "standard"} | dict.fromkeys((*D_METRICS, *G_METRICS), 0.5)
    draw_all(tmp_path, training, data, [row])
    assert {path.name for path in tmp_path.iterdir()} == PICTURES


def test_each_panel_has_one_metric_of_all_models(train):
    training = train()
    figure = loss_curves(training.history, training.config)
    panels = {
        "discriminator: mean of the losses": "d_loss_mean",
        "discriminator: CVaR 0.8 of the losses": "d_loss_cvar",
        "generator: mean of the losses": "g_loss_mean",
        "generator: CVaR 0.8 of the losses": "g_loss_cvar",
    }
    assert [axes.get_title() for axes in figure.axes] == list(panels)
    for axes, metric in zip(figure.axes, panels.values(), strict=True):
        curves = {
            line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
            for line in axes.lines
        }
        assert curves == {
            name: ([1, 2], [row[metric] for row in training.history if row["model"] == name])
            for name in ("standard", "cvar")
        }


# the distribution of the losses


def shares(patch) -> torch.Tensor:
    """The heights of a histogram that is an outline."""
    return torch.tensor(patch.get_xy()[1:-1:2, 1])


@pytest.mark.parametrize(
    "changes", [{}, {"loss": "hinge", "conditional": True}, {"loss": "wgan-gp", "ema": 0.5}]
)
def test_one_discriminator_judges_the_images_of_all_models(trainer, train, changes):
    training = train(**changes)
    config, data = training.config, trainer.data
    figure = loss_distribution(training.models, training.generators, data, config)
    assert [axes.get_title() for axes in figure.axes] == [
        "before standard's discriminator",
        "before cvar's discriminator",
    ]
    for axes, model in zip(figure.axes, training.models.values(), strict=True):
        judge = model.discriminator.eval()
        losses = {}
        for name, generator in training.generators.items():
            noise = draw_noise(1000, generator, stream(config.seed, "samples"))
            images = 2 * generate(generator, noise) - 1
            losses[name] = fake_losses(config.loss, judge(images, noise.labels)).detach()
        labels = data.test_labels if config.conditional else None
        of_real = real_losses(config.loss, judge(data.test_images / 127.5 - 1, labels)).detach()

        filled = next(each for each in axes.containers if len(each) == BINS)
        edges = [bar.get_x() for bar in filled] + [filled[-1].get_x() + filled[-1].get_width()]
        assert edges[0] == pytest.approx(min(of_real.min(), *(x.min() for x in losses.values())))
        assert edges[-1] == pytest.approx(max(of_real.max(), *(x.max() for x in losses.values())))
        assert sum(bar.get_height() for bar in filled) == pytest.approx(1), "of 20 images"
        outlines = {patch.get_label(): patch for patch in axes.patches if not patch.get_fill()}
        assert outlines.keys() == {"by standard", "by cvar"}
        for name, values in losses.items():
            outline = outlines[f"by {name}"]
            assert shares(outline).sum() == pytest.approx(1), "of 1000 images"
            bins = torch.tensor(outline.get_xy()[::2, 0])
            expected = torch.histogram(values.double(), bins).hist
            # an image at an edge may fall on either side of it, by rounding
            assert (1000 * shares(outline) - expected).abs().sum() <= 4.001


def test_an_image_is_judged_by_itself(trainer, train):
    judge = train().models["cvar"].discriminator
    assert judge.training
    before = {name: tensor.clone() for name, tensor in judge.state_dict().items()}
    images = trainer.data.test_images / 127.5 - 1
    with torch.no_grad():
        together, single = logits(judge, images, None), logits(judge, images[3:4], None)
    torch.testing.assert_close(single, together[3:4])
    assert judge.training
    assert all(torch.equal(before[name], tensor) for name, tensor in judge.state_dict().items())


def test_a_discriminator_that_gives_one_logit_to_all_is_drawn_too(trainer, tmp_path):
    training = trainer.begin(changed(trainer.config, loss="lsgan", alpha=0.0))
    training.models["standard"].discriminator.head.weight.data.zero_()
    figure = loss_distribution(training.models, training.generators, trainer.data, training.config)
    figure.savefig(tmp_path / "picture.png")


# images


def test_samples_of_equal_models_are_equal(trainer):
    generator = trainer.begin(trainer.config).generators["standard"]
    panels = samples({"standard": generator, "cvar": generator}, trainer.data, seed=0).axes
    first, second = map(shown, panels)
    assert torch.equal(first, second)
    noise = draw_noise(64, generator, stream(0, "samples"))
    torch.testing.assert_close(tile(panels[0], 7, 7, (1, 8, 8)), generate(generator, noise)[63])


@pytest.mark.parametrize(("classes", "rows"), [(3, 3), (12, 10)])
def test_the_rows_of_a_conditional_model_are_classes(trainer, classes, rows):
    names = tuple(f"class {i}" for i in range(classes))
    data = dataclasses.replace(trainer.data, class_names=names)
    config = changed(trainer.config, conditional=True, alpha=0.0)
    generators = begin(config, data).generators
    [panel] = samples(generators, data, seed=0).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == list(names[:rows])
    assert shown(panel).shape[0] == rows * 9 - 1
    labels = torch.arange(rows).repeat_interleave(8)
    noise = draw_noise(8 * rows, generators["standard"], stream(0, "samples"), labels)
    image = generate(generators["standard"], noise)[8 * (rows - 1)]
    torch.testing.assert_close(tile(panel, rows - 1, 0, (1, 8, 8)), image)


def test_the_nearest_training_images_are_below(trainer, monkeypatch):
    repeated = pixels(trainer.data.train_images[5:15])
    repeated[0, 0, 0, 0] = (repeated[0, 0, 0, 0] + 0.25) % 1
    monkeypatch.setattr(plots, "generate", lambda model, noise: repeated)
    generators = trainer.begin(trainer.config).generators
    panels = nearest(generators, trainer.data, seed=0).axes
    assert len(panels) == 2
    for panel, name in zip(panels, generators, strict=True):
        assert [label.get_text() for label in panel.get_yticklabels()] == [name, "nearest"]
        for column in range(10):
            torch.testing.assert_close(tile(panel, 0, column, (1, 8, 8)), repeated[column])
            original = pixels(trainer.data.train_images[5 + column])
            torch.testing.assert_close(tile(panel, 1, column, (1, 8, 8)), original)
        distances = [label.get_text() for label in panel.get_xticklabels()]
        moved = (repeated[0] - pixels(trainer.data.train_images[5])).norm().item()
        assert distances == [f"{moved:.2f}", *["0.00"] * 9]


# codes


@pytest.mark.parametrize("conditional", [False, True])
def test_row_k_varies_code_k_only(trainer, conditional):
    config = changed(trainer.config, info_codes=3, conditional=conditional)
    generators = trainer.begin(config).generators
    noise = noise_by_code(generators["cvar"], 3, seed=0)
    assert len(noise.z) == 3 * CODE_STEPS
    assert (noise.z == noise.z[0]).all()
    if conditional:
        assert (noise.labels == noise.labels[0]).all()
    else:
        assert noise.labels is None
    rows = noise.codes.unflatten(0, (3, CODE_STEPS))
    steps = torch.linspace(-1, 1, CODE_STEPS)
    for code, row in enumerate(rows):
        assert torch.equal(row[:, code], steps)
        others = [other for other in range(3) if other != code]
        assert (row[:, others] == 0).all()

    panels = codes(generators, seed=0).axes
    assert [panel.get_title() for panel in panels] == ["standard", "cvar"]
    labels = [label.get_text() for label in panels[1].get_yticklabels()]
    assert labels == ["code 1", "code 2", "code 3"]
    images = generate(generators["cvar"], noise)
    for row in range(3):
        for column in range(CODE_STEPS):
            image = tile(panels[1], row, column, (1, 8, 8))
            torch.testing.assert_close(image, images[row * CODE_STEPS + column])
        middle = tile(panels[1], row, CODE_STEPS // 2, (1, 8, 8))
        torch.testing.assert_close(middle, tile(panels[1], 0, CODE_STEPS // 2, (1, 8, 8)))


def test_no_more_codes_are_shown_than_a_picture_holds(trainer):
    config = changed(trainer.config, info_codes=CODES_SHOWN + 5, alpha=0.0)
    [panel] = codes(trainer.begin(config).generators, seed=0).axes
    assert len(panel.get_yticklabels()) == CODES_SHOWN
    assert shown(panel).shape[:2] == (CODES_SHOWN * 9 - 1, CODE_STEPS * 9 - 1)


def test_pictures_repeat_themselves(trainer, tmp_path):
    config: GANConfig = changed(trainer.config, info_codes=1)
    generators = trainer.begin(config).generators
    for draw in (
        lambda: samples(generators, trainer.data, seed=1),
        lambda: nearest(generators, trainer.data, seed=1),
        lambda: codes(generators, seed=1),
    ):
        first, second = (shown(draw().axes[0]) for _ in range(2))
        assert torch.equal(first, second)
