import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from sqloss.training import checkpoint
from sqloss.training.config import RunConfig
from sqloss.training.datasets import Dataset
from sqloss.training.errors import UserError, require
from sqloss.training.flags import changed, configure
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


@pytest.fixture
def real_mnist(tmp_path) -> Path:
    """A data directory with the archives of MNIST, to be unpacked there."""
    try:
        require("torchvision")
    except UserError as error:
        pytest.skip(str(error))
    shared = Path(
        os.environ.get("SQLOSS_TEST_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")
    )
    if not (shared / "MNIST" / "raw").is_dir():
        pytest.skip("needs MNIST in $SQLOSS_TEST_DATA or in ../shared/data")
    return Path(shutil.copytree(shared / "MNIST", tmp_path / "MNIST")).parent


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


@pytest.fixture(scope="session")
def torchvision():
    """Skips where there is none that fits torch."""
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported here: {error}")
    return torchvision


@pytest.fixture
def write_celeba(torchvision, monkeypatch) -> Callable:
    """Writes faces in torchvision's layout of CelebA.

    ``attributes`` has for each name which faces have it; ``parts`` the part of each face: 0 to
    train on, 1 to validate, 2 to test.
    """
    reader = torchvision.datasets.CelebA
    unchecked = [(None, None, name) for _, _, name in reader.file_list]
    monkeypatch.setattr(reader, "file_list", unchecked)

    def write(
        root: Path,
        faces: Sequence[Image.Image],
        attributes: dict[str, Sequence[bool]],
        parts: Sequence[int],
    ) -> None:
        place = root / "celeba"
        (place / "img_align_celeba").mkdir(parents=True)
        names = [f"{number:06d}.jpg" for number in range(1, len(faces) + 1)]
        for name, face in zip(names, faces, strict=True):
            face.save(place / "img_align_celeba" / name, format="PNG")

        def table(file: str, header: list[str], row: Callable) -> None:
            lines = [*header, *(f"{name} {row(i)}" for i, name in enumerate(names))]
            (place / file).write_text("\n".join(lines) + "\n")

        count = str(len(faces))
        table(
            "list_attr_celeba.txt",
            [count, " ".join(attributes)],
            lambda i: " ".join("1" if has[i] else "-1" for has in attributes.values()),
        )
        table("identity_CelebA.txt", [], lambda i: i + 1)
        table("list_bbox_celeba.txt", [count, "x_1 y_1 width height"], lambda i: "0 0 9 9")
        table("list_landmarks_align_celeba.txt", [count, "lefteye_x lefteye_y"], lambda i: "1 2")
        table("list_eval_partition.txt", [], lambda i: parts[i])

    return write
