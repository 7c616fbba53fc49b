"""The configuration of ``sqloss vae``."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from sqloss.common.errors import UserError
from sqloss.common.flags import as_flag, expect_whole, flag, make_absolute
from sqloss.models.vae import ARCHITECTURES, GREATEST_DF, LEAST_DF, PRIORS
from sqloss.training.config import ImageConfig, parse_sizes
from sqloss.training.risks import Mean, Risk
from sqloss.training.vae.objective import TAIL_TERMS, Objective, objective_name, vae_objective

DEFAULT_LR = {"torch": 1e-3, "numpy": 1e-2}  # of Adam, and of SGD; the keys are the backends
BACKWARDS = ("auto", "tail", "dense")
SMALLEST_DF = 0.5  # for which the sampling is made


@dataclass(frozen=True)
class VAEConfig(ImageConfig):
    """The hyper-parameters of a run, valid by construction."""

    command: ClassVar[str] = "vae"
    paths: ClassVar[tuple[str, ...]] = (*ImageConfig.paths, "reference")
    # These change rounding alone, as a device does.
    more_may_change: ClassVar[tuple[str, ...]] = ("backward", "microbatch_size")

    tail_term: str = flag(
        "elbo",
        "take the tail of the whole negative ELBO, or of its reconstruction term only",
        choices=TAIL_TERMS,
        formerly="tail",
    )
    reference: str = flag(
        "",
        "a run of sqloss vae on images of the same shape: the risk is of what each image loses "
        "against that run's standard model, or its only one, at the same draw",
        since=3,
        metavar="RUN_DIR",
    )
    backend: str = flag(
        "torch",
        "torch trains with Adam; numpy trains a dense VAE with SGD, and with its backward pass "
        "written by hand",
        choices=tuple(DEFAULT_LR),
    )
    lr: float = flag(
        0.0,
        "learning rate; 0: "
        + ", ".join(f"{lr:g} with --backend {name}" for name, lr in DEFAULT_LR.items()),
    )
    architecture: str = flag(
        "mlp",
        "dense layers only, or convolutions between them and the image",
        choices=ARCHITECTURES,
    )
    hidden: str = flag(
        "400",
        "units of the dense hidden layers, from the image's side, like 400 or 512,256; the "
        "decoder mirrors them",
        metavar="N,...",
    )
    channels: str = flag(
        "32,64",
        "channels of the convolutions of --architecture conv, from the image's side; each halves "
        "the image",
        metavar="N,...",
    )
    latent: int = flag(20, "latent dimensions", metavar="N")
    prior: str = flag(
        "normal",
        "distribution of the latent variables: of the prior and of the encoder's posterior",
        choices=PRIORS,
    )
    df: float = flag(
        5.0,
        "degrees of freedom of --prior t; where they are learnt, at the start; at 1 or less the "
        "-ELBO has no finite mean",
    )
    learn_df: bool = flag(
        False, f"learn one df of --prior t, between {LEAST_DF:g} and {GREATEST_DF:g}"
    )
    iwae_samples: int = flag(
        0,
        "train on the importance-weighted bound of K draws per image; 1: the ELBO with its KL "
        "sampled too; 0: the ELBO",
        metavar="K",
    )
    beta: float = flag(1.0, "weight of the KL term in the training objective")
    backward: str = flag(
        "auto",
        "tail: find the tail without a graph, then run forward and backward on its images alone, "
        "which changes the rounding and no more; dense: on all images of the batch; auto: tail "
        "where the objective allows it and the steps are large enough to gain by it",
        choices=BACKWARDS,
    )
    microbatch_size: int = flag(
        0,
        "take no more than N images at once on each process, and of each batch the tail alone, so "
        "that large batches train on their exact tail in the memory of small ones; 0: the whole "
        "batch",
        metavar="N",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect("lr", 0 <= self.lr < math.inf, "a number from 0 up")
        self._expect("beta", 0 <= self.beta < math.inf, "a number from 0 up")
        expect_whole(self, 1, "latent")
        expect_whole(self, 0, "iwae_samples", "microbatch_size")
        self._check_df()
        self._check_iwae()
        self._check_backend()
        self._check_backward()
        self._check_reference()
        parse_sizes("hidden", self.hidden)
        parse_sizes("channels", self.channels)
        self._check_effects()

    def _check_df(self) -> None:
        self._expect(
            "df",
            SMALLEST_DF <= self.df <= GREATEST_DF,
            f"a number from {SMALLEST_DF:g} to {GREATEST_DF:g} (the limit is --prior normal)",
        )
        if self.learn_df:
            if self.prior != "t":
                raise UserError(
                    f"--learn-df: expected --prior t, whose df it learns, got --prior {self.prior}"
                )
            between = f"a number between {LEAST_DF:g} and {GREATEST_DF:g} with --learn-df"
            self._expect("df", LEAST_DF < self.df < GREATEST_DF, between)

    def _check_backend(self) -> None:
        if self.backend == "numpy":
            self._expect("architecture", self.architecture == "mlp", "mlp with --backend numpy")
            if self.risk.tail_alpha is None and not self.risk.is_mean:
                raise UserError(
                    f"--risk: expected cvar or mean with --backend numpy, got {self.risk.name}"
                )
            if self.learn_df:
                raise UserError("--learn-df: expected --backend torch with it, got --backend numpy")
            for name in ("iwae_samples", "microbatch_size"):
                self._expect(name, getattr(self, name) == 0, "0 with --backend numpy")
            on_cpu = self.device in ("auto", "cpu")
            self._expect("device", on_cpu, "auto or cpu with --backend numpy")

    def _check_backward(self) -> None:
        of_all = f"--tail-term {self.tail_term}, whose KL is that of all images"
        if self.backward == "tail":
            for applies, why in (
                (
                    self.risk.tail_alpha is None,
                    f"{self.risk.flags}, which has no tail that all of the gradient is of",
                ),
                (self.tail_term != "elbo", of_all),
                (self.uses_numpy, "--backend numpy"),
            ):
                self._expect("backward", not applies, f"auto or dense with {why}")
        if self.microbatch_size and not self.risk.is_mean:
            for applies, why in (
                (
                    self.risk.tail_alpha is None,
                    f"{self.risk.flags}, which wants all losses of a batch at once",
                ),
                (self.tail_term != "elbo", of_all),
                (self.backward == "dense", "--backward dense, which takes all images at once"),
            ):
                self._expect("microbatch_size", not applies, f"0 with {why}")

    def _check_reference(self) -> None:
        if self.reference:
            for applies, why in (
                (self.risk.is_mean, f"{self.risk.flags}, as a constant moves no mean"),
                (self.uses_numpy, "--backend numpy"),
            ):
                self._expect("reference", not applies, f"none with {why}")
            make_absolute(self, "reference")

    def _check_iwae(self) -> None:
        if self.iwae_samples:
            terms = "with --iwae-samples, whose bound is not a sum of reconstruction and KL"
            self._expect("tail_term", self.tail_term == "elbo", f"elbo {terms}")
            self._expect("beta", self.beta == 1, f"1 {terms}")

    def _check_effects(self) -> None:
        """Whoever sets a flag of another prior or architecture believes to have chosen that."""
        for name, choice, needed in (("df", "prior", "t"), ("channels", "architecture", "conv")):
            chosen = getattr(self, choice)
            if chosen != needed and getattr(self, name) != getattr(VAEConfig, name):
                raise UserError(
                    f"{as_flag(name)}: expected {as_flag(choice)} {needed} with it, "
                    f"got {as_flag(choice)} {chosen}"
                )

    @property
    def learning_rate(self) -> float:
        """The learning rate asked for, or the backend's default."""
        return self.lr or DEFAULT_LR[self.backend]

    @property
    def objectives(self) -> dict[str, Objective]:
        """The objectives measured of every model; the tail's too if no model is trained on it.

        Of test images their losses are known, and not what else a risk may need.
        """
        return {
            name: vae_objective(risk, *self._bound)
            for name, risk in self.measured_risks.items()
            if not risk.needs
        }

    @property
    def objective_names(self) -> dict[str, str]:
        """The objectives in words, those of the models too that are not measured."""
        against = Path(self.reference).name
        return {
            name: objective_name(risk, *self._bound, against)
            for name, risk in self.measured_risks.items()
        }

    def trained(self, risk: Risk) -> Objective:
        """The objective that a model of this risk minimises, of the losses of all ranks."""
        return replace(vae_objective(risk.over_ranks, *self._bound), mean=Mean().over_ranks)

    @property
    def _bound(self) -> tuple[str, float, int]:
        return self.tail_term, self.beta, self.iwae_samples

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """The units of the dense hidden layers."""
        return parse_sizes("hidden", self.hidden)

    @property
    def channel_sizes(self) -> tuple[int, ...]:
        """The channels of the convolutions."""
        return parse_sizes("channels", self.channels)

    @property
    def uses_numpy(self) -> bool:
        """Whether NumPy computes, beside torch."""
        return self.backend == "numpy"

    @property
    def best_device(self) -> str:
        """The device that ``auto`` stands for: NumPy knows no GPU."""
        return "cpu" if self.uses_numpy else super().best_device
