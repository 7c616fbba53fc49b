"""Compiles csrc/ into sqloss._C with torch's BuildExtension.

Environment: SQLOSS_CUDA=0 builds for the CPU only, SQLOSS_CUDA=1 fails where CUDA can't be built,
unset builds CUDA where it can; CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS as for any extension.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CUDA_WISH = os.environ.get("SQLOSS_CUDA", "")
if CUDA_WISH not in ("", "0", "1"):
    raise SystemExit(f"SQLOSS_CUDA: expected 0, 1 or nothing, got {CUDA_WISH!r}")

# csrc/*/cpu.cpp is compiled once for each of these and picked at run time (core/cpu_capability.h).
# No contraction into fused multiply-adds but those of core/vector_math.h: capabilities round alike,
# bit for bit. Nobody traps floating-point exceptions or reads errno, which compilers must otherwise
# keep by not vectorising.
# gcc 12 calls its own AVX-512 intrinsics maybe-uninitialized, and warns of vectors in the interface
# of functions that are inlined.
KERNEL_FLAGS = [
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-Wno-maybe-uninitialized",
    "-Wno-psabi",
]
# The other sources, which call the kernels, spend their time in torch. Torch's header of all its
# operators, and -O3, would take most of the time that they take to compile.
HOST_FLAGS = ["-DAT_PER_OPERATOR_HEADERS", "-O2"]
CPU_CAPABILITIES = {"DEFAULT": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    CPU_CAPABILITIES["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    CPU_CAPABILITIES["AVX512"] = [
        *CPU_CAPABILITIES["AVX2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    ]


# Of one core of an AMD EPYC (Zen 3): for the CPU, for each PTX of the CUDA files, and for the code
# that is made of it for each architecture
CPU_MINUTES, PTX_MINUTES, CODE_MINUTES = 6.5, 1.5, 1.2


class NoCuda(Exception):
    """Why the CUDA sources are not compiled."""


def cuda_home_candidates():
    """Where a CUDA toolkit may be; CUDA_HOME is the user's own word, which nothing overrules."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        yield named
        return
    nvcc = shutil.which("nvcc")
    if nvcc:
        yield Path(nvcc).parent.parent
        yield Path(nvcc).resolve().parent.parent
        # nvcc on PATH may be a wrapper script: the compiler itself says where its toolkit is
        dry_run = subprocess.run(
            [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True
        )
        yield from re.findall(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    if os.environ.get("CONDA_PREFIX"):
        yield os.environ["CONDA_PREFIX"]
    yield from pip_cuda_folders()
    yield "/usr/local/cuda"


def pip_cuda_folders():
    """Folders like site-packages/nvidia/cu13, which pip's nvidia packages for CUDA 13 share."""
    return [folder for entry in filter(None, sys.path) for folder in glob(f"{entry}/nvidia/cu*")]


def pip_cuda_headers():
    """In nvidia/cu13/include, or by package (nvidia/cusparse/include) before CUDA 13."""
    return [
        folder for entry in filter(None, sys.path) for folder in glob(f"{entry}/nvidia/*/include")
    ]


def cuda_include_folders(home):
    """The toolkit's headers: in include/, or in targets/*/include as conda lays them out."""
    folders = [f"{home}/include", *glob(f"{home}/targets/*/include")]
    folders = dict.fromkeys(os.path.realpath(folder) for folder in folders)
    return [folder for folder in folders if os.path.isfile(f"{folder}/cuda_runtime.h")]


def find_cuda_home(needed):
    """The first toolkit of the CUDA version that torch needs, whose minor part may differ."""
    tried = []
    for home in dict.fromkeys(os.path.realpath(home) for home in cuda_home_candidates()):
        version = toolkit_version(home)
        if version.split(".")[0] == needed.split(".")[0]:
            return home
        tried.append(f"{home} has {version}")
    raise NoCuda(f"torch needs a CUDA {needed.split('.')[0]} toolkit; {', '.join(tried)}")


def toolkit_version(home):
    """Like "13.0", or what is wrong with the toolkit."""
    if not os.access(f"{home}/bin/nvcc", os.X_OK):
        return "no nvcc"
    if not cuda_include_folders(home):
        return "no cuda_runtime.h"
    said = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+\.\d+)", said.stdout)
    return release[1] if release else "an nvcc that does not run"


def cuda_settings():
    """The CUDA toolkit to compile with, as keyword arguments of CUDAExtension; raises NoCuda."""
    import torch

    if CUDA_WISH == "0":
        raise NoCuda("SQLOSS_CUDA=0")
    if torch.version.cuda is None:
        raise NoCuda(f"torch {torch.__version__} was built without CUDA")
    home = find_cuda_home(torch.version.cuda)
    os.environ["CUDA_HOME"] = home  # read when torch.utils.cpp_extension is imported
    architectures, flags = os.environ.get("TORCH_CUDA_ARCH_LIST", ""), []
    if not architectures and torch.cuda.is_available():
        architectures = "visible GPUs"
    elif not architectures:
        families = torchs_families(home)
        architectures, flags = f"{';'.join(families)} and PTX", code_flags(families)
    # pip's headers go last: they only fill in what the toolkit lacks
    headers = [*cuda_include_folders(home), *pip_cuda_headers()]
    if not any(os.path.isfile(f"{folder}/nv/target") for folder in headers):
        raise NoCuda(f"{home} has no CCCL headers (nv/target); pip's are in nvidia-cuda-cccl")
    return {
        "include_dirs": headers,
        "library_dirs": cudart_folders(home),
        "architectures": architectures,
        "flags": flags,
    }


def torchs_families(home):
    """Of the architectures that torch was built for and this nvcc knows, the first of each major
    version, whose code the later ones of it run.
    """
    import torch

    known = subprocess.run([f"{home}/bin/nvcc", "--list-gpu-code"], capture_output=True, text=True)
    built = torch._C._cuda_getArchFlags() or ""
    families = first_of_each_major(built, known.stdout)
    if not families:
        raise NoCuda(f"{home}/bin/nvcc knows none of torch's architectures from 7.0 on: {built}")
    return families


def first_of_each_major(built, known):
    """Like ["8.0", "9.0"] for "sm_80 sm_86 sm_90". None below 7.0, which lacks what kernels use."""
    versions = sorted(
        (int(major), int(minor))
        for major, minor in re.findall(r"\bsm_(\d+)(\d)\b", built)
        if f"sm_{major}{minor}" in known.split() and int(major) >= 7
    )
    firsts = {}
    for major, minor in versions:
        firsts.setdefault(major, f"{major}.{minor}")
    return list(firsts.values())


def code_flags(families):
    """Those of nvcc for code of each family. The source of the kernels tells architectures apart
    below 8.0 alone: the compiler reads and optimises it once for all from there on, and makes the
    code of each from the same PTX. The last PTX is kept, for what is newer.
    """
    groups = [[], []]
    for family in families:
        groups[float(family) >= 8].append(family.replace(".", ""))
    groups = [group for group in groups if group]
    codes = [[f"sm_{family}" for family in group] for group in groups]
    codes[-1].append(f"compute_{groups[-1][0]}")
    return [
        f"-gencode=arch=compute_{group[0]},code=[{','.join(code)}]"
        for group, code in zip(groups, codes, strict=True)
    ]


def cudart_folders(home):
    """Where the linker finds libcudart.so; pip's package has no such name, so it gets a link."""
    folders = [f"{home}/lib64", f"{home}/lib", *glob(f"{home}/targets/*/lib")]
    found = [folder for folder in folders if os.path.exists(f"{folder}/libcudart.so")]
    if not found:
        versioned = [lib for folder in folders for lib in glob(f"{folder}/libcudart.so.*")]
        if not versioned:
            raise NoCuda(f"no libcudart.so in {', '.join(folders)}")
        links = Path("build/cudart").absolute()
        links.mkdir(parents=True, exist_ok=True)
        link = links / "libcudart.so"
        link.unlink(missing_ok=True)
        link.symlink_to(versioned[0])
        found = [str(links)]
    return found


def limit_jobs():
    """Parallel compilers, at most one for each 2 GiB of free memory (nvcc on torch's headers)."""
    if os.environ.get("MAX_JOBS"):
        return
    jobs = os.cpu_count() or 1
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        if available:
            jobs = min(jobs, int(available[1]) >> 21)
    os.environ["MAX_JOBS"] = str(max(1, jobs))


def compile_architectures_in_parallel(sources):
    """Where there are more jobs than CUDA files. By the environment, and not as a flag: ninja
    compiles again what has other flags, and free memory differs from build to build.
    """
    files = sum(source.endswith(".cu") for source in sources)
    threads = int(os.environ["MAX_JOBS"]) // files
    if threads > 1:
        flags = os.environ.get("NVCC_APPEND_FLAGS", "")
        os.environ["NVCC_APPEND_FLAGS"] = f"{flags} --threads={threads}".strip()


def what_is_built(build_info, code_flags):
    """What is compiled, for how long, and how to compile less."""
    jobs = int(os.environ["MAX_JOBS"])
    cpu = CPU_MINUTES / jobs
    cpus = ", ".join(build_info["cpu_capabilities"])
    if not build_info["cuda_toolkit"]:
        return f"compiling for the CPU ({cpus}): {duration(cpu)} with {jobs} jobs"
    import torch

    archs = build_info["cuda_archs"]
    codes = archs.count(".") or torch.cuda.device_count()
    cuda = (len(code_flags) or codes) * PTX_MINUTES + codes * CODE_MINUTES
    return (
        f"compiling for the CPU ({cpus}) and for CUDA ({archs}): "
        f"{duration(cpu + cuda / jobs)} with {jobs} jobs. SQLOSS_CUDA=0 leaves out CUDA "
        f"({duration(cpu)}); TORCH_CUDA_ARCH_LIST=9.0 compiles for one kind of GPU "
        f"({duration(cpu + (PTX_MINUTES + CODE_MINUTES) / jobs)}). An interrupted build goes on "
        "from there."
    )


def duration(minutes):
    return f"about {max(1, round(minutes))} min"


def extension_and_command():
    """The extension, and the build_ext command that compiles it."""
    import torch

    try:
        cuda, why_no_cuda = cuda_settings(), ""
    except NoCuda as reason:
        if CUDA_WISH == "1":
            raise SystemExit(f"SQLOSS_CUDA=1, but CUDA cannot be built: {reason}") from None
        cuda, why_no_cuda = None, str(reason)
        print(f"sqloss: building for the CPU only: {reason}", file=sys.stderr)
    limit_jobs()

    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    kernels = sorted(glob("csrc/*/cpu.cpp"))
    included = glob("csrc/*/autograd.cpp")  # in csrc/autograd.cpp
    sources = sorted({*glob("csrc/*.cpp"), *glob("csrc/*/*.cpp")} - {*kernels, *included})
    # -fopenmp: at::parallel_for is a header that runs serially without it
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    common = [
        "-std=c++20",  # torch 2.11 would choose an older one
        "-O3",
        "-g0",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        "-fvisibility=hidden",
        *openmp,
    ]
    # As for the CPU: no fused multiply-adds but those that are written
    nvcc = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "--fmad=false"]
    flags = {"cxx": common, "nvcc": nvcc}
    settings = {
        "include_dirs": [os.path.abspath("csrc")],
        "extra_compile_args": flags,
        "extra_link_args": openmp,
    }
    if cuda is None:
        extension = CppExtension("sqloss._C", sources, **settings)
    else:
        settings["include_dirs"] += cuda["include_dirs"]
        sources += sorted(glob("csrc/*/cuda.cu"))
        flags["cxx"].append("-DSQLOSS_WITH_CUDA")
        nvcc += cuda["flags"]
        extension = CUDAExtension(
            "sqloss._C", sources, library_dirs=cuda["library_dirs"], **settings
        )

    build_info = {
        "version": None,
        "torch_version": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "compiler": compiler_version(),
        "cpu_capabilities": tuple(CPU_CAPABILITIES),
        "cuda_toolkit": toolkit_version(os.environ["CUDA_HOME"]) if cuda else None,
        "cuda_archs": cuda["architectures"] if cuda else None,
        "why_no_cuda": why_no_cuda,
    }

    class BuildSqloss(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # No object of one torch is taken for that of another, whatever the files' times say
            self.build_temp = f"{self.build_temp}-torch-{torch.__version__}"
            self.force = True

        def build_extension(self, ext):
            flags = cuda["flags"] if cuda else []
            print(f"sqloss: {what_is_built(build_info, flags)}", file=sys.stderr, flush=True)
            if cuda:
                compile_architectures_in_parallel(sources)
            compile_in_order = self.compiler.compile

            def compile_slowest_first(sources, **settings):  # setuptools sorts them by name
                def slow_to_fast(source):
                    return not source.endswith(".cu"), source.count(os.sep)

                return compile_in_order(sorted(sources, key=slow_to_fast), **settings)

            self.compiler.compile = compile_slowest_first
            # After the other objects, narrowest first: where two objects hold the same inline
            # function the linker keeps the first, so code for a newer CPU is never called on an
            # older one.
            for capability, machine_flags in CPU_CAPABILITIES.items():
                macros = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
                ext.extra_objects += self.compiler.compile(
                    kernels,
                    output_dir=os.path.join(self.build_temp, capability),
                    include_dirs=ext.include_dirs,
                    extra_postargs={
                        "cxx": [
                            *ext.extra_compile_args["cxx"],
                            *KERNEL_FLAGS,
                            *machine_flags,
                            *macros,
                        ],
                        "nvcc": [],
                    },
                    depends=glob("csrc/*/*.h"),
                )
            ext.extra_compile_args["cxx"] += HOST_FLAGS
            super().build_extension(ext)
            build_info["version"] = self.distribution.get_version()
            self.write_build_info(Path(self.get_ext_fullpath(ext.name)).parent)

        def write_build_info(self, folder):
            lines = [
                '"""What sqloss._C beside this file was built for: written by setup.py."""',
                "",
            ]
            lines += [f"{name} = {value!r}" for name, value in build_info.items()]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "_build_info.py").write_text("\n".join(lines) + "\n")

        def copy_extensions_to_source(self):
            super().copy_extensions_to_source()
            self.write_build_info(Path("sqloss"))

    return extension, BuildSqloss


class NoTorch(build_ext):
    def run(self):
        raise SystemExit(
            "sqloss is compiled against torch, and there is none here. With --no-build-isolation "
            "install torch, setuptools and ninja first."
        )


def compiler_version():
    compiler = shlex.split(os.environ.get("CXX", "c++"))  # what torch's ninja files run
    try:
        said = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
    except OSError as error:
        return f"{shlex.join(compiler)}: {error.strerror}"
    return said.stdout.partition("\n")[0]


def main():
    try:
        import torch
    except ImportError:  # enough for an sdist or its metadata
        setup(
            install_requires=["torch>=2.11"],
            ext_modules=[Extension("sqloss._C", [])],
            cmdclass={"build_ext": NoTorch},
        )
        return
    extension, command = extension_and_command()
    setup(
        # the built extension works with this torch alone (any +local part of the same version)
        install_requires=[f"torch=={torch.__version__.split('+')[0]}"],
        ext_modules=[extension],
        cmdclass={"build_ext": command},
    )


if __name__ == "__main__":  # benchmarks/kernel_resources.py takes the flags from here
    main()
