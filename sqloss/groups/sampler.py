"""A sampler for anyone's DataLoader, which lifts small communities."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from sqloss.groups.communities import communities
from sqloss.groups.features import check_whole
from sqloss.groups.probabilities import probabilities

EPOCHS = 1_000_003  # a seed has draws of its own for so many


def drawn(p: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """So many numbers drawn with replacement by probabilities, int64; of any number of samples."""
    bounds = p.double().cumsum(0)
    at = torch.rand(count, dtype=torch.float64, generator=draws) * bounds[-1]
    return torch.searchsorted(bounds, at, right=True).clamp_max_(len(p) - 1)


class CommunitySampler(Sampler[int]):
    r"""Draws samples with replacement, those of small communities more often.

    An epoch is as many draws as there are samples, N, with the probabilities of
    :func:`sqloss.groups.probabilities` from the groups of :func:`sqloss.groups.communities`.

    Args:
        features: a row per sample, [N, D], of float16, bfloat16, float32 or float64.
        power, lift, min_size: as of ``probabilities``.
        neighbours, resolution, seed, standardise: as of ``communities``; the draws are by the seed
            and the epoch.
        num_replicas, rank: of processes that share an epoch, as of ``DistributedSampler``: each has
            every ``num_replicas``-th draw, and all have equally many, the first draws once more
            where N is no multiple.

    ``state_dict`` holds the probabilities, the epoch and how many of its draws were handed out, as
    StatefulDataLoader's convention has it: after ``load_state_dict`` the next iteration goes on
    there. Repeatable by the seed; ``set_epoch`` before each epoch makes them differ.

    Raises:
        TypeError: as ``communities``.
        ValueError: as ``communities`` and ``probabilities``; a rank out of range; a state of other
            data.

    Example::

        >>> import torch
        >>> from sqloss.training import CommunitySampler
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> sampler = CommunitySampler(x, power=1.0)
        >>> loader = torch.utils.data.DataLoader(x, batch_size=50, sampler=sampler)
        >>> for epoch in range(2):
        ...     sampler.set_epoch(epoch)
        ...     for batch in loader:
        ...         pass
        >>> len(loader)
        4
    """

    def __init__(
        self,
        features: Tensor,
        power: float = 1.0,
        *,
        lift: bool = True,
        min_size: int = 1,
        neighbours: int = 10,
        resolution: float = 1.0,
        seed: int = 0,
        standardise: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        check_whole("CommunitySampler", "num_replicas", num_replicas, 1)
        check_whole("CommunitySampler", "rank", rank, 0)
        if rank >= num_replicas:
            raise ValueError(
                f"CommunitySampler: rank: expected a number below {num_replicas}, got {rank}"
            )
        self.groups = communities(
            features,
            neighbours=neighbours,
            resolution=resolution,
            seed=seed,
            standardise=standardise,
        )
        self.probabilities = probabilities(self.groups, power, lift=lift, min_size=min_size)
        self.seed, self.num_replicas, self.rank = seed, num_replicas, rank
        self.epoch = 0
        self.handed_out = 0  # of the epoch, by this rank

    def __len__(self) -> int:
        return -(-len(self.probabilities) // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        """The draws of the epoch, from where a state that was loaded has it."""
        draws = torch.Generator().manual_seed((self.seed * EPOCHS + self.epoch) % 2**63)
        order = drawn(self.probabilities, len(self.probabilities), draws)
        whole = torch.cat([order, order[: len(self) * self.num_replicas - len(order)]])
        own = whole[self.rank :: self.num_replicas].tolist()
        for number in own[self.handed_out :]:
            self.handed_out += 1
            yield number
        self.handed_out = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of the next iteration; in the middle of an epoch nothing is lost."""
        if epoch != self.epoch:
            self.epoch, self.handed_out = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "handed_out": self.handed_out,
            "groups": self.groups,
            "probabilities": self.probabilities,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["probabilities"]) != len(self.probabilities):
            raise ValueError(
                f"CommunitySampler: state: expected one of {len(self.probabilities)} samples, got "
                f"one of {len(state['probabilities'])}"
            )
        self.groups, self.probabilities = state["groups"], state["probabilities"]
        self.epoch, self.handed_out = state["epoch"], state["handed_out"]
