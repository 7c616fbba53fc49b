"""The training of GANs: two players in turns, each on the risk of losses that are per sample."""

import copy
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sqloss
from sqloss.models.augment import Augmentation, augment, draw_augmentation
from sqloss.models.gan import GAN, LAST_SIDE, Generator
from sqloss.models.gan_losses import (
    code_losses,
    fake_losses,
    generator_losses,
    gradient_penalty,
    real_losses,
)
from sqloss.models.pixels import signed_pixels
from sqloss.models.seeding import initialisation
from sqloss.training.data import Dataset
from sqloss.training.errors import UserError
from sqloss.training.gan.config import GANConfig
from sqloss.training.gan.generation import Noise, draw_noise
from sqloss.training.gan.stability import alarms
from sqloss.training.loop import Row, Training

# Means over the steps of an epoch, each weighted by its images; of both models alike, whatever they
# are trained on.
D_METRICS = ("d_loss_mean", "d_loss_cvar", "d_auc", "d_spread")
G_METRICS = ("g_loss_mean", "g_loss_cvar", "g_spread")
NO_SPREAD = 1e-6  # of pixels in [-1, 1]: the images of a batch are one
COLUMNS = ("epoch", "model", *D_METRICS, *G_METRICS)


class Contender:
    """One model with what trains it."""

    def __init__(self, model: GAN, name: str, config: GANConfig) -> None:
        self.model = model
        self.config = config
        self.risks = config.risks(name)
        self.players = {"d": model.discriminator, "g": model.generator}
        betas = (config.beta1, 0.999)
        self.optimisers = {
            "d": torch.optim.Adam(model.discriminator.parameters(), config.lr_d, betas, fused=True),
            "g": torch.optim.Adam(model.generator.parameters(), config.lr_g, betas, fused=True),
        }
        self.average = moving_average(model.generator, config.ema) if config.ema else None
        device = next(model.parameters()).device
        # Over the images of the epoch under way: the metrics, and how many images they are of.
        self.totals = {
            "d": torch.zeros(len(D_METRICS) + 1, dtype=torch.float64, device=device),
            "g": torch.zeros(len(G_METRICS) + 1, dtype=torch.float64, device=device),
        }

    @property
    def generator(self) -> Generator:
        """The one to draw samples from."""
        if self.average is None:
            return self.model.generator
        return cast(Generator, self.average.module)

    def discriminator_step(
        self, real: Tensor, noise: Noise, shifts: tuple[Augmentation, Augmentation], mix: Tensor
    ) -> None:
        config, d = self.config, self.model.discriminator
        with torch.no_grad():
            fake = self.model.generator(*noise)
        if config.augment:
            real, fake = augment(real, shifts[0]), augment(fake, shifts[1])
        real_logits = d(real, noise.labels)
        fake_logits, of_codes = self._judge(fake, noise)
        of_real = real_losses(config.loss, real_logits)
        of_fake = fake_losses(config.loss, fake_logits)
        loss = self.risks["d"](of_real) + self.risks["d"](of_fake)
        if config.loss == "wgan-gp":

            def critic(images: Tensor) -> Tensor:
                logits: Tensor = d(images, noise.labels)
                return logits

            loss = loss + config.penalty * gradient_penalty(critic, real, fake, mix).mean()
        self._step("d", loss + of_codes)
        self._count("d", len(real), self._d_metrics(of_real, of_fake, real_logits, fake_logits))

    def generator_step(self, real: Tensor, noise: Noise, shift: Augmentation) -> None:
        """Move the generator, and of the discriminator nothing but the statistics of batch norm.

        As in its own step, these see the generated images; only pictures are made with them.
        """
        fake = self.model.generator(*noise)
        seen = augment(fake, shift) if self.config.augment else fake
        logits, of_codes = self._judge(seen, noise)
        losses = generator_losses(self.config.loss, logits)
        self._step("g", self.risks["g"](losses) + of_codes)
        if self.average is not None:
            self.average.update_parameters(self.model.generator)
        self._count("g", len(real), self._g_metrics(losses, real, fake))

    def _judge(self, fake: Tensor, noise: Noise) -> tuple[Tensor, Tensor | float]:
        """The logits of generated images, and the objective of both players on their codes."""
        if noise.codes is None:
            return self.model.discriminator(fake, noise.labels), 0.0
        logits, loc, var = self.model.discriminator.with_codes(fake, noise.labels)
        return logits, self.config.info_weight * code_losses(loc, var, noise.codes).mean()

    def _step(self, player: str, loss: Tensor) -> None:
        """Move one player; no gradient of the other's parameters is computed."""
        optimiser = self.optimisers[player]
        optimiser.zero_grad()
        loss.backward(inputs=list(self.players[player].parameters()))
        optimiser.step()

    @torch.no_grad()
    def _d_metrics(
        self, of_real: Tensor, of_fake: Tensor, real_logits: Tensor, fake_logits: Tensor
    ) -> list[Tensor]:
        alpha = self.config.metric_alpha
        difference = real_logits[:, None] - fake_logits
        return [
            of_real.mean() + of_fake.mean(),
            sqloss.cvar(of_real, alpha) + sqloss.cvar(of_fake, alpha),
            (difference.sign().mean() + 1) / 2,
            torch.cat([real_logits, fake_logits]).std(),
        ]

    @torch.no_grad()
    def _g_metrics(self, losses: Tensor, real: Tensor, fake: Tensor) -> list[Tensor]:
        return [
            losses.mean(),
            sqloss.cvar(losses, self.config.metric_alpha),
            (spread(fake) + NO_SPREAD) / (spread(real) + NO_SPREAD),  # of a single image 1
        ]

    def _count(self, player: str, images: int, metrics: list[Tensor]) -> None:
        values = torch.stack([*metrics, torch.ones_like(metrics[0])])
        self.totals[player] += images * values.double()

    def close_epoch(self) -> dict[str, float]:
        """The mean metrics of the epoch, which end with it."""
        metrics: dict[str, float] = {}
        for player, names in (("d", D_METRICS), ("g", G_METRICS)):
            *sums, images = self.totals[player].tolist()
            metrics |= {n: s / images for n, s in zip(names, sums, strict=True)}
            self.totals[player].zero_()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimisers": {player: each.state_dict() for player, each in self.optimisers.items()},
            "average": None if self.average is None else self.average.state_dict(),
            "totals": self.totals,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for player, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][player])
            self.totals[player].copy_(state["totals"][player])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


class GANTraining(Training):
    """The training of copies of one initial model, one for every contender of the run.

    Each batch of real images is for one step of the discriminators; after every --d-steps batches
    the generators take --g-steps steps.
    """

    def __init__(self, model: GAN, config: GANConfig, batches: int) -> None:
        super().__init__(config)
        self.config = config
        self.batches = batches  # of an epoch
        self.models: dict[str, GAN] = {name: copy.deepcopy(model) for name in config.contenders}
        self.contenders = {name: Contender(m, name, config) for name, m in self.models.items()}
        self.columns = COLUMNS

    @property
    def generators(self) -> dict[str, Generator]:
        """Those to draw samples from."""
        return {name: contender.generator for name, contender in self.contenders.items()}

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        real = signed_pixels(images)
        noise = self._draw_noise(labels)
        shifts = self._draw_shift(real), self._draw_shift(real)
        mix = torch.rand(len(real), generator=self.noise).to(real.device)
        for contender in self.contenders.values():
            contender.discriminator_step(real, noise, shifts, mix)
        batches = self.epoch * self.batches + self.step + 1
        if batches % self.config.d_steps == 0:
            for _ in range(self.config.g_steps):
                noise, shift = self._draw_noise(labels), self._draw_shift(real)
                for contender in self.contenders.values():
                    contender.generator_step(real, noise, shift)

    def _draw_noise(self, labels: Tensor) -> Noise:
        """As many images as there are labels, of these classes where the model is conditional."""
        model = next(iter(self.models.values())).generator
        return draw_noise(len(labels), model, self.noise, labels)

    def _draw_shift(self, real: Tensor) -> Augmentation:
        return draw_augmentation(len(real), tuple(real.shape[1:]), self.noise)

    def measure(self, data: Dataset) -> list[Row]:
        return [
            {"epoch": self.epoch, "model": name, **contender.close_epoch()}
            for name, contender in self.contenders.items()
        ]

    def describe(self, row: Row) -> str:
        return (
            f"{row['model']} D {row['d_loss_mean']:.3f}, G {row['g_loss_mean']:.3f}, "
            f"AUC {row['d_auc']:.3f}"
        )

    def alarms(self) -> list[str]:
        return alarms(self.history, self.config.loss)

    def sums(self, name: str) -> list[Tensor]:
        return [totals.sum() for totals in self.contenders[name].totals.values()]

    def advice(self) -> str:
        return (
            f"expected a smaller --lr-d, got {self.config.lr_d:g}, or --lr-g, "
            f"got {self.config.lr_g:g}"
        )

    def own_state(self) -> dict[str, Any]:
        return {"contenders": {name: each.state_dict() for name, each in self.contenders.items()}}

    def load_own_state(self, state: dict[str, Any]) -> None:
        for name, contender in self.contenders.items():
            contender.load_state_dict(state["contenders"][name])


def build_model(config: GANConfig, data: Dataset) -> GAN:
    """The model of a run with the weights that its seed gives it."""
    with initialisation(config.seed, "model"):
        return GAN(
            data.shape,
            config.latent,
            config.width,
            classes=len(data.class_names) if config.conditional else 0,
            codes=config.info_codes,
            # The penalty is of the gradient of each image's logit: it must depend on no other.
            batch_norm=config.loss != "wgan-gp",
        )


def begin(config: GANConfig, data: Dataset) -> GANTraining:
    """A training at its beginning, on the device of the data."""
    if min(data.shape[1:]) <= LAST_SIDE:
        raise UserError(
            f"--image-size: expected images of at least {LAST_SIDE + 1} pixels a side, got "
            f"{data.shape[1]} x {data.shape[2]}"
        )
    model = build_model(config, data).to(data.train_images.device)
    batches = -(-len(data.train_images) // config.batch_size)
    if config.d_steps > batches:
        raise UserError(
            f"--d-steps: expected at most {batches}, the batches of an epoch, after which the "
            f"generator has its turn, got {config.d_steps}"
        )
    return GANTraining(model, config, batches)


def moving_average(generator: Generator, decay: float) -> AveragedModel:
    """Of the parameters, and of the statistics of batch norm."""
    return AveragedModel(
        generator, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
    ).requires_grad_(False)


def spread(images: Tensor) -> Tensor:
    """How much the images of a batch differ: the mean of the pixels' standard deviations."""
    return images.std(0, correction=0).mean()
