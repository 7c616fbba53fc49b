"""Loads the extension, and says what it is. Each operation's module here makes its operators
usable from everywhere in torch: eager mode, torch.compile, torch.func, other devices.
"""

import json
import os
import shlex
import sys
import warnings
from importlib import metadata
from importlib.machinery import PathFinder
from typing import overload
from urllib.parse import unquote, urlparse

import torch
from torch import Tensor


def _rebuild_command() -> str:
    """The command that compiles sqloss against the torch that is installed now."""
    # importlib.util.find_spec would tell setuptools that pip is at work, and break it
    if PathFinder.find_spec("pip"):
        command = f"{shlex.quote(sys.executable)} -m pip install --force-reinstall --no-deps"
    else:  # an environment of uv, whose builds see its torch only without isolation
        command = "uv pip install --no-build-isolation --reinstall --no-deps"
    # A cached wheel could be that of the old torch
    return f"{command} --no-cache-dir {_origin()}"


def _origin() -> str:
    """Where the installed sqloss came from, as pip takes it."""
    try:
        distribution = metadata.distribution("sqloss")
    except metadata.PackageNotFoundError:
        return "."
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    url = origin.get("url", "")
    if "vcs_info" in origin:
        url = f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
        if "subdirectory" in origin:
            url += f"#subdirectory={origin['subdirectory']}"
        return shlex.quote(url)
    if "dir_info" in origin:
        editable = "-e " if origin["dir_info"].get("editable") else ""
        return editable + shlex.quote(unquote(urlparse(url).path))
    if url and not url.endswith(".whl"):
        return shlex.quote(url)
    return f"--no-binary sqloss sqloss=={distribution.version}"


def _torch(version: str, cuda: str | None) -> str:
    return f"torch {version} ({f'CUDA {cuda}' if cuda else 'CPU only'})"


try:
    from sqloss import _build_info
except ImportError:
    raise ImportError(
        f"sqloss: its compiled part is missing. Build it from the source folder: "
        f"{_rebuild_command()}"
    ) from None

if (_build_info.torch_version, _build_info.torch_cuda) != (torch.__version__, torch.version.cuda):
    raise ImportError(
        f"sqloss was built for {_torch(_build_info.torch_version, _build_info.torch_cuda)}, but "
        f"{_torch(torch.__version__, torch.version.cuda)} is installed. Rebuild it: "
        f"{_rebuild_command()}"
    )

from sqloss import _C  # noqa: E402  (after the check: a mismatch would be an undefined symbol)

__version__: str = _build_info.version


def _warn_of_a_lesser_cpu() -> None:
    """Warns of an ATEN_CPU_CAPABILITY that names more than the CPU has: torch does not check it."""
    torchs, used = torch.backends.cpu.get_cpu_capability(), _C.cpu_capability()
    if torchs in _build_info.cpu_capabilities and torchs != used:
        warnings.warn(
            f"sqloss: this CPU lacks {torchs}, which torch is told to use: ATEN_CPU_CAPABILITY="
            f"{os.environ.get('ATEN_CPU_CAPABILITY')}. sqloss uses its {used} kernels, but some of "
            "torch's own (softmax is one) will end this process by an illegal instruction. Unset "
            "the variable.",
            stacklevel=2,
        )


_warn_of_a_lesser_cpu()


def cuda_build() -> str:
    """Whether this build has CUDA kernels, and if not, why and what to do."""
    if _build_info.cuda_toolkit:
        return f"CUDA {_build_info.cuda_toolkit} for {_build_info.cuda_archs}"
    return f"not built ({_build_info.why_no_cuda}); to build it: SQLOSS_CUDA=1 {_rebuild_command()}"


_warned: set[tuple[str, str]] = set()  # operations and device types


def warn_without_kernel(operation: str, device: torch.device) -> None:
    """Says once that an operation runs in plain PyTorch on this type of device."""
    if (operation, device.type) in _warned:
        return
    _warned.add((operation, device.type))
    why = "sqloss has kernels for the CPU and for CUDA"
    if device.type == "cuda":
        why = cuda_build()
    warnings.warn(
        f"sqloss: {operation} has no kernel for device type {device.type} here and runs in plain "
        f"PyTorch, with the same results but slower ({why})",
        stacklevel=3,
    )


@overload
def in_front(size: int, tensor: Tensor, bdim: int | None) -> Tensor: ...
@overload
def in_front(size: int, tensor: Tensor | None, bdim: int | None) -> Tensor | None: ...
def in_front(size: int, tensor: Tensor | None, bdim: int | None) -> Tensor | None:
    """The tensor with vmap's dimension, of this size, in front."""
    if tensor is None:
        return None
    return tensor.expand(size, *tensor.shape) if bdim is None else tensor.movedim(bdim, 0)


def show_config() -> None:
    """Prints the versions of sqloss and torch, what was built, and what is in use here.

    Example::

        >>> import sqloss
        >>> sqloss.show_config()  # doctest: +ELLIPSIS
        sqloss ...
    """
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(
        f"sqloss {__version__}\n"
        f"  built for   {_torch(_build_info.torch_version, _build_info.torch_cuda)}, "
        f"Python {_build_info.python}, {_build_info.compiler}\n"
        f"  CPU         {', '.join(_build_info.cpu_capabilities)}\n"
        f"  CUDA        {cuda_build()}\n"
        f"  in use      {_C.cpu_capability()} kernels (this CPU has {_C.capability_of_cpu()}), "
        f"{torch.get_num_threads()} threads; "
        f"GPUs: {', '.join(gpus) or 'none'}"
    )
