"""The training of GANs: two players in turns, each on the risk of losses that are per sample."""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sqloss
from sqloss.common import ranks
from sqloss.common.errors import UserError
from sqloss.datasets import Dataset
from sqloss.models.augment import Augmentation, augment, draw_augmentation
from sqloss.models.gan import GAN, LAST_SIDE, Generator
from sqloss.models.gan_losses import (
    fake_losses,
    generator_losses,
    real_losses,
)
from sqloss.models.pixels import signed_pixels
from sqloss.models.seeding import initialisation
from sqloss.training.batch_norm import over_ranks
from sqloss.training.gan.config import GANConfig
from sqloss.training.gan.features import FEATURES, features_of
from sqloss.training.gan.generation import Noise, draw_noise
from sqloss.training.gan.judging import Judgement, Judging, judge
from sqloss.training.gan.stability import alarms
from sqloss.training.loop import Row, Training
from sqloss.training.risks import Mean, Risk

# Means over the steps of an epoch, each weighted by its images; of both models alike, whatever they
# are trained on.
D_METRICS = ("d_loss_mean", "d_loss_cvar", "d_auc", "d_spread")
G_METRICS = ("g_loss_mean", "g_loss_cvar", "g_spread")
NO_SPREAD = 1e-6  # of pixels in [-1, 1]: the images of a batch are one
COLUMNS = ("epoch", "model", *D_METRICS, *G_METRICS)


class Contender:
    """One model with what trains it.

    A step is given this rank's part of a batch. Risks, batch norm and metrics are of the whole one.
    """

    def __init__(self, model: GAN, risk: Risk, config: GANConfig) -> None:
        self.model = model
        self.config = config
        self.risks, self.mean = config.risks_of_losses(risk), Mean().over_ranks
        self.judging = ranks.parallel(Judging(model.discriminator, config.loss))
        self.generating = ranks.parallel(model.generator)
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
        self,
        real: Tensor,
        noise: Noise,
        shifts: tuple[Augmentation, Augmentation],
        mix: Tensor,
        images: int,
        needed: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Move the discriminator by this rank's part of a batch of so many images.

        ``needed`` is what its risk needs of the real ones.
        """
        config = self.config
        with torch.no_grad():
            fake = self.model.generator(*noise)
        if config.augment:
            real, fake = augment(real, shifts[0]), augment(fake, shifts[1])
        judged: Judgement = self.judging(real, fake, noise, mix)
        of_real = real_losses(config.loss, judged.real_logits)
        of_fake = fake_losses(config.loss, judged.fake_logits)
        risk_of_real, risk_of_fake = self.risks["real"], self.risks["fake"]
        loss = risk_of_real.over_ranks(of_real, **{n: needed[n] for n in risk_of_real.needs})
        loss = loss + risk_of_fake.over_ranks(of_fake)
        if judged.penalties is not None:
            loss = loss + config.gp_weight * self.mean(judged.penalties)
        self._step("d", loss + self._of_codes(judged.code_losses))
        of_images = torch.stack([of_real, of_fake, judged.real_logits, judged.fake_logits])
        self._count("d", images, self._d_metrics(*ranks.whole(of_images.detach(), images)))

    def generator_step(self, real: Tensor, noise: Noise, shift: Augmentation, images: int) -> None:
        """Move the generator, and of the discriminator nothing but the statistics of batch norm.

        As in its own step, these see the generated images; only pictures are made with them.
        """
        fake = self.generating(*noise)
        seen = augment(fake, shift) if self.config.augment else fake
        logits, of_codes = judge(self.model.discriminator, seen, noise)
        losses = generator_losses(self.config.loss, logits)
        self._step("g", self.risks["g"].over_ranks(losses) + self._of_codes(of_codes))
        if self.average is not None:
            self.average.update_parameters(self.model.generator)
        losses = ranks.whole(losses.detach(), images)
        self._count("g", images, self._g_metrics(losses, real, fake))

    def _of_codes(self, losses: Tensor | None) -> Tensor | float:
        """The objective of both players on the codes."""
        return 0.0 if losses is None else self.config.info_weight * self.mean(losses)

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
            # Of a single image 1
            (spread(fake, len(losses)) + NO_SPREAD) / (spread(real, len(losses)) + NO_SPREAD),
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

    feature_names = FEATURES
    gives = ("rows", "labels")  # of the real images

    def __init__(self, model: GAN, config: GANConfig, batches: int) -> None:
        super().__init__(config)
        self.config = config
        self.batches = batches  # of an epoch
        self.round = config.d_steps
        self.models: dict[str, GAN] = {
            name: over_ranks(copy.deepcopy(model)) for name in config.contenders
        }
        self.contenders = {
            name: Contender(model, self.risks[name], config) for name, model in self.models.items()
        }
        self.columns = COLUMNS

    @property
    def generators(self) -> dict[str, Generator]:
        """The generators to draw samples from."""
        return {name: contender.generator for name, contender in self.contenders.items()}

    def train_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        size, part = len(images), ranks.part(len(images))
        real = signed_pixels(images[part])
        # All is drawn, used or not: with any --loss and --augment a seed gives the same noise.
        noise = self._draw_noise(labels)
        shifts = self._draw_shift(images), self._draw_shift(images)
        mix = torch.rand(size, generator=self.noise)[part].to(real.device)
        for name, contender in self.contenders.items():
            needed = self.needed(self.risks[name], part, labels)
            contender.discriminator_step(real, noise, shifts, mix, size, needed)
        batches = self.epoch * self.batches + self.step + 1
        if batches % self.config.d_steps == 0:
            for _ in range(self.config.g_steps):
                noise, shift = self._draw_noise(labels), self._draw_shift(images)
                for contender in self.contenders.values():
                    contender.generator_step(real, noise, shift, size)

    def _draw_noise(self, labels: Tensor) -> Noise:
        """As many images as there are labels, of these classes where the model is conditional."""
        model = next(iter(self.models.values())).generator
        return own_part(draw_noise(len(labels), model, self.noise, labels))

    def _draw_shift(self, images: Tensor) -> Augmentation:
        return own_part(draw_augmentation(len(images), tuple(images.shape[1:]), self.noise))

    def measure(self, data: Dataset) -> list[Row]:
        return [
            {"epoch": self.epoch, "model": name, **contender.close_epoch()}
            for name, contender in self.contenders.items()
        ]

    def features(self, name: str, data: Dataset) -> Tensor:
        return features_of(name, next(iter(self.models.values())).discriminator, data)

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


Drawn = TypeVar("Drawn", Noise, Augmentation)


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
    batches = data.steps(config.batch_size)
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


def own_part(drawn: Drawn) -> Drawn:
    """This rank's part of what is drawn for a batch."""
    part = ranks.part(len(drawn[0]))
    parts = {name: each[part] for name, each in drawn._asdict().items() if each is not None}
    return drawn._replace(**parts)


def spread(images: Tensor, size: int) -> Tensor:
    """How much the images of a batch differ: the mean of the pixels' standard deviations.

    Of the batch of this size each rank gives its part.
    """
    if ranks.count() == 1:
        return images.std(0, correction=0).mean()
    wide = images.double()
    mean, square = ranks.summed(torch.stack([wide.sum(0), wide.square().sum(0)])) / size
    spreads: Tensor = (square - mean.square()).clamp_min(0).sqrt()
    return spreads.mean().to(images.dtype)
