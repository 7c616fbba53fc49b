"""A sampler for anyone's DataLoader, which lifts small communities."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from sqloss.groups.communities import Given, communities_and_parts, stability
from sqloss.groups.features import check_number, check_whole
from sqloss.groups.probabilities import check_min_draw, power_of_share, probabilities

EPOCHS = 1_000_003  # a seed has draws of its own for so many


def drawn(p: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """So many numbers drawn with replacement by probabilities, int64; of any number of samples."""
    bounds = p.double().cumsum(0)
    at = torch.rand(count, dtype=torch.float64, generator=draws) * bounds[-1]
    return torch.searchsorted(bounds, at, right=True).clamp_max_(len(p) - 1)


class Lifting(NamedTuple):
    """From groups to probabilities: the one way of both samplers, this one and ``--sampling``."""

    power: float | None = None  # 1 where there is no target
    lift: bool = True
    min_size: int = 1
    min_draw: float = 0.0
    target_min_share: float = 0.0  # 0: none
    min_stability: float = 0.0

    def check(self, function: str) -> None:
        share, stable = self.target_min_share, self.min_stability
        if self.power is not None and share != 0:
            raise ValueError(
                f"{function}: target_min_share: expected no power with it, which it chooses, got "
                f"{self.power}"
            )
        check_number(function, "target_min_share", share, 0 <= share < 1, "a number in [0, 1)")
        check_number(function, "min_stability", stable, 0 <= stable <= 1, "a number in [0, 1]")
        check_min_draw(function, self.min_draw)

    def of_communities(self, function: str, features: Tensor, given: Given) -> dict[str, Tensor]:
        """What ``of_groups`` gives of communities; and how many ``parts`` each was joined of, and
        their ``stability`` where one is asked for."""
        self.check(function)
        numbers, parts = communities_and_parts(function, features, given)
        known = {"parts": parts}
        if self.min_stability == 0:
            return self.of_groups(numbers) | known
        known["stability"] = stability(features, numbers, **given._asdict())
        return self.of_groups(numbers, known["stability"] >= self.min_stability) | known

    def of_groups(self, groups: Tensor, lifted: Tensor | None = None) -> dict[str, Tensor]:
        """The probabilities ``p`` of samples of these ``groups``, [N], and the ``power``; of a
        target also the ``reached`` share."""
        options: dict[str, Any] = {
            "lift": self.lift,
            "min_size": self.min_size,
            "lifted": lifted,
            "min_draw": self.min_draw,
        }
        power, found = 1.0 if self.power is None else self.power, {}
        if self.target_min_share > 0:
            power, reached = power_of_share(groups, self.target_min_share, **options)
            found["reached"] = torch.tensor(reached, dtype=torch.float64)
        found["power"] = torch.tensor(power, dtype=torch.float64)
        return found | {"p": probabilities(groups, power, **options), "groups": groups}


class CommunitySampler(Sampler[int]):
    r"""Draws samples with replacement, those of small communities more often.

    An epoch is as many draws as there are samples, N, with the probabilities of
    :func:`sqloss.groups.probabilities` from the groups of :func:`sqloss.groups.communities`.

    Args:
        features: a row per sample, [N, D], of float16, bfloat16, float32 or float64.
        power, lift, min_size, min_draw: as of ``probabilities``; without a power and a target it
            is 1.
        target_min_share: instead of a power: the share of the draws that each community which may
            be lifted is to have, as of ``power_of_share``; 0: none.
        min_stability: in [0, 1]: communities of a lower :func:`sqloss.groups.stability` are not
            lifted; 0: all may be, in a fifth of the time.
        neighbours, resolution, merge_overlap, seed, standardise: as of ``communities``; the draws
            are by the seed and the epoch.
        num_replicas, rank: of processes that share an epoch, as of ``DistributedSampler``: each has
            every ``num_replicas``-th draw, and all have equally many, the first draws once more
            where N is no multiple.

    ``groups``, ``stability`` (``None`` where it was not asked for), ``power`` and ``probabilities``
    tell what was found. ``state_dict`` holds them, the epoch and how many of its draws were handed
    out, as StatefulDataLoader's convention has it: after ``load_state_dict`` the next iteration
    goes on there. Repeatable by the seed; ``set_epoch`` before each epoch makes them differ.

    Raises:
        TypeError: as ``communities``.
        ValueError: as ``communities`` and ``probabilities``; a rank out of range; both a power and
            a ``target_min_share``; a state of other data.

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
        power: float | None = None,
        *,
        lift: bool = True,
        min_size: int = 1,
        min_draw: float = 0.0,
        target_min_share: float = 0.0,
        min_stability: float = 0.0,
        neighbours: int = 10,
        resolution: float = 1.0,
        merge_overlap: float = 1.0,
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
        given = Given(neighbours, resolution, merge_overlap, seed, standardise)
        how = Lifting(power, lift, min_size, min_draw, target_min_share, min_stability)
        found = how.of_communities("CommunitySampler", features, given)
        self.groups: Tensor = found["groups"]
        self.stability: Tensor | None = found.get("stability")
        self.power = float(found["power"])
        self.probabilities: Tensor = found["p"]
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
            "stability": self.stability,
            "power": self.power,
            "probabilities": self.probabilities,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["probabilities"]) != len(self.probabilities):
            raise ValueError(
                f"CommunitySampler: state: expected one of {len(self.probabilities)} samples, got "
                f"one of {len(state['probabilities'])}"
            )
        self.groups, self.probabilities = state["groups"], state["probabilities"]
        self.stability, self.power = state["stability"], state["power"]
        self.epoch, self.handed_out = state["epoch"], state["handed_out"]
