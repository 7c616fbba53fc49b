"""The losses of a model on the test images, one per image, and their summary."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import sqloss
from sqloss.common import ranks
from sqloss.datasets import Dataset
from sqloss.models import VAE
from sqloss.models.latents import Prior
from sqloss.models.pixels import Images, pixels
from sqloss.models.seeding import generator
from sqloss.student_t import draw_seed
from sqloss.training.vae.config import VAEConfig
from sqloss.training.vae.objective import regrets

BATCH_SIZE = 1000
# Importance weights are drawn in blocks of so many, each with a seed of its own, so that a draw
# does not depend on how many images are decoded at once.
DRAWS_PER_SEED = 50
VALUES_AT_ONCE = 2**22  # of a layer of the decoder, so 16 MiB: plenty for several cores


@torch.no_grad()
def evaluate(
    model: VAE, data: Dataset, seed: int, iwae_samples: int = 0, prior: Prior | None = None
) -> dict[str, Tensor]:
    """Reconstruction, KL and their sum for each test image, in nats.

    With iwae_samples > 0 also the negative importance-weighted bound of so many draws. Both are
    under the model's own prior, or under another.

    Each rank computes its part of them, and all have all. The noise is the same in every epoch and
    for every model. The sum is the negative ELBO itself, whatever beta the training uses.
    """
    images = data.test_images
    rows = torch.arange(len(images), device=images.device)[ranks.part(len(images))]
    draw = draw_seed(generator=generator(seed, "evaluation"))
    batches = [
        model.losses(pixels(images[batch]), draw, rows=batch, prior=prior)
        for batch in rows.split(BATCH_SIZE)
    ]
    losses = {name: torch.cat([batch[name] for batch in batches]).cpu() for name in batches[0]}
    # The mean of many float32 is taken in float64.
    losses = {name: values.double() for name, values in losses.items()}
    if iwae_samples:
        bounds = importance_weighted(model, images, rows, seed, iwae_samples, prior=prior)
        losses["negative_iw_bound"] = bounds["negative_iw_bound"]
    losses = {name: ranks.whole(values, len(images)) for name, values in losses.items()}
    losses["negative_elbo"] = losses["reconstruction"] + losses["kl"]
    return losses


@torch.inference_mode()
def importance_weighted(
    model: VAE,
    images: Images,
    rows: Tensor,
    seed: int,
    num_samples: int,
    done: Callable[[int], object] = lambda _: None,
    prior: Prior | None = None,
) -> dict[str, Tensor]:
    """The negative importance-weighted bound, and the negative ELBO, of ``images[rows]``, [N].

    Both are of the same num_samples draws for each image: -log of their weights' mean, and the mean
    of their weights' -log, under the model's own prior or under another. The draws are the same for
    every model. Memory is bounded whatever
    num_samples is. ``done`` is called with the number of images that are done, each time some are.
    """
    draws = [
        (draw_seed(generator=generator(seed, "importance weights", first)), count)
        for first in range(0, num_samples, DRAWS_PER_SEED)
        for count in [min(DRAWS_PER_SEED, num_samples - first)]
    ]
    at_once = max(1, VALUES_AT_ONCE // (largest_layer(model) * draws[0][1]))
    parts: list[tuple[Tensor, Tensor]] = []
    for batch in rows.split(at_once):
        x = pixels(images[batch])
        log_sum = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
        sum_of_logs = torch.zeros_like(log_sum)
        for draw, count in draws:
            log_weights = model.log_weights(x, draw, count, rows=batch, prior=prior).double()
            log_sum = torch.logaddexp(log_sum, log_weights.logsumexp(0))
            sum_of_logs += log_weights.sum(0)
        parts.append((log_sum, sum_of_logs))
        done(len(x))
    log_sums, sums_of_logs = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return {
        "negative_elbo": -sums_of_logs / num_samples,
        "negative_iw_bound": math.log(num_samples) - log_sums,
    }


def largest_layer(model: VAE) -> int:
    """The most values of one image in any layer of the decoder."""
    values = next(model.decoder.parameters()).new_zeros(1, model.latent)
    most = 0
    for layer in model.decoder:
        values = layer(values)
        most = max(most, values.numel())
    return most


def summary(losses: Mapping[str, Tensor], alpha: float) -> dict[str, float]:
    """The mean of each loss, and the tail of the negative ELBO."""
    return {
        "negative_elbo": losses["negative_elbo"].mean().item(),
        "negative_elbo_cvar": sqloss.cvar(losses["negative_elbo"], alpha).item(),
        "reconstruction": losses["reconstruction"].mean().item(),
        "kl": losses["kl"].mean().item(),
    }


def learnt_df(model: VAE) -> dict[str, float]:
    """The df of a model that learns it, as a metric."""
    return {} if model.free_df is None else {"df": torch.as_tensor(model.df).item()}


def objective_values(
    losses: Mapping[str, Tensor],
    config: VAEConfig,
    of_reference: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """The value of every objective of a run, whichever of them the model was trained on.

    ``of_reference`` are the losses of its reference, where it has one.
    """
    values = {}
    for name, objective in config.objectives.items():
        is_mean = config.measured_risks[name].is_mean
        taken = losses if is_mean or of_reference is None else regrets(losses, of_reference)
        values[f"objective_{name}"] = objective(taken).item()
    return values
