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

    os.environ.setdefault("MAX_JOBS", "2")
    for operation in operations:
        build = CSRC.parent / "build" / "emulated_cuda" / operation
        build.mkdir(parents=True, exist_ok=True)
        compile_and_load(
            f"emulated_{operation}",
            [str(FOLDER / "emulation.cpp"), str(FOLDER / f"{operation}.cpp")],
            # First the emulation's headers, in the place of torch's of the same names
            extra_include_paths=[str(FOLDER / "include"), str(CSRC)],
            extra_cflags=[
                *("-std=c++20", "-O1", "-mavx2", "-mfma", "-ffp-contract=off"),
                *("-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-w"),
            ],
            build_directory=str(build),
            is_python_module=False,
        )


if __name__ == "__main__":
    load(sys.argv[1:] or OPERATIONS)
