"""Building: which torch it builds against, whether CUDA is compiled, and what an sdist holds."""

import importlib
import os
import re
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools
import torch

from sqloss import _C, _build_info

ROOT = Path(__file__).parents[1]


def run(python, program, *flags, **environment):
    return subprocess.run(
        [python, *flags, "-c", program],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def setup(*arguments, **environment):
    """setup.py far enough to decide what it would compile; compiles nothing, writes nothing."""
    program = "import sys; sys.argv = ['setup.py', '--version']; exec(open('setup.py').read())"
    return run(sys.executable, program, **environment)


@pytest.fixture
def only_setuptools(tmp_path):
    """A folder for sys.path with setuptools and no torch: what an isolated build starts from."""
    site_packages = Path(setuptools.__file__).parents[1]
    for package in ("setuptools", "_distutils_hack"):
        (tmp_path / package).symlink_to(site_packages / package)
    return tmp_path


ASK = (
    "import sys; sys.path[:0] = ['.', {setuptools!r}]; import build_backend as b; "
    "print(b._see_the_environments_torch()); import importlib.util as u; "
    "print(u.find_spec('torch') and u.find_spec('torch').origin)"
)


def test_an_isolated_build_sees_the_torch_of_the_environment(only_setuptools):
    # -S: without site-packages, as pip's isolation leaves the interpreter
    program = ASK.format(setuptools=str(only_setuptools))
    said = run(sys.executable, program, "-S", PYTHONPATH=str(only_setuptools))
    assert said.stdout.split() == ["True", torch.__file__], said.stderr


def test_a_build_without_torch_asks_for_one(only_setuptools, tmp_path):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    python = str(bare / "bin" / "python")
    program = (
        ASK.format(setuptools=str(only_setuptools))
        + "; b.build_meta.get_requires_for_build_wheel = lambda *_: ['others']"
        + "; print(b.get_requires_for_build_wheel())"
    )
    said = run(python, program)
    assert said.stdout.splitlines() == ["False", "None", "['others', 'torch>=2.11']"], said.stderr
    # and a compile there refuses, rather than make a package without its compiled part
    program = (
        f"import sys; sys.path[:0] = [{str(only_setuptools)!r}]; "
        "sys.argv = ['setup.py', 'build_ext']; exec(open('setup.py').read())"
    )
    assert "sqloss is compiled against torch, and there is none here" in run(python, program).stderr


def test_the_cpu_is_asked_for_all_that_the_compiler_may_use():
    """And answers as the operating system does."""
    capabilities = runpy.run_path(str(ROOT / "setup.py"))["CPU_CAPABILITIES"]
    needed = {name: {flag[2:] for flag in flags} for name, flags in capabilities.items()}
    asked = (ROOT / "csrc" / "core" / "cpu_capability.h").read_text()
    assert set().union(*needed.values()) <= set(re.findall(r'cpu_supports\("(\w+)"\)', asked))
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*: (.*)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    if flags is None:
        pytest.skip("no /proc/cpuinfo of an x86 CPU")
    has = [name for name in capabilities if needed[name] <= set(flags[1].split())]
    assert _C.capability_of_cpu() == has[-1]


def test_sqloss_cuda_takes_0_and_1():
    assert "SQLOSS_CUDA: expected 0, 1 or nothing, got 'yes'" in setup(SQLOSS_CUDA="yes").stderr
    said = setup(SQLOSS_CUDA="0")
    assert said.returncode == 0 and "building for the CPU only: SQLOSS_CUDA=0" in said.stderr


def test_one_cuda_architecture_of_each_major_version():
    of = runpy.run_path(str(ROOT / "setup.py"))["first_of_each_major"]
    torchs = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"
    assert of(torchs, "sm_75 sm_80 sm_86 sm_90 sm_120") == ["7.5", "8.0", "9.0", "12.0"]
    assert of("sm_50 sm_60 sm_70 sm_86 sm_90a", "sm_50\nsm_60\nsm_70\nsm_86") == ["7.0", "8.6"]
    assert of("sm_120 sm_86 sm_80", "sm_80 sm_86 sm_120") == ["8.0", "12.0"]
    assert of("sm_50 compute_50", "sm_75 sm_80") == []


def test_architectures_from_8_0_on_share_what_the_source_compiles_to():
    """As long as no source tells them apart; and nvcc is told what is built."""
    setup_py = runpy.run_path(str(ROOT / "setup.py"))
    assert setup_py["code_flags"](["7.5", "8.0", "9.0", "12.0"]) == [
        "-gencode=arch=compute_75,code=[sm_75]",
        "-gencode=arch=compute_80,code=[sm_80,sm_90,sm_120,compute_80]",
    ]
    assert setup_py["code_flags"](["7.0"]) == ["-gencode=arch=compute_70,code=[sm_70,compute_70]"]
    told_apart = r"__CUDA_ARCH__\s*[<>=!]+\s*(\d+)"
    sources = [path.read_text() for path in (ROOT / "csrc").glob("*/*.*")]
    versions = {int(v) for source in sources for v in re.findall(told_apart, source)}
    assert versions and max(versions) <= 800


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built with CUDA")
def test_cuda_on_a_cpu_torch_fails_with_the_reason():
    said = setup(SQLOSS_CUDA="1")
    assert said.returncode != 0
    assert (
        f"SQLOSS_CUDA=1, but CUDA cannot be built: torch {torch.__version__} was built without CUDA"
        in said.stderr
    )


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")
def test_cuda_of_another_major_version_fails_with_the_reason(tmp_path):
    """The toolkit that CUDA_HOME names is the one, and must fit torch."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 9.2, V9.2.88'\n")
    nvcc.chmod(0o755)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    said = setup(SQLOSS_CUDA="1", CUDA_HOME=str(tmp_path))
    assert said.returncode != 0
    assert "SQLOSS_CUDA=1, but CUDA cannot be built" in said.stderr
    major = torch.version.cuda.split(".")[0]
    why = f"torch needs a CUDA {major} toolkit; {tmp_path} has "
    assert why + "9.2" in said.stderr
    said = setup(SQLOSS_CUDA="", CUDA_HOME=str(tmp_path))
    assert said.returncode == 0 and f"building for the CPU only: {why}9.2" in said.stderr
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    said = setup(SQLOSS_CUDA="", CUDA_HOME=str(tmp_path))
    assert why + "an nvcc that does not run" in said.stderr
    nvcc.unlink()
    assert why + "no nvcc" in setup(SQLOSS_CUDA="", CUDA_HOME=str(tmp_path)).stderr


@pytest.fixture
def compiler(tmp_path):
    """A compiler that compiles nothing: it writes empty files, and what it was asked for."""
    script, log = tmp_path / "c++", tmp_path / "log"
    script.write_text(
        f"""#!/bin/sh
        case " $* " in *" -o "*) ;; *) exec {os.environ.get("CXX", "c++")} "$@";; esac
        echo "$@" >> {log}
        while [ $# -gt 1 ]; do
            case $1 in
                -o) out=$2;;
                -c) source=$2;;
                -MF) depfile=$2;;
            esac
            shift
        done
        case $source in *"$SPOILED") exit 1;; esac
        [ -z "$depfile" ] || echo "$out: $source" > "$depfile"
        echo > "$out"
        """
    )
    script.chmod(0o755)

    def build(spoiled, *path):
        """The commands of a build, in which this source does not compile."""
        log.unlink(missing_ok=True)
        said = run(
            sys.executable,
            "import sys; sys.argv = ['setup.py', 'build_ext', "
            f"'--build-temp', {str(tmp_path / 'temp')!r}, '--build-lib', {str(tmp_path / 'lib')!r}]"
            "; exec(open('setup.py').read())",
            SQLOSS_CUDA="0",
            MAX_JOBS="1",
            CXX=str(script),
            TORCH_NO_COMPILER_WRAPPER="1",
            SPOILED=spoiled,
            PYTHONPATH=os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]),
        )
        return said, log.read_text().splitlines()

    return build


def test_an_interrupted_build_goes_on_from_the_objects_that_are_there(compiler, tmp_path):
    said, first = compiler("csrc/sqloss.cpp")
    assert said.returncode != 0
    cpus = ", ".join(_build_info.cpu_capabilities)
    assert f"sqloss: compiling for the CPU ({cpus}): about " in said.stderr
    # pip isolates each build by another folder in front of sys.path
    said, then = compiler("nothing", str(tmp_path / "pip-build-env"))
    assert said.returncode == 0, said.stderr
    *compiled, link = then
    sources = [re.search(r" -c (\S+) -o (\S+)", command).groups() for command in first]
    again = [re.search(r" -c (\S+) -o (\S+)", command).groups() for command in compiled]
    assert {*sources} & {*again} == {sources[-1]}
    # Of equal inline functions the linker keeps the first, and code for a wider CPU must not run
    # on a narrower one
    objects = [Path(word).parts for word in link.split() if word.endswith(".o")]
    assert len(objects) == len(sources) + len(again) - 1
    capabilities = list(_build_info.cpu_capabilities)
    width = [
        max((capabilities.index(p) for p in path if p in capabilities), default=-1)
        for path in objects
    ]
    assert width == sorted(width) and {*width} == {*range(-1, len(capabilities))}


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{kernel}' for 'sm_80'
ptxas info    : Function properties for {kernel}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1312 bytes smem, 416 bytes cmem[0]
ptxas info    : Compile time = 12.3 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{kernel}' for 'sm_90'
ptxas info    : Function properties for called
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Function properties for {kernel}
    32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 38 registers, used 0 barriers, 32 bytes cumulative stack size
"""


def test_the_report_of_the_kernels_says_what_ptxas_says(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    report = importlib.import_module("kernel_resources")
    kernel = "_ZN6sqloss9operation12_GLOBAL__N_111some_kernelIfLi4EEEvl"
    kernels = report.parse(PTXAS.format(kernel=kernel))
    assert kernels == [
        report.Kernel(kernel, "sm_80", registers=40, shared=1312, stack=0, spilled=0),
        report.Kernel(kernel, "sm_90", registers=38, shared=0, stack=48, spilled=12),
    ]
    name = (
        "void sqloss::operation::(anonymous namespace)::some_kernel<c10::Half, (int)4, "
        "sqloss::core::Less<float> >(sqloss::operation::Losses, long)"
    )
    said = ("operation", "some_kernel<Half, (int)4, Less<float> >")
    assert report.short(name) == said
    assert report.demangled({kernel}) == {kernel: ("operation", "some_kernel<float, 4>")}
    text = report.markdown(kernels, {kernel: said}, ["-O3"], "13.0")
    assert f"| `{said[1]}` | 40 / 38 | 1,312 / 0 | 0 / 48 | 0 / 12 |" in text
    assert f"1 kernels. Spilling registers: {said[1]}." in text
    with pytest.raises(ValueError, match="expected registers"):
        report.parse(PTXAS.format(kernel=kernel).replace("Used 38", "Took 38"))


def test_the_report_of_the_kernels_has_all_of_them():
    """Else run `python benchmarks/kernel_resources.py --output` it again."""
    file = ROOT / "benchmarks" / "results" / "kernel-resources.md"
    if not file.exists():
        pytest.skip("a package without results")
    sections = re.split(r"^## (\w+)\n", file.read_text(), flags=re.MULTILINE)[1:]
    said = {
        operation: set(re.findall(r"^\| `(\w+)", table, re.MULTILINE))
        for operation, table in zip(sections[::2], sections[1::2], strict=True)
    }
    written = {}
    for source in (ROOT / "csrc").glob("*/*"):
        bounds = r"(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+)?"
        names = re.findall(rf"__global__\s+void\s+{bounds}(\w+)\(", source.read_text())
        if names:
            written.setdefault(source.parent.name, set()).update(names)
    assert said == written


def test_an_sdist_holds_what_building_and_testing_need(tmp_path):
    program = "import sys; sys.path[:0] = ['.']; import build_backend as b; b.build_sdist({!r})"
    said = run(sys.executable, program.format(str(tmp_path)))
    (archive,) = tmp_path.glob("sqloss-*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {Path(*Path(name).parts[1:]) for name in tar.getnames()}
    assert Path("sqloss/_build_info.py") not in held  # of this machine
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: no list of the sources to compare with")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    folders = ("csrc/", "sqloss/", "tests/", "benchmarks/")
    needed = [
        name
        for name in tracked.stdout.split()
        if (name.startswith(folders) and not name.endswith((".md", ".png"))) or "/" not in name
    ]
    needed = [name for name in needed if name not in (".gitignore", ".clang-format")]
    missing = [name for name in needed if Path(name) not in held]
    assert not missing, said.stderr
