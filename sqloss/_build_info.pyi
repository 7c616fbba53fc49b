"""What sqloss._C was built for, written by setup.py."""

version: str
torch_version: str
torch_cuda: str | None
python: str
compiler: str
cpu_capabilities: tuple[str, ...]
cuda_toolkit: str | None
cuda_archs: str | None
why_no_cuda: str
