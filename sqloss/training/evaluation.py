"""The losses of a model on the test images, one per image, and their summary."""

from collections.abc import Mapping

import torch
from torch import Tensor

import sqloss
from sqloss.models import VAE
from sqloss.models.pixels import pixels
from sqloss.models.seeding import generator
from sqloss.student_t import draw_seed
from sqloss.training.config import Config
from sqloss.training.data import Dataset

BATCH_SIZE = 1000


@torch.no_grad()
def evaluate(model: VAE, data: Dataset, seed: int) -> dict[str, Tensor]:
    """Reconstruction, KL and their sum for each test image, in nats.

    The noise is the same in every epoch and for every model. The sum is the negative ELBO itself,
    whatever beta the training uses.
    """
    images = data.test_images
    rows = torch.arange(len(images), device=images.device)
    draw = draw_seed(generator=generator(seed, "evaluation"))
    batches = [
        model.losses(pixels(images[batch]), draw, rows=batch) for batch in rows.split(BATCH_SIZE)
    ]
    losses = {name: torch.cat([batch[name] for batch in batches]).cpu() for name in batches[0]}
    # The mean of many float32 is taken in float64.
    losses = {name: values.double() for name, values in losses.items()}
    return losses | {"negative_elbo": losses["reconstruction"] + losses["kl"]}


def summary(losses: Mapping[str, Tensor], alpha: float) -> dict[str, float]:
    """The mean of each loss, and the tail of the negative ELBO."""
    return {
        "negative_elbo": losses["negative_elbo"].mean().item(),
        "negative_elbo_cvar": sqloss.cvar(losses["negative_elbo"], alpha).item(),
        "reconstruction": losses["reconstruction"].mean().item(),
        "kl": losses["kl"].mean().item(),
    }


def objective_values(losses: Mapping[str, Tensor], config: Config) -> dict[str, float]:
    """What every objective of a run comes to, whichever of them the model was trained on."""
    return {
        f"objective_{name}": objective(losses).item()
        for name, objective in config.objectives.items()
    }
