"""Loading: what an import checks, and what show_config says."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_the_environment_narrows_the_cpu_capability(capability, tmp_path):
    here = torch.backends.cpu.get_cpu_capability()
    has = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}.get(here, ())
    if capability not in ("default", *has):
        pytest.skip(f"this CPU has {here}")
    program = "import sqloss; print(sqloss._ops._C.cpu_capability())"
    said = run_python(program, tmp_path, ATEN_CPU_CAPABILITY=capability)
    assert said.stdout.strip() == capability.upper(), said.stderr


@pytest.fixture
def copy_of_the_package(tmp_path):
    """The package as files, so that a test may spoil one."""
    copy = tmp_path / "sqloss"
    for folder in reversed(list(sqloss.__path__)):
        shutil.copytree(
            folder, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    return copy


@pytest.mark.parametrize(
    "line, was_built_for",
    [
        ("torch_version = '2.0.0'", "sqloss was built for torch 2.0.0"),
        ("torch_cuda = '1.1'", r"\(CUDA 1.1\)"),
    ],
)
def test_another_torch_is_refused_with_the_command_that_mends_it(
    copy_of_the_package, line, was_built_for
):
    with open(copy_of_the_package / "_build_info.py", "a") as file:
        file.write(line + "\n")
    said = run_python("import sqloss", copy_of_the_package.parent).stderr
    error = said.splitlines()[-1]
    assert error.startswith("ImportError: ") and "Rebuild it: " in error
    with pytest.raises(ImportError, match=was_built_for):
        raise ImportError(error)
    assert torch.__version__ in error
    command = error.split("Rebuild it: ")[1]
    assert (
        command.startswith(sys.executable) and "pip install --force-reinstall --no-deps" in command
    )


def test_a_source_tree_without_a_build_says_how_to_build(copy_of_the_package):
    for built in [*copy_of_the_package.glob("_C.*"), copy_of_the_package / "_build_info.py"]:
        built.unlink()
    # hide the sqloss that is installed
    program = (
        "import sys, pkgutil; pkgutil.extend_path = lambda path, name: path; "
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
        "import sqloss"
    )
    said = run_python(program, copy_of_the_package.parent).stderr
    assert "sqloss: its compiled part is missing. Build it from the source folder: " in said


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
    every = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("sqloss::")}
    assert called.names == every


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
    monkeypatch.setattr(_ops, "find_spec", lambda name: None)
    assert _ops._rebuild_command().startswith("uv pip install --no-build-isolation --reinstall")
