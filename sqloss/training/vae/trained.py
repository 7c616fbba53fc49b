"""What a run has trained, to be used: read from its directory, in which nothing is changed."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqloss.models import VAE
from sqloss.training.config import RunConfig
from sqloss.training.data import Dataset, load_dataset
from sqloss.training.errors import UserError
from sqloss.training.run import read_config, restore
from sqloss.training.vae.config import VAEConfig
from sqloss.training.vae.loop import begin

ARGUMENT = "RUN_DIR"
# Nothing is trained here.
MAY_DIFFER = tuple(name for name in RunConfig.may_change if name != "epochs")


@dataclass(frozen=True)
class Trained:
    """A finished or a stopped run at its newest checkpoint, on the device of its config."""

    config: VAEConfig
    whole: Dataset  # before the imbalance
    data: Dataset  # that of the training
    models: dict[str, VAE]
    done: str  # how far the training is, in words


def load_trained(directory: Path, changes: Mapping[str, Any]) -> Trained:
    """The models of a run and their data; ``changes`` are of the fields ``MAY_DIFFER``."""
    config = read_config(VAEConfig, directory / "config.json", ARGUMENT)
    config = dataclasses.replace(config, **changes)
    device = config.torch_device
    whole = load_dataset(config.dataset, config.source)
    data = whole.imbalanced(config.imbalance, config.seed).to(device)
    training = begin(config, data)
    if not restore(training, directory, data.fingerprint(), ARGUMENT):
        raise UserError(
            f"{ARGUMENT}: expected a run with a checkpoint, got {directory}, which has none yet"
        )
    return Trained(config, whole, data, training.models, training.done())
