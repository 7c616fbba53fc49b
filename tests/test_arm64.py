"""The selection on arm64: cross-compiled, run by an emulator, with the bits of this machine."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HERE = ROOT / "tests" / "emulated_arm64"
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def compiled(compiler, program):
    flags = ["-std=c++20", "-O1", "-static", "-ffp-contract=off", "-Wno-psabi"]
    macros = ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]
    folders = [f"-I{HERE / 'include'}", f"-I{ROOT / 'csrc'}"]
    source = str(HERE / "selection.cpp")
    subprocess.run([compiler, *flags, *macros, *folders, source, "-o", program], check=True)
    return str(program)


def test_selection_has_the_same_bits_on_arm64(tmp_path):
    """The program checks thresholds and counts by sorting, too."""
    for tool in (CROSS_COMPILER, EMULATOR, "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine")
    here = compiled("g++", tmp_path / "here")
    arm64 = compiled(CROSS_COMPILER, tmp_path / "arm64")
    expected = subprocess.run([here], capture_output=True, text=True, check=True).stdout
    result = subprocess.run([EMULATOR, arm64], capture_output=True, text=True, check=True).stdout
    assert len(expected.splitlines()) == 5 * 11 * 5 * 2
    assert result == expected
