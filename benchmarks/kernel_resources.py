"""What each CUDA kernel takes of a multiprocessor, as ptxas says: registers, shared memory, stack
and spilled registers. Compiles every csrc/*/cuda.cu as setup.py does; needs a CUDA toolkit, no GPU.

    python benchmarks/kernel_resources.py --output benchmarks/results/kernel-resources.md
"""

import argparse
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
ARCHITECTURES = "8.0;9.0+PTX"  # PTX has no registers yet: it is compiled, and that is all


class Kernel(NamedTuple):
    name: str  # mangled
    architecture: str  # "sm_90"
    registers: int
    shared: int  # bytes, the rest in bytes too; what a launch asks for at run time is not in it
    stack: int
    spilled: int  # stores and loads


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--architectures",
        default=ARCHITECTURES,
        metavar="LIST",
        help=f"as TORCH_CUDA_ARCH_LIST has them; default: {ARCHITECTURES}",
    )
    parser.add_argument(
        "--no-spills", action="store_true", help="exit with status 1 if a kernel spills registers"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the Markdown, as a file too")
    args = parser.parse_args(arguments)
    flags, version, said = compile_kernels(args.architectures)
    kernels = parse(said)
    text = markdown(kernels, demangled({kernel.name for kernel in kernels}), flags, version)
    if args.output:
        args.output.write_text(text)
    print(text)
    spilling = sum(kernel.spilled > 0 for kernel in kernels)
    if spilling:
        print(f"{spilling} of {len(kernels)} kernels spill registers", file=sys.stderr)
    return int(args.no_spills and spilling > 0)


def compile_kernels(architectures: str) -> tuple[list[str], str, str]:
    """The flags of nvcc, its version, and all that the compilers said."""
    os.environ.update(SQLOSS_CUDA="1", TORCH_CUDA_ARCH_LIST=architectures)
    os.chdir(ROOT)  # where setup.py runs
    setup = runpy.run_path("setup.py")
    extension, command = setup["extension_and_command"]()
    own_flags = list(extension.extra_compile_args["nvcc"])  # torch adds its own to that list

    class CompileKernels(command):  # type: ignore[misc, valid-type]
        def build_extension(self, ext: Any) -> None:
            flags = ext.extra_compile_args
            self.compiler.compile(
                [source for source in ext.sources if source.endswith(".cu")],
                output_dir=objects,
                include_dirs=ext.include_dirs,
                extra_postargs={**flags, "nvcc": [*flags["nvcc"], "-Xptxas=-v"]},
            )

    from setuptools import Distribution

    build = CompileKernels(Distribution({"name": "sqloss", "ext_modules": [extension]}))
    build.ensure_finalized()
    with tempfile.TemporaryDirectory() as objects, tempfile.TemporaryFile("w+") as output:
        sys.stdout.flush()
        saved = os.dup(1)
        os.dup2(output.fileno(), 1)  # compilers write there, past sys.stdout
        try:
            build.run()
            sys.stdout.flush()
        finally:
            os.dup2(saved, 1)
            os.close(saved)
            output.seek(0)
            said = output.read()
            if sys.exc_info()[0]:
                print(said, file=sys.stderr)
    return own_flags, setup["toolkit_version"](os.environ["CUDA_HOME"]), said


def parse(said: str) -> list[Kernel]:
    """The kernels in what `nvcc -Xptxas=-v` prints."""
    kernels = []
    parts = re.split(r"Compiling entry function '(\w+)' for '(\w+)'", said)[1:]
    for name, architecture, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        used = re.search(r"Used (\d+) registers.*", text)
        # of the kernel, and of functions that were not inlined into it
        frames = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
        )
        if not used or not frames:
            raise ValueError(f"ptxas: expected registers and stack of {name}, got {text!r}")
        shared = re.search(r"(\d+) bytes smem", used[0])
        stacks, stores, loads = zip(*(map(int, frame) for frame in frames), strict=True)
        kernels.append(
            Kernel(
                name,
                architecture,
                registers=int(used[1]),
                shared=int(shared[1]) if shared else 0,
                stack=sum(stacks),
                spilled=sum(stores) + sum(loads),
            )
        )
    return kernels


def demangled(names: set[str]) -> dict[str, tuple[str, str]]:
    """(operation, short name) of mangled names."""
    ordered = sorted(names)
    said = subprocess.run(
        ["c++filt"], input="\n".join(ordered), capture_output=True, text=True, check=True
    )
    return dict(zip(ordered, map(short, said.stdout.splitlines()), strict=True))


def short(name: str) -> tuple[str, str]:
    """The operation, and the kernel without namespaces, result and parameters."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    operation = re.search(r"sqloss::(\w+)::", name)
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            name = name[:i]
            break
    return operation[1] if operation else "", re.sub(r"\w+::", "", name)


def markdown(
    kernels: Sequence[Kernel],
    names: dict[str, tuple[str, str]],
    flags: Sequence[str],
    version: str,
) -> str:
    architectures = sorted({kernel.architecture for kernel in kernels})
    rows: dict[tuple[str, str], dict[str, Kernel]] = {}
    for kernel in kernels:
        rows.setdefault(names[kernel.name], {})[kernel.architecture] = kernel
    spilling = [names[kernel.name][1] for kernel in kernels if kernel.spilled]
    lines = [
        "# What the CUDA kernels take",
        "",
        "Registers of a thread, bytes of static shared memory, and bytes on the stack and spilled,",
        f"on {' / '.join(architectures)} (once where they agree), as ptxas of CUDA {version} says:",
        f"`nvcc {' '.join(flags)}`. Shared memory that a launch asks for is not in it.",
        "Written by `python benchmarks/kernel_resources.py`.",
        "",
        f"{len(rows)} kernels. Spilling registers: {', '.join(sorted(set(spilling))) or 'none'}.",
    ]
    for operation in sorted({operation for operation, _ in rows}):
        lines += [
            "",
            f"## {operation}",
            "",
            "| kernel | registers | shared memory | stack | spilled |",
            "| :-- | --: | --: | --: | --: |",
        ]
        for (of_operation, name), found in sorted(rows.items()):
            if of_operation != operation:
                continue
            cells = [
                both(found[a]._asdict()[figure] for a in architectures if a in found)
                for figure in ("registers", "shared", "stack", "spilled")
            ]
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def both(values: Any) -> str:
    said = [f"{value:,}" for value in values]
    return said[0] if len(set(said)) == 1 else " / ".join(said)


if __name__ == "__main__":
    sys.exit(main())
