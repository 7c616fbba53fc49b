from pathlib import Path

import pytest
import torch

from sqloss.training.data import Dataset
from sqloss.training.loop import fit
from sqloss.training.progress import Progress
from sqloss.training.run import Run
from sqloss.training.vae.config import VAEConfig
from sqloss.training.vae.loop import VAETraining, begin


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only lose by threads that wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Trainer:
    """Small trainings on random images: three steps an epoch, the last of a partial batch."""

    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(0)
        self.data = Dataset(
            name="random",
            class_names=("a", "b", "c"),
            train_images=torch.randint(256, (50, 1, 4, 3), generator=draws, dtype=torch.uint8),
            train_labels=torch.randint(3, (50,), generator=draws),
            test_images=torch.randint(256, (20, 1, 4, 3), generator=draws, dtype=torch.uint8),
            test_labels=torch.arange(20) % 3,
        )
        self.config = VAEConfig(
            epochs=4, batch_size=20, hidden="8", latent=3, num_samples=40, imbalance="none"
        )

    def begin(self, config: VAEConfig) -> VAETraining:
        return begin(config, self.data)

    def train(self, run: Run, progress: Progress | None = None) -> tuple[VAETraining, bool]:
        """Start or resume a run as the command line does; also, whether it came to its end."""
        training = self.begin(run.config)
        recorder = run.start(training, self.data)
        with recorder, progress or Progress(0, 0, run.config.epochs) as shown:
            finished = fit(training, self.data, run.config, recorder.save, shown)
        return training, finished

    def run(self, directory: Path) -> Run:
        return Run.new(directory, self.config)


@pytest.fixture
def trainer() -> Trainer:
    return Trainer()
