import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sqloss.common.errors import UserError
from sqloss.common.flags import changed, configure
from sqloss.datasets import Dataset
from sqloss.training import checkpoint
from sqloss.training.config import RunConfig
from sqloss.training.loop import Training
from sqloss.training.progress import Progress
from sqloss.training.run import Run
from sqloss.training.vae.config import VAEConfig
from sqloss.training.vae.loop import begin


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only lose by threads that wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def assert_same():
    return assert_equal_at_any_depth


def assert_equal_at_any_depth(first, second):
    """Bit for bit."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal_at_any_depth(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_equal_at_any_depth(a, b)
    else:
        assert first == second


@pytest.fixture
def assert_same_run(assert_same):
    """That two runs' directories hold the same training, bit for bit."""

    def compare(first: Path, second: Path) -> None:
        newest = [checkpoint.load(directory / "checkpoints") for directory in (first, second)]
        assert_same(*newest)
        assert (first / "metrics.csv").read_bytes() == (second / "metrics.csv").read_bytes()

    return compare


class Signalling(Progress):
    """Sends this process a signal after so many steps."""

    def __init__(self, after: int, number: int = signal.SIGINT) -> None:
        super().__init__(0, 0, 4)
        self.after = after
        self.number = number

    def step(self) -> None:
        self.after -= 1
        if self.after == 0:
            signal.raise_signal(self.number)


@pytest.fixture
def signalling() -> type[Signalling]:
    return Signalling


class Trainer:
    """Small trainings on random images: three steps an epoch, the last of a partial batch."""

    def __init__(
        self, start: Callable[[RunConfig, Dataset], Training], config: RunConfig, sides: tuple
    ) -> None:
        self.start = start
        self.config = config
        draws = torch.Generator().manual_seed(0)
        self.data = Dataset(
            name="random",
            class_names=("a", "b", "c"),
            train_images=torch.randint(256, (50, 1, *sides), generator=draws, dtype=torch.uint8),
            train_labels=torch.randint(3, (50,), generator=draws),
            test_images=torch.randint(256, (20, 1, *sides), generator=draws, dtype=torch.uint8),
            test_labels=torch.arange(20) % 3,
        )

    def begin(self, config: RunConfig) -> Training:
        return self.start(config, self.data)

    def train(self, run: Run, progress: Progress | None = None) -> tuple[Training, bool]:
        """Start or resume a run as the command line does; also, whether it came to its end."""
        training = self.begin(run.config)
        run.start(training, self.data)
        return training, run.fit(progress or Progress(0, 0, run.config.epochs))

    def run(self, directory: Path) -> Run:
        return Run.new(directory, self.config)


@pytest.fixture
def make_trainer() -> type[Trainer]:
    return Trainer


@pytest.fixture
def trainer(make_trainer) -> Trainer:
    config = configure(
        VAEConfig, epochs=4, batch_size=20, hidden="8", latent=3, num_samples=40, imbalance="none"
    )
    return make_trainer(begin, config, (4, 3))


@pytest.fixture
def stops_without_saving(trainer, tmp_path, assert_same):
    """That a training that ``breaks(training)`` breaks is told with ``advice``, and not saved."""

    def check(breaks: Callable[[Training], None], advice: str) -> None:
        trainer.train(Run.new(tmp_path, changed(trainer.config, epochs=1)))
        good = checkpoint.load(tmp_path / "checkpoints")
        run = Run.resumed(type(trainer.config), tmp_path, {"epochs": 2})
        training = trainer.begin(run.config)
        trainer.start = lambda *_: training

        class Breaking(Signalling):
            def step(self) -> None:
                super().step()
                breaks(training)

        for after in (1, 100):  # mid-epoch, on an interruption; and at the epoch's end
            with pytest.raises(
                UserError, match=f"the cvar model is no longer finite.*{advice}"
            ) as raised:
                trainer.train(run, Breaking(after))
            newest = tmp_path / "checkpoints" / "epoch-0001.pt"
            assert f"{newest}, from before, is intact" in str(raised.value)
            assert_same(checkpoint.load(tmp_path / "checkpoints"), good)

    return check
