"""Loading: what an import checks, and what show_config says. And what holds of every operator on a
GPU, whatever it computes.
"""

import importlib
import os
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import sqloss
from sqloss import _build_info, _ops


def run_python(program, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_show_config_says_what_was_built_and_what_is_in_use(capsys):
    sqloss.show_config()
    said = capsys.readouterr().out
    assert f"sqloss {sqloss.__version__}" in said
    assert torch.__version__ in said
    assert "DEFAULT" in said and "CUDA" in said and "threads" in said
    if _build_info.cuda_toolkit is None:
        assert "not built (" in said and "SQLOSS_CUDA=1" in said
    else:
        assert _build_info.cuda_archs in said


CAPABILITIES = _build_info.cpu_capabilities  # the narrowest first


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_environment_narrows_the_cpu_capability_and_never_widens_it(
    capability, with_capability
):
    has = _ops._C.capability_of_cpu()
    used = min(capability, has, key=CAPABILITIES.index)
    process = with_capability(capability)
    assert process.used == used, process.told
    warnings = [line for line in process.told.splitlines() if "UserWarning: sqloss: " in line]
    assert len(warnings) == (used != capability)
    for warning in warnings:
        assert f"this CPU lacks {capability}" in warning
        assert f"ATEN_CPU_CAPABILITY={capability.lower()}. sqloss uses its {used}" in warning


@pytest.mark.parametrize("torchs", [*CAPABILITIES, "of another architecture"])
@pytest.mark.parametrize("cpus", CAPABILITIES)
def test_the_lesser_capability_of_torch_and_the_cpu(torchs, cpus):
    lesser = min(torchs, cpus, key=["of another architecture", *CAPABILITIES].index)
    expected = "DEFAULT" if lesser not in CAPABILITIES else lesser
    assert _ops._C.lesser_capability(torchs, cpus) == expected


@pytest.fixture
def copy_of_the_package(tmp_path):
    """The package as files, so that a test may spoil one."""
    copy = tmp_path / "sqloss"
    for folder in reversed(list(sqloss.__path__)):
        shutil.copytree(
            folder, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    return copy


@pytest.fixture
def error_of_import(copy_of_the_package, monkeypatch):
    """Imports the copy, in the place of the package, and returns why that fails."""

    def error():
        monkeypatch.syspath_prepend(copy_of_the_package.parent)
        for name in [name for name in sys.modules if name.partition(".")[0] == "sqloss"]:
            monkeypatch.delitem(sys.modules, name)
        with pytest.raises(ImportError) as raised:
            importlib.import_module("sqloss")
        return str(raised.value)

    return error


@pytest.mark.parametrize(
    "line, was_built_for",
    [
        ("torch_version = '2.0.0'", "sqloss was built for torch 2.0.0"),
        ("torch_cuda = '1.1'", r"\(CUDA 1.1\)"),
    ],
)
def test_another_torch_is_refused_with_the_command_that_mends_it(
    copy_of_the_package, error_of_import, line, was_built_for
):
    with open(copy_of_the_package / "_build_info.py", "a") as file:
        file.write(line + "\n")
    error = error_of_import()
    assert "Rebuild it: " in error
    assert re.search(was_built_for, error)
    assert torch.__version__ in error
    command = error.split("Rebuild it: ")[1]
    assert (
        command.startswith(sys.executable) and "pip install --force-reinstall --no-deps" in command
    )


def test_a_source_tree_without_a_build_says_how_to_build(
    copy_of_the_package, error_of_import, monkeypatch
):
    for built in [*copy_of_the_package.glob("_C.*"), copy_of_the_package / "_build_info.py"]:
        built.unlink()
    # hide the sqloss that is installed
    monkeypatch.setattr(pkgutil, "extend_path", lambda path, name: path)
    others = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
    monkeypatch.setattr(sys, "meta_path", others)
    expected = "sqloss: its compiled part is missing. Build it from the source folder: "
    assert expected in error_of_import()


def test_a_source_tree_finds_the_installed_build(tmp_path):
    """`python` in a clone after `pip install .` imports the clone's sqloss: it must find _C."""
    sources = Path(sqloss.__file__).parent
    clone = tmp_path / "sqloss"
    shutil.copytree(
        sources, clone, ignore=shutil.ignore_patterns("__pycache__", "_C.*", "_build_info.py")
    )
    installed = [Path(folder).parent for folder in sqloss.__path__]
    program = (
        "import torch, sqloss; print(sqloss.__file__); "
        "print(sqloss.cvar(torch.arange(10.), 0.8).item())"
    )
    path = os.pathsep.join(map(str, installed))
    said = run_python(program, tmp_path, PYTHONPATH=path)
    assert said.stdout.split() == [str(clone / "__init__.py"), "8.5"], said.stderr


def test_the_rebuild_command_names_where_the_install_came_from(monkeypatch):
    class Distribution:
        version = "1.2.3"

        def __init__(self, origin):
            self.origin = origin

        def read_text(self, name):
            assert name == "direct_url.json"
            return self.origin

    vcs = '{"vcs": "git", "commit_id": "abc"}'
    for origin, ending in [
        (None, "--no-binary sqloss sqloss==1.2.3"),
        ('{"url": "file:///src/sq%20loss", "dir_info": {}}', "'/src/sq loss'"),
        ('{"url": "file:///src/it", "dir_info": {"editable": true}}', "-e /src/it"),
        (f'{{"url": "https://x.org/y.git", "vcs_info": {vcs}}}', "git+https://x.org/y.git@abc"),
        ('{"url": "https://x.org/sqloss-1.2.3.tar.gz"}', "https://x.org/sqloss-1.2.3.tar.gz"),
        ('{"url": "file:///w/sqloss-1.2.3-cp311.whl"}', "--no-binary sqloss sqloss==1.2.3"),
    ]:
        distribution = Distribution(origin)
        monkeypatch.setattr(_ops.metadata, "distribution", lambda _, found=distribution: found)
        command = _ops._rebuild_command()
        pip = f"{sys.executable} -m pip install --force-reinstall --no-deps --no-cache-dir"
        assert command == f"{pip} {ending}"
    monkeypatch.setattr(_ops, "PathFinder", SimpleNamespace(find_spec=lambda name: None))
    assert _ops._rebuild_command().startswith("uv pip install --no-build-isolation --reinstall")


def test_naming_the_rebuild_command_leaves_setuptools_whole(tmp_path):
    program = "from sqloss import _ops; _ops._rebuild_command(); import setuptools"
    ran = run_python(program, tmp_path)
    assert ran.returncode == 0, ran.stderr


# --- every operator on a GPU ----------------------------------------------------------------------


def cvar_case(*shape, dtype=torch.float32, **options):
    def make(device):
        given = {
            name: torch.rand(shape, device=device) < 0.7 if name == "mask" else value
            for name, value in options.items()
        }
        return [shape], lambda x: sqloss.cvar(x.to(dtype), 0.8, **given)

    return make


def weighted_case(*shape):
    def make(device):
        weight = torch.rand(shape, device=device)
        return [shape], lambda x: sqloss.cvar(x, 0.8, weight=weight)

    return make


def loss_case(function, *shape, leaves=1, **options):
    def make(device):
        target = torch.rand(shape, device=device)
        if leaves == 2:  # a variance
            return [shape, shape], lambda x, v: function(x, target, v.exp(), alpha=0.8, **options)
        return [shape], lambda x: function(x, target, alpha=0.8, **options)

    return make


def cross_entropy_case(*shape, **options):
    def make(device):
        target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
        return [shape], lambda x: sqloss.cvar_cross_entropy(x, target, alpha=0.8, **options)

    return make


def rsample_case(rows, columns, of_df=None, **options):
    """Of Student-t latents with a df of that shape, else of normal ones."""

    def make(device):
        shape, seed = (rows, columns), torch.tensor(7, device=device)
        if of_df is None:
            return [shape, shape], lambda x, v: sqloss.normal_rsample_kl(
                x, logvar=v, seed=seed, **options
            )
        return [shape, shape, of_df], lambda x, v, d: sqloss.student_t_rsample_kl(
            d.exp() + 1, x, logvar=v, seed=seed, **options
        )

    return make


def tail_case(*shape, with_mask=False):
    """Two passes, the second over the rows of the tail."""

    def make(device):
        mask = torch.rand(shape[0], device=device) < 0.7 if with_mask else None
        return [shape], lambda x: sqloss.tail_loss(
            lambda x: x.square().mean(1), x, alpha=0.8, mask=mask
        )

    return make


CASES = {
    "cvar, 100": cvar_case(100),
    "cvar, 5,000": cvar_case(5000),
    "cvar, 2^16 + 1": cvar_case(2**16 + 1),
    "cvar, 2^20 + 1": cvar_case(2**20 + 1),
    "cvar, halves": cvar_case(5000, dtype=torch.bfloat16),
    "cvar, rows": cvar_case(64, 1000, dim=1),
    "cvar, columns": cvar_case(1000, 64, dim=0),
    "cvar, long rows": cvar_case(3, 70_001, dim=1),
    "cvar, weight": weighted_case(70_001),
    "cvar, mask": cvar_case(70_001, mask=True),
    "bce": loss_case(sqloss.cvar_binary_cross_entropy_with_logits, 64, 784, reduction="sum"),
    "mse, long rows": loss_case(sqloss.cvar_mse_loss, 3, 70_001),
    "smooth l1, elements": loss_case(sqloss.cvar_smooth_l1_loss, 64, 65, sample_dims=2),
    "gaussian nll": loss_case(sqloss.cvar_gaussian_nll_loss, 64, 784, leaves=2),
    "cross-entropy": cross_entropy_case(64, 1000, label_smoothing=0.1),
    "cross-entropy, pixels": cross_entropy_case(2, 21, 32, 33),
    "cross-entropy, many classes": cross_entropy_case(3, 50_257),
    "normal": rsample_case(128, 20),
    "Student-t": rsample_case(128, 20, of_df=()),
    "Student-t, df by column": rsample_case(1024, 64, of_df=(64,), num_samples=2),
    "Student-t, the divergence alone": rsample_case(
        33, 700, (33, 1), num_samples=9, return_z=False
    ),
    "tail_loss": tail_case(5000, 20),
    "tail_loss, mask": tail_case(5000, 20, with_mask=True),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
A_LONG_WAIT = 200_000_000  # cycles of a GPU: a tenth of a second


def leaves_of(shapes, device):
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


def outcomes(function, leaves):
    """Outputs and gradients."""
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs])
    return [*(t.detach() for t in outputs), *gradients]


def assert_same_bits(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@every_case
def test_same_bits_over_100_runs(device, case):
    shapes, function = case(device)
    leaves = leaves_of(shapes, device)
    expected = outcomes(function, leaves)
    for _ in range(100 if device.type == "cuda" else 3):
        assert_same_bits(outcomes(function, leaves), expected)


@every_case
def test_a_cuda_graph_computes_with_the_inputs_of_its_replay(gpu, capture, case):
    """And while it is captured, CUDA itself forbids to wait, and to take memory by cudaMalloc."""
    shapes, function = case(gpu)
    leaves = leaves_of(shapes, gpu)
    replay, got = capture(lambda: outcomes(function, leaves))
    for _ in range(3):
        with torch.no_grad():
            for leaf in leaves:
                leaf.normal_()
        replay()
        assert_same_bits(got, outcomes(function, leaves))


@every_case
def test_a_side_stream(gpu, case):
    """Work of another stream would see the inputs before they are there."""
    shapes, function = case(gpu)
    leaves, later = leaves_of(shapes, gpu), leaves_of(shapes, gpu)
    expected = outcomes(function, later)
    outcomes(function, leaves)
    torch.cuda.synchronize()
    beside = torch.cuda.Stream()
    with torch.cuda.stream(beside):
        torch.cuda._sleep(A_LONG_WAIT)
        with torch.no_grad():
            for leaf, values in zip(leaves, later, strict=True):
                leaf.copy_(values)
        got = outcomes(function, leaves)
    assert not beside.query()
    beside.synchronize()
    assert_same_bits(got, expected)


@every_case
def test_a_device_that_is_not_the_current_one(gpu, case):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU on this machine")
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    results = []
    for device in (first, second):
        torch.manual_seed(0)
        shapes, function = case(device)
        torch.manual_seed(1)
        results.append(outcomes(function, leaves_of(shapes, device)))
        assert torch.cuda.current_device() == 0
    assert all(t.device == second for t in results[1])
    if torch.cuda.get_device_name(first) == torch.cuda.get_device_name(second):
        assert_same_bits([t.to(first) for t in results[1]], results[0])


@every_case
def test_the_host_does_not_wait_for_the_device(gpu, case):
    shapes, function = case(gpu)
    leaves = leaves_of(shapes, gpu)
    outcomes(function, leaves)  # loads the kernels, and takes memory that the next call gets again
    torch.cuda.synchronize()
    torch.cuda._sleep(A_LONG_WAIT)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcomes(function, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.cuda.current_stream().query(), "the call took as long as the device"


@pytest.mark.parametrize("name", ["cvar, 5,000", "bce", "cross-entropy, pixels", "Student-t"])
def test_compile_reduce_overhead(gpu, name):
    """Inductor's CUDA graphs take the operators in."""
    shapes, function = CASES[name](gpu)
    compiled = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    counters.clear()
    for _ in range(5):  # warms up, records, replays
        leaves = leaves_of(shapes, gpu)
        torch.compiler.cudagraph_mark_step_begin()
        got = outcomes(compiled, leaves)
        torch.testing.assert_close(got, outcomes(function, leaves))
    assert counters["inductor"]["cudagraph_skips"] == 0


OPERATORS = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("sqloss::")}


class Called(TorchDispatchMode):
    """The names of the operators of sqloss that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "sqloss":
            self.names.add(operator._schema.name)
        return operator(*args, **(kwargs or {}))


def test_the_cases_of_the_sanitizers_call_every_operator(device):
    cases = runpy.run_path(str(Path(__file__).parent / "sanitizer_cases.py"))
    with Called() as called:
        assert cases["run"](device) > 500
    # what finds the tail as well makes way for two operators where a mode looks on
    assert called.names == {name for name in OPERATORS if not name.endswith("_losses_cvar")}


@pytest.mark.skipif(_build_info.cuda_toolkit is None, reason="no CUDA in this build")
def test_every_operator_has_a_cuda_kernel():
    for name in OPERATORS - {"sqloss::draw_seed"}:  # which is torch's randint there
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
