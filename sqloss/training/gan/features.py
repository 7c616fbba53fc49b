"""What a sampler sees of the images of a GAN's training."""

import torch
from torch import Tensor

from sqloss.datasets import Dataset
from sqloss.datasets.features import AT_ONCE, IMAGE_FEATURES, image_features
from sqloss.models.gan import Discriminator
from sqloss.models.pixels import in_blocks, signed_pixels

FEATURES = (*IMAGE_FEATURES, "hidden")


@torch.no_grad()
def features_of(name: str, model: Discriminator, data: Dataset) -> Tensor:
    """Features by one of ``FEATURES``; "hidden": the maps that the logit is made of."""
    if name in IMAGE_FEATURES:
        return image_features(name, data)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()  # the running statistics: no image sees another
    blocks = in_blocks(data.train_images, AT_ONCE)
    found = [model.body(signed_pixels(block.to(device))).flatten(1).cpu() for block in blocks]
    model.train(was_training)
    return torch.cat(found)
