"""How a case is measured: each contender checked against its float64 twin, then all of them timed
in one process, interleaved, on inputs that rotate. On a GPU, CUDA events take the time: around a
loop of calls, where the slower one of host and device counts, or around the replay of a CUDA graph
that holds these calls, where the device alone does.
"""

import contextlib
import itertools
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

FORWARD, BOTH, STEP = "forward", "forward + backward", "training step"


def in_graph(mode: str) -> str:
    return f"{mode}, in a CUDA graph"


GRAPHS = {in_graph(mode): mode for mode in (FORWARD, BOTH, STEP)}
# What may stand in a contender's bars beside the names of its peers: the floor of report.py, and
# microseconds.
FLOOR, MICROSECONDS = "the floor", "us"

BLOCK_SECONDS = 0.02  # of one function at a time: long against the clock, short against the noise
ROUNDS = 31
QUICK_ROUNDS = 5  # the fewest, however slow a function is
POOL_BYTES = 2**26  # of rotating inputs: more than most caches hold, so none of them is warm
POOL_SIZE = 1024  # the most: enough that no branch predictor learns them
BANDWIDTH_BYTES = 2**28

Row = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """One function to time, and what it must be."""

    name: str
    function: Callable[..., Tensor | Sequence[Tensor]]
    twin: Callable[..., Sequence[Tensor]] | None = None
    """From inputs in float64 to the values and their sum's gradients; else the function itself."""
    exact: bool = True
    """False for a peer that is off by design: its error is printed, not judged."""
    repeatable: bool = True
    """False for a peer that draws other random numbers on every call: it has no errors."""
    capturable: bool = True
    """False for a peer that waits for the device: no CUDA graph holds it. A capture that fails ends
    the run, for torch can't go on after it.
    """
    bars: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What it may cost: ``{BOTH: {"mean": 1.2}}`` is 1.2 times forward + backward of the mean."""
    extra_bytes: int | None = None
    """What forward + backward may allocate beside the gradients, at its peak."""
    uses: Sequence[int] | None = None
    """Which of the case's inputs it takes. None: all."""
    inputs: Callable[[], Sequence[Tensor]] | None = None
    """Its own inputs instead of the case's."""


@dataclass(frozen=True)
class Case:
    """Contenders that are compared with each other; the first is the price."""

    shape: Sequence[int]
    inputs: Callable[[], Sequence[Tensor]]
    contenders: Sequence[Contender]
    leaves: Sequence[int] = (0,)  # the inputs that get a gradient
    modes: Sequence[str] = (FORWARD, BOTH)
    tolerance: float = 1e-6  # what is wrong by more is not timed
    reads: float = 1.0  # of all inputs, in forward + backward: what the floor counts


@dataclass(frozen=True)
class Operation:
    """A table of the report: ``case(size, dtype=..., device=...)`` for every size."""

    title: str
    case: Callable[..., Case]
    sizes: Sequence[int]
    quick: Sequence[int] | None = None  # else the same
    gpu_sizes: Sequence[int] | None = None  # else the same
    plot: str | None = None
    """"lines": the cost over the size; "bars": beside the other operations of its file."""


def measure(
    case: Case,
    device: torch.device,
    seconds: float,
    progress: Callable[[str], None] = lambda what: None,
) -> Iterator[Row]:
    """A row for every mode and contender; ``seconds`` are for the rounds of one mode."""
    torch.manual_seed(0)
    pools = _pools(case, device)
    inputs = {c.name: _take(pools[c.inputs or case.inputs], c.uses) for c in case.contenders}
    leaves = [s[i] for pool in pools.values() for s in pool for i in case.leaves]

    progress("checks")
    gradients_wanted = {mode: GRAPHS.get(mode, mode) == BOTH for mode in case.modes}
    _require_grad(leaves, any(gradients_wanted.values()))
    checks = _checks(case, {name: pool[0] for name, pool in inputs.items()})
    for mode in case.modes:
        progress(mode)
        both = gradients_wanted[mode]
        _require_grad(leaves, both)
        status = {name: check["status"] for name, check in checks.items()}
        if mode in GRAPHS:
            status |= {c.name: "not in a graph" for c in case.contenders if not c.capturable}
        sound = [c for c in case.contenders if status[c.name] == "ok"]
        calls = {c.name: _call(c, inputs[c.name][0], both) for c in sound}
        if mode in GRAPHS:
            times = in_graphs(calls, inputs, device, seconds)
        else:
            times = interleaved(calls, inputs, device, seconds)
        for c in case.contenders:
            first = inputs[c.name][0]
            gradients = sum(x.nbytes for x in first if x.requires_grad)
            row = {
                "function": c.name,
                "mode": mode,
                "exact": c.exact,
                **checks[c.name],
                "status": status[c.name],
                "seconds": times.get(c.name, []),
                "bytes_read": round((case.reads if both else 1) * sum(x.nbytes for x in first)),
                "bytes_written": gradients,
                "bars": dict(c.bars.get(mode, {})),
            }
            if mode == BOTH and c in sound:
                row["peak_bytes"] = peak_bytes(partial(calls[c.name], *first), device)
                if c.extra_bytes is not None:
                    row["peak_bytes_allowed"] = gradients + c.extra_bytes
            yield row


def interleaved(
    calls: Mapping[str, Callable[..., Any]],
    inputs: Mapping[str, Sequence[Sequence[Tensor]]],
    device: torch.device,
    seconds: float,
) -> dict[str, list[float]]:
    """Seconds per call of every function, in rounds in which each of them has its turn."""
    rotating = {name: itertools.cycle(inputs[name]) for name in calls}
    counts, round_seconds = {}, 0.0
    for name, call in calls.items():
        seconds_per_call(call, rotating[name], 1, device)  # warms up
        once = seconds_per_call(call, rotating[name], 2, device)
        counts[name] = max(1, int(BLOCK_SECONDS / once))
        round_seconds += counts[name] * once
    rounds = min(ROUNDS, max(QUICK_ROUNDS, int(seconds / max(round_seconds, BLOCK_SECONDS))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)  # so that nobody always runs on what the same other one leaves behind
        for name in order:
            times[name].append(seconds_per_call(calls[name], rotating[name], counts[name], device))
    return times


def in_graphs(
    calls: Mapping[str, Callable[..., Any]],
    inputs: Mapping[str, Sequence[Sequence[Tensor]]],
    device: torch.device,
    seconds: float,
) -> dict[str, list[float]]:
    """The same, of calls on all the inputs in a row that are captured once and replayed."""
    replays = {name: captured(call, inputs[name]) for name, call in calls.items()}
    times = interleaved(replays, {name: [()] for name in replays}, device, seconds)
    return {name: [t / len(inputs[name]) for t in of_name] for name, of_name in times.items()}


def captured(call: Callable[..., Any], inputs: Sequence[Sequence[Tensor]]) -> Callable[[], None]:
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # what a first call prepares can't be captured
        for _ in range(3):
            call(*inputs[0])
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for given in inputs:
            call(*given)
    return graph.replay


def seconds_per_call(
    call: Callable[..., Any],
    inputs: Iterator[Sequence[Tensor]],
    count: int,
    device: torch.device,
) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            call(*next(inputs))
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count
    begin = time.perf_counter()
    for _ in range(count):
        call(*next(inputs))
    return (time.perf_counter() - begin) / count


def bandwidth(device: torch.device) -> dict[str, float]:
    """Bytes per second, read and copied (a byte copied is one read and one written); of a GPU,
    which reads as fast as it copies, copied alone.
    """
    size = BANDWIDTH_BYTES
    if device.type == "cuda":
        size = max(size, 16 * torch.cuda.get_device_properties(device).L2_cache_size)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    kinds: dict[str, tuple[Callable[[], Any], int]] = {
        "copy": (lambda: target.copy_(source), 2 * source.nbytes),
    }
    if device.type != "cuda":
        kinds = {"read": (source.sum, source.nbytes), **kinds}
    nothing: Iterator[Sequence[Tensor]] = itertools.repeat(())
    return {
        name: moved / min(seconds_per_call(call, nothing, 4, device) for _ in range(4))
        for name, (call, moved) in kinds.items()
    }


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most that torch's allocator holds during the call beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
            call()
        p.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    return max(itertools.accumulate((e["args"]["Bytes"] for e in memory), initial=0))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The sum of the differences, as a share of the sum of what was expected in that dtype."""
    actual, expected = actual.double(), expected.to(actual.dtype).double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    difference = (actual - expected).abs().masked_fill(same, 0.0).sum().item()
    scale = expected[expected.isfinite()].abs().sum().item()
    return difference / scale if difference and scale else difference


def _pools(case: Case, device: torch.device) -> dict[Callable[[], Any], list[Sequence[Tensor]]]:
    """For every way to make inputs, as many sets of them as rotate."""
    pool_bytes = POOL_BYTES
    if device.type == "cuda":
        pool_bytes = max(pool_bytes, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
    pools = {}
    for make in dict.fromkeys(c.inputs or case.inputs for c in case.contenders):
        first = make()
        fitting = math.ceil(pool_bytes / sum(x.nbytes for x in first))
        pools[make] = [first, *(make() for _ in range(min(max(2, fitting), POOL_SIZE) - 1))]
    return pools


def _take(pool: Sequence[Sequence[Tensor]], uses: Sequence[int] | None) -> list[Sequence[Tensor]]:
    return [inputs if uses is None else [inputs[i] for i in uses] for inputs in pool]


def _require_grad(leaves: Sequence[Tensor], flag: bool) -> None:
    for leaf in leaves:
        leaf.requires_grad_(flag)


def _call(contender: Contender, inputs: Sequence[Tensor], both: bool) -> Callable[..., Any]:
    function = contender.function
    if not both:
        return function
    values = _values(function(*inputs))
    gradients = [None if v.dim() == 0 else torch.ones_like(v) for v in values]

    def forward_and_backward(*inputs: Tensor) -> None:
        torch.autograd.backward(function(*inputs), gradients)
        for x in inputs:
            x.grad = None  # frees the gradient, as it is freed inside a network

    return forward_and_backward


def _values(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [v.detach() for v in ([outputs] if isinstance(outputs, Tensor) else outputs)]


def _checks(case: Case, inputs: Mapping[str, Sequence[Tensor]]) -> dict[str, Row]:
    """Status ("ok", "wrong" or why it does not run) and errors of every contender."""
    checks: dict[str, Row] = {}
    expected: dict[Any, Sequence[Tensor]] = {}  # contenders that share a twin and inputs share it
    for c in case.contenders:
        leaves = [x for x in inputs[c.name] if x.requires_grad]
        try:
            outputs = c.function(*inputs[c.name])
            values = _values(outputs)
            if leaves:
                torch.autograd.backward(outputs, [torch.ones_like(v) for v in values])
        except RuntimeError as error:  # not for this size or dtype
            checks[c.name] = {"status": str(error).partition("\n")[0], "errors": []}
            continue
        outcomes = [*values, *(x.grad for x in leaves)]
        for x in leaves:
            x.grad = None
        errors = []
        if c.repeatable:
            key = (c.twin or c.function, *map(id, inputs[c.name]))
            if key not in expected:
                expected[key] = _expected(c, inputs[c.name])
            errors = [
                math.inf if actual is None else relative_error(actual, twin)
                for actual, twin in zip(outcomes, expected[key][: len(outcomes)], strict=True)
            ]
        tolerance = max(case.tolerance, *(8 * torch.finfo(v.dtype).eps for v in values))
        right = not c.exact or all(error <= tolerance for error in errors)
        checks[c.name] = {"status": "ok" if right else "wrong", "errors": errors}
    return checks


def _expected(contender: Contender, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    doubles = [x.detach().double() if x.is_floating_point() else x for x in inputs]
    if contender.twin:
        return contender.twin(*doubles)
    doubles = [
        d.clone().requires_grad_() if x.requires_grad else d
        for x, d in zip(inputs, doubles, strict=True)
    ]
    outputs = contender.function(*doubles)
    values = _values(outputs)
    leaves = [d for d in doubles if d.requires_grad]
    if leaves:
        torch.autograd.backward(outputs, [torch.ones_like(v) for v in values])
    return [*values, *(d.grad for d in leaves)]


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler writes there from C++."""
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
