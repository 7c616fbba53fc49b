"""Images with missing pixels: which are missing, how they are filled in, and how well.

A missing pixel is NaN to every method: none can read what it is to guess, none can take it for
background. What a method returns has the observed pixels as they were.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sqloss.common.errors import require
from sqloss.common.flags import expect, expect_whole, flag
from sqloss.common.tables import table
from sqloss.datasets import Dataset
from sqloss.experiments.measurement import Row
from sqloss.models import VAE
from sqloss.models.classifier import Classifier
from sqloss.models.pixels import Images, in_blocks, pixels, some
from sqloss.models.seeding import generator
from sqloss.student_t import draw_seed

BATCH_SIZE = 100  # images, of which one-shot imputation decodes many draws at once
WINDOW = 7  # pixels, of the structural similarity
SQUARE_SIDE = 7  # pixels, and a quarter of the side of MNIST's images
PCA_VALUES = 2**28  # 1 GiB
MEAN_BATCH_SIZE = 1000
PCA_ITERATIONS = 10  # more fit the observed pixels better and the missing ones worse

Method = Callable[[Tensor], Tensor]  # pixels [N, C, H, W], NaN where missing, to whole ones
Methods = dict[tuple[str, str], Method]  # by model and name
Imputed = dict[tuple[str, str], Tensor]  # images, by model and method
COLUMNS = (
    *("model", "method", "mask", "missing", "rmse", "mae", "ssim", "accuracy"),
    "accuracy_of_originals",
)
NO_MODEL = "baseline"  # in the column of models
ONE_SHOT = "one-shot"
PSEUDO_GIBBS = "pseudo-Gibbs"


@dataclass(frozen=True)
class ImputeConfig:
    """What is missing and how it is filled in, valid by construction."""

    missing: float = flag(0.3, "share of the pixels that are missing at random", metavar="SHARE")
    squares: int = flag(4, "squares that are missing, at random places", metavar="N")
    square_side: int = flag(
        0,
        "their side, at most that of the image; 0: 7, or a quarter of the side of images of less "
        "than 28 pixels",
        metavar="PIXELS",
    )
    test_images: int = flag(1000, "impute the first N test images; 0: all", metavar="N")
    draws: int = flag(30, "draws that one-shot imputation takes the mean of", metavar="N")
    iterations: int = flag(60, "iterations of pseudo-Gibbs imputation", metavar="N")
    burn_in: int = flag(30, "iterations before those it takes the mean of", metavar="N")
    components: int = flag(20, "principal components of the PCA baseline", metavar="N")
    neighbours: int = flag(10, "neighbours that the kNN baseline takes the mean of", metavar="N")
    neighbour_images: int = flag(
        10_000,
        "training images, chosen at random, among which it looks for them; 0: all",
        metavar="N",
    )

    def __post_init__(self) -> None:
        expect(self, "missing", 0 < self.missing < 1, "a number between 0 and 1")
        expect_whole(self, 1, "squares", "draws", "iterations", "components", "neighbours")
        expect_whole(self, 0, "square_side", "test_images", "neighbour_images")
        expected = f"a whole number from 0 to below --iterations {self.iterations}"
        expect(self, "burn_in", 0 <= self.burn_in < self.iterations, expected)


# What is missing: bool [N, 1, H, W], True where it is, for all channels of a pixel.


def make_masks(images: Images, config: ImputeConfig, seed: int) -> dict[str, Tensor]:
    """The masks for images [N, C, H, W], on their device; the same for the same seed."""
    count, _, height, width = images.shape
    side = config.square_side or max(1, min(SQUARE_SIDE, min(height, width) // 4))
    masks = {
        "random pixels": random_pixels(
            count, height, width, config.missing, generator(seed, "mask", "pixels")
        ),
        "random squares": random_squares(
            count, height, width, config.squares, side, generator(seed, "mask", "squares")
        ),
        "bottom half": bottom_half(count, height, width),
    }
    return {name: mask.to(images.device) for name, mask in masks.items()}


def random_pixels(
    count: int, height: int, width: int, share: float, draws: torch.Generator
) -> Tensor:
    """The same number of pixels of every image: ``share`` of them, rounded, and one at least."""
    missing = max(1, round(share * height * width))
    chosen = torch.rand(count, height * width, generator=draws).topk(missing).indices
    mask = torch.zeros(count, height * width, dtype=torch.bool).scatter_(1, chosen, True)
    return mask.view(count, 1, height, width)


def random_squares(
    count: int, height: int, width: int, squares: int, side: int, draws: torch.Generator
) -> Tensor:
    """Squares that lie within the image wherever they may, also on one another."""
    side = min(side, height, width)

    def stripes(length: int) -> Tensor:
        start = torch.randint(length - side + 1, (count, squares, 1), generator=draws)
        place = torch.arange(length)
        return (start <= place) & (place < start + side)

    rows, columns = stripes(height), stripes(width)
    return (rows[..., :, None] & columns[..., None, :]).any(1, keepdim=True)


def bottom_half(count: int, height: int, width: int) -> Tensor:
    """The rows from the middle down."""
    return (torch.arange(height) >= height // 2)[:, None].expand(count, 1, height, width)


# How it is filled in.


def impute(method: Method, images: Tensor, mask: Tensor) -> Tensor:
    """Pixels [N, C, H, W] with those of the mask imputed by a method that can't see them."""
    return torch.where(mask, method(images.masked_fill(mask, torch.nan)), images)


def filled(x: Tensor, values: Tensor) -> Tensor:
    """Pixels with ``values`` where they are missing."""
    return torch.where(x.isnan(), values, x)


@torch.no_grad()
def means_at_draws(model: VAE, x: Tensor, draws: int, noise: torch.Generator) -> Tensor:
    """The decoder's means at draws from the posterior of whole images, [draws, B, C, H, W]."""
    z = model.encode(x).rsample(draw_seed(generator=noise), num_samples=draws)
    return model.decode(z).sigmoid()


def one_shot(model: VAE, x: Tensor, fill: Tensor, draws: int, seed: int) -> Tensor:
    """The mean of the decoder's means at draws from the posterior.

    The encoder sees ``fill`` [C, H, W] at missing pixels.
    """
    noise = generator(seed, "imputation", ONE_SHOT)
    return torch.cat(
        [
            filled(batch, means_at_draws(model, filled(batch, fill), draws, noise).mean(0))
            for batch in x.split(BATCH_SIZE)
        ]
    )


@torch.no_grad()
def pseudo_gibbs(
    model: VAE, x: Tensor, fill: Tensor, iterations: int, burn_in: int, seed: int
) -> Tensor:
    """The mean over a chain that encodes, draws a latent and decodes (Rezende et al., 2014).

    The missing pixels start as ``fill`` [C, H, W] and become, in each iteration, the decoder's
    means at one draw from the posterior. (Rezende et al. draw the pixels themselves; but where
    grey values are the data, images of black and white are unlike any the encoder has seen.)
    """
    noise = generator(seed, "imputation", PSEUDO_GIBBS)

    def of_batch(batch: Tensor) -> Tensor:
        state = filled(batch, fill)
        total = torch.zeros_like(state)
        for iteration in range(iterations):
            z = model.encode(state).rsample(draw_seed(generator=noise))
            state = filled(batch, model.decode(z).sigmoid())
            if iteration >= burn_in:
                total += state
        return filled(batch, total / (iterations - burn_in))

    return torch.cat([of_batch(batch) for batch in x.split(BATCH_SIZE)])


def mean_pixels(images: Images) -> Tensor:
    """The mean of each pixel over uint8 training images, [C, H, W]."""
    total = torch.stack([block.sum(0) for block in in_blocks(images, MEAN_BATCH_SIZE)]).sum(0)
    return pixels(total / len(images))


def vae_methods(
    models: Mapping[str, VAE], training_images: Images, config: ImputeConfig, seed: int
) -> Methods:
    """What VAEs can do; an encoder first sees the training mean where pixels are missing.

    All models get the same noise.
    """
    fill = mean_pixels(training_images)

    def once(model: VAE) -> Method:
        return lambda x: one_shot(model, x, fill, config.draws, seed)

    def repeatedly(model: VAE) -> Method:
        return lambda x: pseudo_gibbs(model, x, fill, config.iterations, config.burn_in, seed)

    return {
        (name, method): of(model)
        for name, model in models.items()
        for method, of in {ONE_SHOT: once, PSEUDO_GIBBS: repeatedly}.items()
    }


def baseline_methods(training_images: Images, config: ImputeConfig, seed: int) -> Methods:
    """What does without a VAE, fitted to the same uint8 training images."""
    fill = mean_pixels(training_images)
    return {
        (NO_MODEL, "mean"): lambda x: filled(x, fill),
        (NO_MODEL, "PCA"): pca(training_images, config.components, fill, seed),
        (NO_MODEL, "kNN"): nearest_neighbours(
            training_images, config.neighbours, config.neighbour_images, fill, seed
        ),
    }


def pca(training_images: Images, components: int, fill: Tensor, seed: int) -> Method:
    """Iterative SVD: project on principal components, keep what is observed, repeat.

    The components are those of the training images, which are complete; so it is the projection
    that is iterated, not the fit. Of images of more than PCA_VALUES values together as many are
    taken at random as have them.
    """
    most = max(1, PCA_VALUES // math.prod(training_images.shape[1:]))
    flat = pixels(some(training_images, most, generator(seed, "PCA"))).flatten(1).cpu().numpy()
    fitted = require("sklearn.decomposition").PCA(min(components, *flat.shape), random_state=0)
    fitted.fit(flat)

    def method(x: Tensor) -> Tensor:
        state = filled(x, fill)
        for _ in range(PCA_ITERATIONS):
            projected = fitted.inverse_transform(fitted.transform(state.flatten(1).cpu().numpy()))
            state = filled(x, torch.from_numpy(projected).to(x).view_as(x).clamp(0, 1))
        return state

    return method


def nearest_neighbours(
    training_images: Images, neighbours: int, among: int, fill: Tensor, seed: int
) -> Method:
    """The mean of the training images that are nearest at the observed pixels.

    This is scikit-learn's ``KNNImputer`` for training images that are complete: there each image's
    neighbours are the same for all its pixels, so they need finding once, not per pixel. An image
    with no observed pixel gets ``fill``.
    """
    distances_of = require("sklearn.metrics").pairwise.nan_euclidean_distances
    order = torch.randperm(len(training_images), generator=generator(seed, "neighbours"))
    chosen = order[: among or None].to(training_images.device)
    donors = pixels(training_images[chosen])
    flat = donors.flatten(1).cpu().numpy()

    def of_batch(batch: Tensor) -> Tensor:
        distances = torch.from_numpy(distances_of(batch.flatten(1).cpu().numpy(), flat))
        nearest = distances.topk(min(neighbours, len(flat)), largest=False).indices
        means = donors[nearest.to(donors.device)].mean(1)
        nothing_observed = batch.isnan().flatten(1).all(1).view(-1, 1, 1, 1)
        return filled(batch, torch.where(nothing_observed, fill, means))

    return lambda x: torch.cat([of_batch(batch) for batch in x.split(BATCH_SIZE)])


# How well.


def measure(
    methods: Methods,
    images: Images,
    labels: Tensor,
    masks: Mapping[str, Tensor],
    classifier: Classifier,
) -> tuple[list[Row], dict[str, Imputed]]:
    """A row per mask and method, of those by (model, method); and what was imputed, by mask."""
    originals = pixels(images[:])
    of_originals = share_right(classifier, originals, labels)
    imputed = {
        mask_name: {name: impute(method, originals, mask) for name, method in methods.items()}
        for mask_name, mask in masks.items()
    }
    rows = [
        {"model": model, "method": method, "mask": mask_name}
        | {"missing": masks[mask_name].double().mean().item()}
        | errors(guess, originals, masks[mask_name])
        | {"ssim": structural_similarity(guess, originals)}
        | {"accuracy": share_right(classifier, guess, labels)}
        | {"accuracy_of_originals": of_originals}
        for mask_name, guesses in imputed.items()
        for (model, method), guess in guesses.items()
    ]
    return rows, imputed


def errors(imputed: Tensor, originals: Tensor, mask: Tensor) -> dict[str, float]:
    """Root mean square and mean absolute error over the missing pixels of all images together."""
    error = (imputed - originals)[mask.expand_as(originals)].double()
    return {"rmse": error.square().mean().sqrt().item(), "mae": error.abs().mean().item()}


def structural_similarity(imputed: Tensor, originals: Tensor) -> float:
    """Mean SSIM of whole images [N, C, H, W] over square windows (Wang et al., 2004).

    Windows are of 7 pixels a side, or of the largest odd number that the image has.
    """
    side = min(WINDOW, *originals.shape[2:])
    ssim = require("torchmetrics.functional.image").structural_similarity_index_measure
    similarity: Tensor = ssim(
        imputed,
        originals,
        gaussian_kernel=False,
        kernel_size=side if side % 2 else side - 1,
        data_range=1.0,
    )
    return similarity.item()


def share_right(classifier: Classifier, x: Tensor, labels: Tensor) -> float:
    """The share of pixels [N, C, H, W] whose class the classifier gets right."""
    return (classifier.predict(x) == labels).double().mean().item()


def first_test_images(data: Dataset, count: int) -> Dataset:
    """The data with the first ``count`` test images only; with all for 0."""
    first = slice(count or None)
    return dataclasses.replace(
        data, test_images=data.test_images[first], test_labels=data.test_labels[first]
    )


def as_table(rows: Sequence[Row]) -> str:
    """The rows of ``measure`` as Markdown that a terminal shows well too."""
    cells = [
        [f"{row['mask']} ({row['missing']:.1%}): {name_of(row['model'], row['method'])}"]
        + [f"{row[metric]:.4f}" for metric in ("rmse", "mae", "ssim")]
        + [f"{row['accuracy']:.1%}"]
        for row in rows
    ]
    return table([["missing: method", "RMSE", "MAE", "SSIM", "accuracy"], *cells])


def name_of(model: str, method: str) -> str:
    return method if model == NO_MODEL else f"{model}, {method}"
