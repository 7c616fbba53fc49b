import fcntl
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# torch.compile's cache takes code for one CPU capability for that of another
if os.environ.get("ATEN_CPU_CAPABILITY"):
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR",
        f"{tempfile.gettempdir()}/sqloss-inductor-{os.environ['ATEN_CPU_CAPABILITY']}",
    )

# Derandomized: the same examples on every machine. No deadline: machines are shared.
settings.register_profile("sqloss", deadline=None, derandomize=True, max_examples=150)
settings.register_profile("emulated", settings.get_profile("sqloss"), max_examples=20)
settings.load_profile("sqloss")

# Processes that share the tests share the cores, too: idle threads wait busily for work
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if workers > 1:
    threads = max((os.cpu_count() or 1) // workers, 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of processes that tests start
    torch.set_num_threads(threads)


def pytest_addoption(parser):
    parser.addoption(
        "--emulate-cuda",
        action="store_true",
        help="run the CUDA kernels, on CPU tensors, by the emulation in tests/emulated_cuda",
    )


def pytest_configure(config):
    if config.getoption("--emulate-cuda"):
        sys.path.insert(0, str(Path(__file__).parent))
        from emulated_cuda.build import load

        load()
        settings.load_profile("emulated")


CUDA = pytest.param("cuda", marks=pytest.mark.cuda)  # what `.ci/gpu test` runs


def device_of(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    return torch.device(request.param)


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    return device_of(request)


@pytest.fixture(params=[CUDA])
def gpu(request):
    """For what a CPU does not have: streams, graphs, a memory of its own."""
    return device_of(request)


@pytest.fixture
def roomy_gpu(gpu):
    """For tests that take 32 GiB: one at a time, where several processes run tests."""
    with (Path(tempfile.gettempdir()) / f"sqloss-gpu-{os.getuid()}").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < 32 * 2**30:
            pytest.skip("expected 32 GiB of free memory on the GPU")
        yield gpu
        torch.cuda.empty_cache()


@pytest.fixture
def capture(gpu):
    def captured(step):
        """(replay, outputs): the step in a CUDA graph, and what each replay writes anew."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # what a first call prepares can't be captured
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = step()
        return graph.replay, outputs

    return captured


@pytest.fixture
def kernel_raises(pytestconfig):
    """pytest.raises for numbers that kernels refuse; CUDA's can't raise and assert instead."""

    def raises(error, match):
        if pytestconfig.getoption("emulate_cuda"):
            return pytest.raises(RuntimeError, match="device-side assertion")
        return pytest.raises(error, match=match)

    return raises


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def peak_memory():
    def measure(step):
        """The most bytes that torch has held at once during the step, beyond those held before."""
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            step()
        held = peak = 0
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak

    return measure


@pytest.fixture
def call_without_kernel():
    def call(operator, *arguments):
        """The operator as a device without a kernel gets it."""
        key = torch._C.DispatchKey.CompositeExplicitAutograd
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return operator.default._op_dk(key, *arguments)

    return call


@pytest.fixture
def need_capability():
    def need(capability):
        """Skips the test where the CPU lacks this capability, whatever the environment says."""
        from sqloss import _C

        has = _C.capability_of_cpu()
        if _C.lesser_capability(capability, has) != capability:
            pytest.skip(f"this CPU lacks {capability}: it has {has}")

    return need


SERVE = """
import sys, sqloss
print(sqloss._ops._C.cpu_capability(), flush=True)
for line in sys.stdin:
    program, sys.argv[1:] = eval(line)
    exec(program, {})
    print("saved", flush=True)
"""


class WithCapability:
    """A process that was told to use a CPU capability; it serves many programs, as it starts for
    longer than they run."""

    def __init__(self, capability, folder):
        self.folder = folder
        self.count = 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE],
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability.lower()},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "stderr").open("w"),
            text=True,
        )
        self.used = self.process.stdout.readline().strip()
        self.told = (folder / "stderr").read_text()

    def saved(self, program):
        """What a program saves as its first argument."""
        self.count += 1
        file = self.folder / str(self.count)
        print(repr((program, [str(file)])), file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "saved\n", (self.folder / "stderr").read_text()
        return torch.load(file)


@pytest.fixture(scope="session")
def with_capability(tmp_path_factory):
    started = []

    @functools.cache
    def start(capability):
        started.append(WithCapability(capability, tmp_path_factory.mktemp(capability)))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.communicate()


@pytest.fixture(scope="session")
def saved_with_capability(with_capability):
    @functools.cache
    def run(program, capability):
        """What a program saves as its first argument, with the kernels of this capability."""
        process = with_capability(capability)
        assert process.used == capability, process.told
        return process.saved(program)

    return run


@pytest.fixture
def quick_reports(monkeypatch):
    """Reports by a classifier that knows little, with coarse pictures: most of their time."""
    from sqloss.models import classifier

    figure = pytest.importorskip("matplotlib.figure").Figure
    save = figure.savefig

    def coarse(self, file, **_):
        self.set_layout_engine("none")
        save(self, file, format="png", dpi=20)

    monkeypatch.setattr(figure, "savefig", coarse)
    monkeypatch.setattr(classifier, "STEPS", 5)


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
        faces: Sequence,
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


@pytest.fixture
def real_mnist(torchvision, tmp_path) -> Path:
    """A data directory with the archives of MNIST, to be unpacked there."""
    shared = Path(
        os.environ.get("SQLOSS_TEST_DATA", Path(__file__).parents[1] / ".." / "shared" / "data")
    )
    if not (shared / "MNIST" / "raw").is_dir():
        pytest.skip("needs MNIST in $SQLOSS_TEST_DATA or in ../shared/data")
    return Path(shutil.copytree(shared / "MNIST", tmp_path / "MNIST")).parent
