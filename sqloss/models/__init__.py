"""Models whose losses are per sample, so that any risk can be taken of them."""

from sqloss.models.gan import GAN
from sqloss.models.vae import VAE

__all__ = ["GAN", "VAE"]
