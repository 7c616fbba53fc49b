"""What the superquantile costs beside the mean: `python benchmarks/superquantile.py`.

Forward + backward of one reduction of n float32 losses to a leaf, for sqloss.cvar, losses.mean()
(the price), and what people write instead. All in one process and interleaved, on inputs that
rotate so that no cache or branch predictor learns them; medians of many rounds and the middle half
of their spread. Every function's value is checked against the reference before it is timed (the
quantile mask is biased by design: it is timed, and its error is printed).
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch

import sqloss
from sqloss import reference

INPUTS = 16  # rotated
ROUND_SECONDS = 0.02  # of one function at a time: long against the clock, short against the noise


def contenders(n, alpha):
    k = (1 - alpha) * n  # topk needs it whole
    return {
        "mean": lambda x: x.mean(),
        "sqloss.cvar": lambda x: sqloss.cvar(x, alpha),
        "topk().mean()": lambda x: x.topk(max(1, round(k))).values.mean(),
        "quantile mask": lambda x: x[x >= x.detach().quantile(alpha)].mean() if n < 2**24 else None,
    }


def check(reduce, name, x, alpha):
    """The relative error against the reference; a wrong sqloss ends the benchmark."""
    value, _, _ = reference.superquantile(x.detach().double(), 1 - alpha)
    error = abs(reduce(x).item() - value.item()) / abs(value.item())
    if name == "sqloss.cvar" and error > 1e-6:
        raise SystemExit(f"n = {x.numel()}: sqloss.cvar is wrong by {error:.1e}")
    return error


def seconds_per_call(reduce, inputs, calls):
    start = time.perf_counter()
    for i in range(calls):
        x = inputs[i % len(inputs)]
        x.grad = None
        reduce(x).backward()
    return (time.perf_counter() - start) / calls


def measure(n, alpha, rounds):
    """Name -> (median, lower and upper quartile in microseconds, error against the reference)."""
    inputs = [torch.randn(n, requires_grad=True) for _ in range(max(2, min(INPUTS, 2**25 // n)))]
    functions = {name: f for name, f in contenders(n, alpha).items() if f(inputs[0]) is not None}
    errors = {name: check(f, name, inputs[0], alpha) for name, f in functions.items()}
    calls = {}
    for name, f in functions.items():
        once = seconds_per_call(f, inputs, 2)
        calls[name] = max(2, int(ROUND_SECONDS / once))
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, f in functions.items():
            times[name].append(1e6 * seconds_per_call(f, inputs, calls[name]))
    return {
        name: (*statistics.quantiles(t, n=4, method="inclusive"), errors[name])
        for name, t in times.items()
    }


def cpu_name():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 1024, 4096, 65536, 2**20])
    parser.add_argument("--alpha", type=float, default=0.8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)

    print(f"{cpu_name()}, {args.threads} threads, Python {platform.python_version()}\n")
    sqloss.show_config()
    print(f"\nforward + backward, float32, random normal, alpha = {args.alpha}\n")
    print("| n | function | median us | quartiles us | x mean | error |")
    print("|--:|:--|--:|--:|--:|--:|")
    for n in args.sizes:
        results = measure(n, args.alpha, args.rounds)
        for name, (low, median, high, error) in results.items():
            ratio = median / results["mean"][1]
            wrong = "" if name == "mean" else f"{error:.1e}"  # the mean is another quantity
            spread = f"{low:.1f} - {high:.1f}"
            print(f"| {n:,} | {name} | {median:.1f} | {spread} | {ratio:.2f} | {wrong} |")


if __name__ == "__main__":
    main()
