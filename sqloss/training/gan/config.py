"""The configuration of ``sqloss gan``."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sqloss.common.errors import UserError
from sqloss.common.files import expanded
from sqloss.common.flags import as_flag, as_given, expect_whole, flag
from sqloss.models.gan_losses import GAN_LOSSES
from sqloss.training.config import ImageConfig
from sqloss.training.risks import Mean, Risk

TAIL_PLAYERS = {"d": ("d",), "g": ("g",), "both": ("d", "g")}  # the players that train on a tail


@dataclass(frozen=True)
class GANConfig(ImageConfig):
    """The hyper-parameters of a run, valid by construction."""

    command: ClassVar[str] = "gan"
    paths: ClassVar[tuple[str, ...]] = (*ImageConfig.paths, "classifier", "fid_weights")
    more_may_change: ClassVar[tuple[str, ...]] = ("classifier", "fid_weights")

    epochs: int = flag(50, "passes over the training images", metavar="N")
    batch_size: int = flag(32, "images per step", metavar="N")
    tail_player: str = flag(
        "both",
        "take the tail of the losses of the discriminator (of real and of generated images "
        "separately), of the generator, or of both",
        choices=tuple(TAIL_PLAYERS),
        formerly="tail_of",
    )
    loss: str = flag("nonsaturating", "what the two play for", choices=GAN_LOSSES)
    conditional: bool = flag(False, "give both players the class of each image")
    info_codes: int = flag(
        0, "codes that the discriminator reads from generated images (InfoGAN)", metavar="K"
    )
    info_weight: float = flag(1.0, "weight of the codes' loss")
    gp_weight: float = flag(
        10.0, "weight of the gradient penalty of --loss wgan-gp", formerly="penalty"
    )
    d_steps: int = flag(
        1, "discriminator steps, each on a batch of its own, per turn of the generator", metavar="N"
    )
    g_steps: int = flag(1, "generator steps per turn", metavar="N")
    lr_d: float = flag(2e-4, "learning rate of the discriminator's Adam")
    lr_g: float = flag(2e-4, "learning rate of the generator's Adam")
    beta1: float = flag(0.5, "Adam's decay of the mean gradient")
    augment: bool = flag(
        False, "shift real and generated images, and change their brightness where they are colour"
    )
    ema: float = flag(
        0.0, "decay of the moving average of the generator that samples are drawn of; 0: none"
    )
    width: int = flag(64, "channels next to the image; each layer inwards doubles them")
    latent: int = flag(100, "dimensions of the noise", metavar="N")
    classifier: str = flag(
        "",
        "a file with the classifier that judges the samples, which is made where it is not there; "
        "without one, a classifier of this run's seed judges them and is not kept",
        metavar="FILE",
    )
    fid_weights: str = flag(
        "",
        "torch-fidelity's file of Inception weights, to measure the FID too",
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr_d", "lr_g"):
            self._expect(name, 0 < getattr(self, name) < math.inf, "a number above 0")
        for name in ("info_weight", "gp_weight"):
            self._expect(name, 0 <= getattr(self, name) < math.inf, "a number from 0 up")
        for name in ("beta1", "ema"):
            self._expect(name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        expect_whole(self, 1, "d_steps", "g_steps", "width", "latent")
        expect_whole(self, 2, "num_samples")  # a distance is one of distributions
        expect_whole(self, 0, "info_codes")
        self._check_effects()

    def _check_effects(self) -> None:
        """Whoever sets a flag that another one switches on believes to have switched that on."""
        for name, is_used, needed in (
            ("gp_weight", self.loss == "wgan-gp", "--loss wgan-gp"),
            ("info_weight", self.info_codes > 0, "--info-codes above 0"),
            ("tail_player", not self.risk.is_mean, "another risk than the mean"),
        ):
            if not is_used and getattr(self, name) != getattr(GANConfig, name):
                raise UserError(f"{as_flag(name)}: expected {needed} with it, got none")
        is_of_real = "d" in TAIL_PLAYERS[self.tail_player]
        of_real = f"d or both with {as_given('risk', self.risk.name)}, which is of real images"
        self._expect("tail_player", is_of_real or not self.risk.needs, of_real)

    def risks_of_losses(self, risk: Risk) -> dict[str, Risk]:
        """What a model of this risk minimises: of the discriminator's losses of real and of
        generated images, and of the generator's losses."""
        players = {"real": "d", "fake": "d", "g": "g"}
        return {losses: self._of(losses, player, risk) for losses, player in players.items()}

    def _of(self, losses: str, player: str, risk: Risk) -> Risk:
        """What is needed of samples is known of the real images alone."""
        is_tail = player in TAIL_PLAYERS[self.tail_player] and (losses == "real" or not risk.needs)
        return risk if is_tail else Mean()

    @property
    def risk_names(self) -> dict[str, str]:
        """The contenders' risks in words."""
        return {name: self._in_words(risk) for name, risk in self.measured_risks.items()}

    def _in_words(self, risk: Risk) -> str:
        real, fake, of_g = (each.words for each in self.risks_of_losses(risk).values())
        of_d = f"{real} of the discriminator's"
        if fake != real:
            of_d += f" losses on real images, the {fake} of those on generated ones"
        return f"{of_d} and the {of_g} of the generator's losses"

    @property
    def classifier_file(self) -> Path | None:
        return expanded(self.classifier) if self.classifier else None

    @property
    def fid_weights_file(self) -> Path | None:
        return expanded(self.fid_weights) if self.fid_weights else None
