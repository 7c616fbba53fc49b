"""How good and how complete generated images are, judged by the classifier and without a download.

The distances are those of the literature with the features of ``sqloss.models.classifier`` in the
place of Inception's, and so are named cFID and cKID. Their unit is that of one classifier's
features: they compare images that the same classifier has judged, and no papers.

Generated images are float pixels [N, C, H, W] in [0, 1]; real ones are uint8, as a data set holds
them. What is drawn at random comes from the seed alone.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqloss.common.errors import UserError, require
from sqloss.models.classifier import PREDICTION_BATCH_SIZE, Classifier
from sqloss.models.pixels import Images, in_blocks, pixels, some
from sqloss.models.seeding import generator, initialisation
from sqloss.training.loop import NonFiniteError

LEAST_IMAGES = 2  # neither a covariance nor a neighbour is to be had of fewer
KERNEL_SUBSETS = 50
KERNEL_SUBSET_SIZE = 1000
NEIGHBOURS = 3
MANIFOLD_IMAGES = 5000  # of each kind, for precision and recall
CONFIDENT = 0.9
MODE_SHARE = 0.1  # of an even share
NEAREST_AMONG = 1000  # images whose nearest training image is looked for
QUANTILES = (0.0, 0.01, 0.1, 0.5, 0.9)
MEMORY_MIB = 64  # of scikit-learn's blocks of distances
PIXELS_AT_ONCE = 2**25  # of training images as float32: 128 MiB

FID_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
FID_WEIGHTS_FROM = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FID_WEIGHTS}"
)
FID_FEATURES = 2048
FID_BATCH_SIZE = 50

Metrics = dict[str, Any]


def measure_images(
    generated: Tensor,
    train_images: Images,
    test_images: Images,
    classifier: Classifier,
    seed: int,
) -> Metrics:
    """What ``floor`` measures, and how near the generated images are to the training images.

    ``train_images`` are those that the generator has seen. ``nearest`` has a row per quantile of
    the distance in pixels (L2) to the nearest training image: of the generated images and of the
    held-out test images, up to NEAREST_AMONG of each. A generator that repeats its training images
    is much nearer to them than the test images are.

    The larger the sets the smaller is cFID, so compare it with a ``floor`` of the same number: with
    fewer training images than that there is none, so judge no more images than there are real ones.

    Raises UserError where images are too few, of another shape than the real ones, or no pixels.
    """
    _check("measure_images", "generated", generated, test_images)
    return _against(generated, test_images, classifier, seed) | {
        "nearest": _nearest_quantiles(generated, train_images, test_images, seed)
    }


def floor(
    count: int, train_images: Images, test_images: Images, classifier: Classifier, seed: int
) -> Metrics:
    """What ``count`` real images get in the place of generated ones: the best to be hoped for.

    They are drawn from the training images (from before any imbalance, unless that is to be part
    of the floor), of which all are taken where there are no more. The dictionary has

    - ``images``, ``reference_images``: how many were judged, against how many test images;
    - ``cfid``: the Frechet distance of Heusel et al. (2017), |m - m'|^2 + tr(S + S' - 2 (S S')^1/2)
      of the features' means and covariances;
    - ``ckid``, ``ckid_std``: the kernel distance of Binkowski et al. (2018), the unbiased squared
      MMD under the kernel (x . y / d + 1)^3: its mean and standard deviation over random subsets;
    - ``precision``, ``recall``: of Kynkaanniemi et al. (2019), up to MANIFOLD_IMAGES and the same
      number of both kinds: the share of images within the third nearest neighbour's distance of
      some test image, and of test images within that of some image;
    - ``label_entropy``, ``label_entropy_max``: in nats, of the predicted classes; and its maximum,
      the logarithm of the number of classes;
    - ``modes``: the number of classes that are predicted with a probability of at least 0.9 in at
      least a tenth of an even share of the images: in 1 % of them where there are ten classes.
    """
    chosen = pixels(some(train_images, count, generator(seed, "floor")))
    _check("floor", "train_images", chosen, test_images)
    return _against(chosen, test_images, classifier, seed)


def _against(images: Tensor, test_images: Images, classifier: Classifier, seed: int) -> Metrics:
    seen, probabilities = (part.double().cpu() for part in classifier.see(images))
    blocks = in_blocks(test_images, PREDICTION_BATCH_SIZE)
    reference = torch.cat([classifier.see(pixels(block))[0].double().cpu() for block in blocks])
    kernel_mean, kernel_std = kernel_distance(seen, reference, seed)
    alike = min(MANIFOLD_IMAGES, len(seen), len(reference))
    precision, recall = precision_and_recall(
        some(seen, alike, generator(seed, "precision and recall")),
        some(reference, alike, generator(seed, "precision and recall", "reference")),
    )
    return {
        "images": len(images),
        "reference_images": len(test_images),
        "cfid": frechet_distance(seen, reference),
        "ckid": kernel_mean,
        "ckid_std": kernel_std,
        "precision": precision,
        "recall": recall,
    } | class_coverage(probabilities)


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """The Frechet distance of two sets of features [N, D], as if both were normal."""
    metric = require("torchmetrics.image.fid").FrechetInceptionDistance(
        feature=_Given(reference.shape[1])
    )
    metric.update(reference, real=True)
    metric.update(features, real=False)
    return float(metric.compute())


def kernel_distance(features: Tensor, reference: Tensor, seed: int) -> tuple[float, float]:
    """The kernel distance of two sets of features [N, D]: mean and standard deviation."""
    # no more than half: subsets of everything would not differ
    half = min(len(features), len(reference)) // 2
    kid = require("torchmetrics.image.kid").KernelInceptionDistance
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*will save all extracted features")
        metric = kid(
            feature=_Given(reference.shape[1]),
            subsets=KERNEL_SUBSETS,
            subset_size=max(LEAST_IMAGES, min(KERNEL_SUBSET_SIZE, half)),
        )
    metric.update(reference, real=True)
    metric.update(features, real=False)
    with initialisation(seed, "kernel distance"):  # it draws from the global generator
        mean, std = metric.compute()
    return float(mean), float(std)


class _Given(nn.Identity):
    """For torchmetrics: features that are there already, so computed once for every metric."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def precision_and_recall(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """The share of each set [N, D] that lies in the manifold of the other.

    A manifold is the balls around all points of a set, each as wide as the distance to its third
    nearest neighbour there (or to the furthest, where there are fewer).
    """
    return _share_inside(features, reference), _share_inside(reference, features)


def _share_inside(points: Tensor, manifold: Tensor) -> float:
    neighbours = min(NEIGHBOURS, len(manifold) - 1)
    search = require("sklearn.neighbors").NearestNeighbors(n_neighbors=neighbours)
    radii = search.fit(manifold.numpy()).kneighbors()[0][:, -1]
    blocks = require("sklearn.metrics").pairwise_distances_chunked(
        points.numpy(),
        manifold.numpy(),
        reduce_func=lambda distances, _: (distances <= radii).any(1),
        working_memory=MEMORY_MIB,
    )
    return sum(int(inside.sum()) for inside in blocks) / len(points)


def class_coverage(probabilities: Tensor) -> Metrics:
    """The entropy of the predicted classes and the number of modes, of probabilities [N, K]."""
    images, classes = probabilities.shape
    confidence, predicted = probabilities.max(1)
    confident = torch.bincount(predicted[confidence >= CONFIDENT], minlength=classes)
    entropy = require("scipy.stats").entropy
    return {
        "label_entropy": float(entropy(torch.bincount(predicted, minlength=classes).numpy())),
        "label_entropy_max": float(entropy([1] * classes)),
        "modes": int((confident >= MODE_SHARE / classes * images).sum()),
    }


def nearest_neighbours(generated: Tensor, train_images: Images) -> tuple[Tensor, Tensor]:
    """The L2 distance [N] in pixels to the nearest training image, and its index [N].

    Both are on the CPU. A training image itself is at the distance 0.
    """
    search = require("sklearn.metrics").pairwise_distances_argmin_min
    queries = generated.flatten(1).cpu()
    best = torch.full((len(queries),), torch.inf, dtype=torch.float64)
    index = torch.zeros(len(queries), dtype=torch.int64)
    at_once = max(1, PIXELS_AT_ONCE // queries.shape[1])
    for first in range(0, len(train_images), at_once):
        block = pixels(train_images[first : first + at_once]).flatten(1).cpu()
        found, distances = map(torch.from_numpy, search(queries.numpy(), block.numpy()))
        index = torch.where(distances < best, first + found, index)
        best = torch.minimum(best, distances)
    # the search takes |x|^2 - 2 xy + |y|^2, which is not quite 0 for x = y
    nearest = pixels(train_images[index.to(train_images.device)]).flatten(1).cpu()
    return (queries.double() - nearest.double()).norm(dim=1), index


def _nearest_quantiles(
    generated: Tensor, train_images: Images, test_images: Images, seed: int
) -> list[dict[str, float]]:
    quantiles = torch.tensor(QUANTILES, dtype=torch.float64)
    of_generated, of_held_out = (
        nearest_neighbours(images, train_images)[0].quantile(quantiles).tolist()
        for images in (
            some(generated, NEAREST_AMONG, generator(seed, "nearest")),
            pixels(some(test_images, NEAREST_AMONG, generator(seed, "nearest", "held out"))),
        )
    )
    return [
        {"quantile": quantile, "generated": ours, "held_out": theirs}
        for quantile, ours, theirs in zip(QUANTILES, of_generated, of_held_out, strict=True)
    ]


def _check(function: str, argument: str, images: Tensor, test_images: Images) -> None:
    for name, given in ((argument, images), ("test_images", test_images)):
        if len(given) < LEAST_IMAGES:
            raise UserError(
                f"{function}: {name}: expected at least {LEAST_IMAGES} images, got {len(given)}"
            )
    if images.shape[1:] != test_images.shape[1:]:
        raise UserError(
            f"{function}: {argument}: expected images of the shape of the test images, "
            f"{tuple(test_images.shape[1:])}, got {tuple(images.shape[1:])}"
        )
    broken = int((~images.isfinite()).flatten(1).any(1).sum())
    if broken:
        raise NonFiniteError(
            f"{function}: {argument}: expected finite pixels, got NaN or infinity in {broken} of "
            f"{len(images)} images"
        )
    low, high = images.aminmax()
    if low < 0 or high > 1:
        raise UserError(
            f"{function}: {argument}: expected pixels in [0, 1], got {low:g} to {high:g}"
        )


def require_fid(weights: Path) -> None:
    """Raise the UserError that ``true_fid`` would raise: call it before the training."""
    _inception_distance(weights)


def true_fid(generated: Tensor, test_images: Images, weights: Path) -> float:
    """The Frechet Inception distance of generated images from the test images.

    ``weights`` is the file of Inception's that torch-fidelity uses (FID_WEIGHTS_FROM). Images are
    brought to 8 bits and three channels, and resized as by the original TensorFlow network.
    Numbers in papers are of 10,000 to 50,000 images of both kinds; fewer give a larger FID.

    Raises UserError for what ``measure_images`` does, and where torch-fidelity is missing or the
    file is not of these weights.
    """
    _check("true_fid", "generated", generated, test_images)
    metric = _inception_distance(weights).to(generated.device)
    for batch in in_blocks(test_images, FID_BATCH_SIZE):
        metric.update(_coloured(batch), real=True)
    for batch in generated.split(FID_BATCH_SIZE):
        # rounded: torchmetrics' own conversion, normalize=True, would cut off
        metric.update(_coloured((batch * 255).round().byte()), real=False)
    return float(metric.compute())


def _coloured(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1)


def _inception_distance(weights: Path) -> Any:
    try:
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"torch-fidelity is needed for the true FID and cannot be imported ({error}): "
            "pip install 'sqloss[fid]'"
        ) from error
    expected = f"--fid-weights: expected {FID_WEIGHTS}, from {FID_WEIGHTS_FROM}"
    if not weights.is_file():
        raise UserError(f"{expected}; got {weights}, which is no file")
    distance = require("torchmetrics.image.fid").FrechetInceptionDistance
    try:
        torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity runs any pickle
        return distance(
            feature=FID_FEATURES, feature_extractor_weights_path=str(weights), antialias=False
        )
    except Exception as error:  # the many ways in which a file is not this one
        raise UserError(
            f"{expected}; got {weights}, which does not hold them ({type(error).__name__})"
        ) from error
