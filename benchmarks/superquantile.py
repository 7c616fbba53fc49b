"""The superquantile beside the mean, and beside what people write instead of it."""

import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from measure import (
    BOTH,
    FLOOR,
    FORWARD,
    MICROSECONDS,
    Case,
    Contender,
    Operation,
    in_graph,
)
from torch import Tensor

import sqloss
from sqloss import reference

ALPHA = 0.8
SORTABLE = 2**24  # torch.quantile takes fewer; beyond it the peers that sort take seconds


def cvar(n: int, **like: Any) -> Case:
    gpu = like["device"].type == "cuda"
    sorts = gpu or n <= SORTABLE
    modes = [FORWARD, BOTH] if sorts else [FORWARD]
    return Case(
        shape=[n],
        inputs=lambda: [normal(n, **like)],
        contenders=[
            Contender("mean", torch.mean),
            Contender(
                "sqloss.cvar",
                lambda x: sqloss.cvar(x, ALPHA),
                twin if sorts else twin_of_many,
                bars=cvar_gpu_bars(n) if gpu else cvar_bars(n),
            ),
            Contender("sum", torch.sum),
            *(peers(n) if sorts else []),
        ],
        modes=[*modes, *map(in_graph, modes)] if gpu else modes,
    )


def cvar_bars(n: int) -> dict[str, dict[str, float]]:
    forward = {"sum": 1.3} if n >= 2**24 else {}
    both = {"mean": 0.95} if n <= 2**16 else {"mean": 1.0, "topk().mean()": 1 / 20}
    return {FORWARD: forward, BOTH: both} if n <= SORTABLE else {FORWARD: forward}


def cvar_gpu_bars(n: int) -> dict[str, dict[str, float]]:
    if n <= 2**20:
        most = {MICROSECONDS: 6.0 if n <= 2**12 else 20.0} if n <= 2**19 else {}
        return {in_graph(FORWARD): most, BOTH: {"mean": 1.0}}
    return {
        FORWARD: {"sum": 1.25, FLOOR: 1 / 0.8} if n >= 2**28 else {},
        BOTH: {"mean": 1.15, "topk().mean()": 1 / 5} if n >= 2**28 else {},
    }


def batched(n: int, **like: Any) -> Case:
    """Rows of n losses, each in one piece and, on the CPU, side by side as well (dim=0)."""
    k = tail_size(n)
    gpu = like["device"].type == "cuda"
    rows = 2**16 if gpu else 2**12 if n >= 2**10 else 2**14
    modes = [FORWARD, BOTH]
    gpu_bars = {mode: {FLOOR: 1.3} for mode in map(in_graph, modes)}

    def contenders(dim: int) -> list[Contender]:
        name = ", dim=0" if dim == 0 else ""
        topk = f"topk().mean(){name}"
        bars = {FORWARD: {topk: 1.0}, BOTH: {topk: 1 / 8 if (n, dim) == (1024, 1) else 1.0}}
        inputs = (lambda: [normal(n, rows, **like)]) if dim == 0 else None
        row_twin = partial(twin, dim=[dim])
        return [
            Contender(
                f"sqloss.cvar{name}",
                lambda x: sqloss.cvar(x, ALPHA, dim=dim),
                row_twin,
                bars=gpu_bars if gpu else bars,
                inputs=inputs,
            ),
            Contender(
                topk,
                lambda x: x.topk(k, dim).values.mean(dim),
                row_twin,
                exact=False,
                inputs=inputs,
            ),
        ]

    return Case(
        shape=[rows, n],
        inputs=lambda: [normal(rows, n, **like)],
        contenders=[
            Contender("mean", lambda x: x.mean(-1)),
            *contenders(1),
            Contender("sum", lambda x: x.sum(-1)),
            Contender(
                "kthvalue + relu",
                partial(kthvalue_and_relu, n),
                partial(twin, dim=[1]),
                exact=False,
            ),
            *([] if gpu else contenders(0)),
        ],
        modes=[*modes, *map(in_graph, modes)] if gpu else modes,
        reads=2 if gpu else 1,  # by each pass once
    )


def weighted(n: int, **like: Any) -> Case:
    def inputs() -> list[Tensor]:
        return [
            normal(n, **like),
            torch.rand(n, **like),
            torch.rand(n, device=like["device"]) < 0.9,
        ]

    return Case(
        shape=[n],
        inputs=inputs,
        contenders=[
            Contender("mean", torch.mean, uses=[0]),
            Contender("sqloss.cvar", lambda x: sqloss.cvar(x, ALPHA), twin, uses=[0]),
            Contender(
                "sqloss.cvar, weight",
                lambda x, weight: sqloss.cvar(x, ALPHA, weight=weight),
                twin,
                uses=[0, 1],
                bars={BOTH: {"sqloss.cvar": 1.6}},
            ),
            Contender(
                "sqloss.cvar, mask",
                lambda x, mask: sqloss.cvar(x, ALPHA, mask=mask),
                lambda x, mask: twin(x, mask=mask),
                uses=[0, 2],
            ),
            Contender("weighted mean", lambda x, w: (x * w).sum() / w.sum(), uses=[0, 1]),
        ],
    )


def value_at_risk(n: int, **like: Any) -> Case:
    rank = threshold_rank(n)
    return Case(
        shape=[n],
        inputs=lambda: [normal(n, **like)],
        contenders=[
            Contender("kthvalue", lambda x: x.kthvalue(rank).values, threshold_twin),
            Contender(
                "sqloss.value_at_risk", lambda x: sqloss.value_at_risk(x, ALPHA), threshold_twin
            ),
            Contender("quantile", lambda x: x.quantile(ALPHA), threshold_twin, exact=False),
            Contender("sum", torch.sum),
        ],
        modes=[FORWARD],
    )


def inputs(n: int, **like: Any) -> Case:
    def special() -> Tensor:
        kind = torch.rand(n, device=like["device"])
        x = normal(n, **like).masked_fill_(kind < 0.03, torch.nan)
        return x.masked_fill_(kind < 0.02, torch.inf).masked_fill_(kind < 0.01, -torch.inf)

    def outlier() -> Tensor:
        x = normal(n, **like)
        x[n // 2] = torch.finfo(x.dtype).max / 4
        return x

    kinds: dict[str, Callable[[], Tensor]] = {
        "random": lambda: normal(n, **like),
        "sorted": lambda: normal(n, **like).sort().values,
        "reversed": lambda: normal(n, **like).sort(descending=True).values,
        "constant": lambda: torch.full([n], 0.7, **like),
        "two values": lambda: (torch.rand(n, device=like["device"]) < 0.5).to(like["dtype"]),
        "90 % ties": lambda: normal(n, **like).masked_fill_(
            torch.rand(n, device=like["device"]) < 0.9, 1.0
        ),
        "period n / 64": lambda: normal(-(-n // 64), **like).repeat(64)[:n],
        "denormal": lambda: torch.rand(n, **like) * torch.finfo(like["dtype"]).tiny,
        "NaN, inf, -inf": special,
        "one outlier": outlier,
    }
    return Case(
        shape=[n],
        inputs=lambda: [kinds["random"]()],
        contenders=[
            Contender(
                kind,
                lambda x: sqloss.cvar(x, ALPHA),
                twin,
                inputs=lambda make=make: [make()],
                bars={} if kind == "random" else {BOTH: {"random": 3.0}},
            )
            for kind, make in kinds.items()
        ],
        modes=[BOTH],
    )


OPERATIONS = {
    "cvar": Operation(
        "sqloss.cvar of n random normal losses",
        cvar,
        [2**6, 2**8, 2**10, 2**12, 2**13, 2**14, 2**16, 2**20, 2**24, 2**27],
        quick=[2**6, 2**12, 2**20],
        gpu_sizes=[2**7, 2**10, 2**12, 2**14, 2**16, 2**19, 2**20, 2**24, 2**28],
        plot="lines",
    ),
    "batched": Operation(
        "sqloss.cvar of many rows, dim=1 and dim=0",
        batched,
        [1, 2, 3, 8, 64, 256, 1024, 4096],
        quick=[1, 8, 1024],
        gpu_sizes=[1024],
    ),
    "weighted": Operation("sqloss.cvar(weight=, mask=)", weighted, [2**20]),
    "value_at_risk": Operation("sqloss.value_at_risk", value_at_risk, [2**20]),
    "inputs": Operation(
        "sqloss.cvar of unusual losses beside random ones", inputs, [2**20], quick=[2**16]
    ),
}


def normal(*shape: int, **like: Any) -> Tensor:
    return torch.randn(shape, **like) + 1  # a mean of 0 would have no relative error


def tail_size(n: int, alpha: float = ALPHA) -> int:
    return max(1, round((1 - alpha) * n))


def threshold_rank(n: int) -> int:
    """Of the threshold, counted from the smallest loss."""
    return n - math.ceil((1 - ALPHA) * n) + 1


def peers(n: int) -> list[Contender]:
    """What is written today. Most round k or interpolate the quantile; halves round in all."""
    k = tail_size(n)
    topk = Contender("topk().mean()", lambda x: x.topk(k).values.mean(), twin, exact=False)
    if n > SORTABLE:
        return [topk]
    waits: dict[str, Callable[[Tensor], Tensor]] = {
        "quantile mask": lambda x: x[x >= x.detach().quantile(ALPHA)].mean(),
    }
    if find_spec("sqwash"):
        import sqwash

        waits["sqwash"] = lambda x: sqwash.reduce_superquantile(x, 1 - ALPHA)
    return [
        topk,
        Contender("kthvalue + relu", partial(kthvalue_and_relu, n), twin, exact=False),
        *(Contender(name, f, twin, exact=False, capturable=False) for name, f in waits.items()),
    ]


def kthvalue_and_relu(n: int, x: Tensor) -> Tensor:
    threshold = x.kthvalue(threshold_rank(n), keepdim=True).values
    return (threshold + (x - threshold).relu().mean(-1, keepdim=True) / (1 - ALPHA)).squeeze(-1)


def twin(
    x: Tensor, weight: Tensor | None = None, mask: Tensor | None = None, dim: Any = ()
) -> list[Tensor]:
    arguments = (weight, mask)
    value, threshold, counts = reference.superquantile(x, 1 - ALPHA, *arguments, dim)
    gradient = reference.superquantile_backward(
        torch.ones_like(value), None, x, *arguments, threshold, counts, dim
    )
    return [value, gradient]


def twin_of_many(x: Tensor) -> list[Tensor]:
    """The value alone, from the tail and a little more: sorting the rest would take a minute."""
    worst = x[x > x[: 2**20].quantile(ALPHA - 0.01)]
    return [reference.superquantile(worst, (1 - ALPHA) * x.numel() / worst.numel())[0]]


def threshold_twin(x: Tensor) -> list[Tensor]:
    return [reference.superquantile(x, 1 - ALPHA)[1]]
