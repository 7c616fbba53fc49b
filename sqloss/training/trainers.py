"""The trainers that come with sqloss: importing this registers them."""

from sqloss.training.gan.trainer import GAN
from sqloss.training.trainer import TRAINERS
from sqloss.training.vae.trainer import VAE

__all__ = ["GAN", "TRAINERS", "VAE"]
