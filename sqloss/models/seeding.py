"""Randomness by name: every purpose has a stream of its own, so no use can shift another."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose, such as ``generator(seed, "order", epoch)``.

    It draws on the CPU for every device, so that a run means the same on all of them.
    """
    return torch.Generator().manual_seed(stream(seed, *purpose))


@contextmanager
def initialisation(
    seed: int, *purpose: str | int, device: torch.device | None = None
) -> Iterator[None]:
    """Layers built inside draw their weights from this stream; the global one is put back after.

    So is the generator of a CUDA device, where there is one.
    """
    own = stream(seed, *purpose)
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(own)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(own)
        yield


def stream(seed: int, *purpose: str | int) -> int:
    """The seed of one purpose."""
    name = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
