"""Compiles the CUDA kernels for the emulation in include/, and makes them those of CPU tensors.

As a program: python tests/emulated_cuda/build.py [operation ...]
"""

import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CSRC = FOLDER.parent.parent / "csrc"
OPERATIONS = sorted(path.parent.name for path in CSRC.glob("*/cuda.cu"))


def load(operations=OPERATIONS):
    """From now on sqloss's operators run these operations' CUDA kernels on CPU tensors."""
    from torch.utils.cpp_extension import load as compile_and_load

    import sqloss  # noqa: F401  (registers the operators first)

    build = CSRC.parent / "build" / "emulated_cuda"
    build.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MAX_JOBS", "2")
    compile_and_load(
        "emulated_cuda",
        [
            *(str(FOLDER / f"{name}.cpp") for name in ("emulation", *operations)),
            str(CSRC / "core" / "torch.cpp"),
        ],
        # First the emulation's headers, in the place of torch's of the same names
        extra_include_paths=[str(FOLDER / "include"), str(CSRC)],
        extra_cflags=[
            *("-std=c++20", "-O1", "-mavx2", "-mfma", "-ffp-contract=off"),
            "-DSQLOSS_WITH_CUDA",
            "-DSQLOSS_LONG_ROW=16384",  # so that tests are quick to have some
            *("-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-w"),
        ],
        build_directory=str(build),
        is_python_module=False,
    )


if __name__ == "__main__":
    load(sys.argv[1:] or OPERATIONS)
