import pytest
import torch

from sqloss.models import GAN


@pytest.mark.parametrize("shape", [(1, 5, 5), (1, 8, 8), (1, 23, 28), (1, 28, 28), (3, 64, 48)])
def test_images_of_any_size(shape):
    model = GAN(shape, latent=6, width=4)
    images = model.generator(torch.randn(2, 6))
    assert images.shape == (2, *shape)
    assert model.discriminator(images).shape == (2,)
