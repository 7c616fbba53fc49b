"""The inputs of generators, and the images that they make."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sqloss.models.gan import Generator
from sqloss.models.pixels import from_signed
from sqloss.models.seeding import generator
from sqloss.training.shares import batch_sizes

FIRST_SAMPLES = 16


class Noise(NamedTuple):
    """The inputs of a generator for a batch."""

    z: Tensor  # [B, latent], normal
    labels: Tensor | None  # int64 [B], of a conditional generator
    codes: Tensor | None  # [B, codes], uniform in [-1, 1], of one that has codes

    def to(self, device: torch.device) -> "Noise":
        labels = None if self.labels is None else self.labels.to(device)
        codes = None if self.codes is None else self.codes.to(device)
        return Noise(self.z.to(device), labels, codes)


def draw_noise(
    count: int, model: Generator, draws: torch.Generator, labels: Tensor | None = None
) -> Noise:
    """Noise for so many images; a conditional model's labels are drawn too where none are given."""
    z = torch.randn(count, model.latent, generator=draws)
    if model.classes and labels is None:
        labels = torch.randint(model.classes, (count,), generator=draws)
    codes = 2 * torch.rand(count, model.codes, generator=draws) - 1 if model.codes else None
    device = next(model.parameters()).device
    return Noise(z, labels if model.classes else None, codes).to(device)


@torch.no_grad()
def generate(model: Generator, noise: Noise) -> Tensor:
    """The images of pixels of this noise, each by itself: batch norm uses what it has learnt."""
    was_training = model.training
    model.eval()
    images = from_signed(model(*noise))
    model.train(was_training)
    return images


def generate_many(
    model: Generator, count: int, draws: torch.Generator, temperature: float = 1.0
) -> Iterator[tuple[Tensor, Noise]]:
    """Images in batches, with what they are made of; classes are equally likely.

    The standard deviation of z is ``temperature``.
    """
    for size in batch_sizes(count):
        noise = draw_noise(size, model, draws)
        noise = noise._replace(z=temperature * noise.z)
        yield generate(model, noise), noise


def first_samples(generators: Mapping[str, Generator], seed: int) -> dict[str, Tensor]:
    """Some images by each generator, of the noise that the seed gives all of them."""
    return {
        name: generate(model, draw_noise(FIRST_SAMPLES, model, generator(seed, "samples")))
        for name, model in generators.items()
    }
