"""Loads the extension, and says what it is. Each operation's module here makes its operators
usable from everywhere in torch: eager mode, torch.compile, torch.func, other devices.
"""

import json
import shlex
import sys
from importlib import metadata

import torch


def _rebuild_command() -> str:
    """The command that compiles sqloss against the torch that is installed now."""
    pip = f"{shlex.quote(sys.executable)} -m pip install --force-reinstall --no-deps"
    try:
        distribution = metadata.distribution("sqloss")
    except metadata.PackageNotFoundError:
        return f"{pip} ."
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if "url" not in origin:
        release = f"sqloss=={distribution.version}"
        return f"{pip} --no-cache-dir --no-binary sqloss {release}"
    folder = origin["url"].removeprefix("file://")
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    return f"{pip} {editable}{shlex.quote(folder)}"


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


def cuda_build() -> str:
    """Whether this build has CUDA kernels, and if not, why and what to do."""
    if _build_info.cuda_toolkit:
        return f"CUDA {_build_info.cuda_toolkit} for {_build_info.cuda_archs}"
    return (
        f"without CUDA ({_build_info.why_no_cuda}); to build with it: "
        f"SQLOSS_CUDA=1 {_rebuild_command()}"
    )


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
        f"  in use      {_C.cpu_capability()} kernels, {torch.get_num_threads()} threads; "
        f"GPUs: {', '.join(gpus) or 'none'}"
    )
