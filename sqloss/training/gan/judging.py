"""What a discriminator says of images: logits, and losses of codes and of the penalty."""

from typing import NamedTuple

from torch import Tensor, nn

from sqloss.models.gan import Discriminator
from sqloss.models.gan_losses import code_losses, gradient_penalty
from sqloss.training.gan.generation import Noise


class Judgement(NamedTuple):
    """The outputs of a discriminator's step, per image."""

    real_logits: Tensor
    fake_logits: Tensor
    code_losses: Tensor | None  # of the generated images
    penalties: Tensor | None


class Judging(nn.Module):
    """All that a discriminator's step asks it, in one forward pass."""

    def __init__(self, discriminator: Discriminator, loss: str) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.loss = loss

    def forward(self, real: Tensor, fake: Tensor, noise: Noise, mix: Tensor) -> Judgement:
        def critic(images: Tensor) -> Tensor:
            logits: Tensor = self.discriminator(images, noise.labels)
            return logits

        real_logits = critic(real)
        fake_logits, of_codes = judge(self.discriminator, fake, noise)
        penalised = self.loss == "wgan-gp"
        penalties = gradient_penalty(critic, real, fake, mix) if penalised else None
        return Judgement(real_logits, fake_logits, of_codes, penalties)


def judge(discriminator: Discriminator, fake: Tensor, noise: Noise) -> tuple[Tensor, Tensor | None]:
    """The logits of generated images and, where they have codes, the losses of both players on
    those."""
    if noise.codes is None:
        return discriminator(fake, noise.labels), None
    logits, loc, var = discriminator.with_codes(fake, noise.labels)
    return logits, code_losses(loc, var, noise.codes)
