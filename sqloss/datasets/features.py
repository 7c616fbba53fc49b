"""Features of images that need no model: their pixels, or the principal components of these."""

import torch
from torch import Tensor

from sqloss.common.errors import require
from sqloss.datasets.dataset import Dataset
from sqloss.models.pixels import in_blocks, pixels

COMPONENTS = 50
AT_ONCE = 1000  # images
IMAGE_FEATURES = ("pixels", "components")


def image_features(name: str, data: Dataset) -> Tensor:
    """The features of the training images by one of ``IMAGE_FEATURES``, float32 [N, D]."""
    of_blocks = [pixels(block).flatten(1).cpu() for block in in_blocks(data.train_images, AT_ONCE)]
    found = torch.cat(of_blocks)
    if name == "pixels":
        return found
    method = require("sklearn.decomposition").PCA(
        min(COMPONENTS, *found.shape), svd_solver="randomized", random_state=0
    )
    return torch.from_numpy(method.fit_transform(found.numpy()))
