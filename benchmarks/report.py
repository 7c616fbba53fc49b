"""What was measured, as Markdown and as plots: pure functions of the report that run.py makes."""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import BOTH, FLOOR, FORWARD, GRAPHS, MICROSECONDS, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = dict[str, Any]
Quartiles = tuple[float, float, float]

NOTE = """\
Each time is the median over interleaved rounds, with its quartiles; each ratio is the median of the
rounds' own ratios. The floor is the time that reading the inputs and writing the gradients once
takes at the measured bandwidth, and its share of the median (what lies in a cache can be faster).
Memory is the peak that torch's allocator holds beyond the inputs, over the gradients' bytes. The
errors of values / gradients are sums of differences relative to the float64 twin, in their dtype;
what draws other random numbers on every call has none.
"""

GPU_NOTE = """\
CUDA events take the time: around a loop of calls, or ("in a CUDA graph") around the replay of a
graph with one call for each of the rotating inputs, which leaves out what the host takes. The
inputs that rotate are larger together than the L2 cache, but for those so small that 1,024 of them
fit in it. The floor reads the inputs as often as the algorithm has to, at the bandwidth of a copy.
"""


def quartiles(values: Sequence[float]) -> Quartiles:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def ratio(row: Row, peer: Row) -> Quartiles:
    """Quartiles of the ratio in each round."""
    return quartiles([a / b for a, b in zip(row["seconds"], peer["seconds"], strict=True)])


def verdicts(row: Row, table: Sequence[Row], bandwidth: dict[str, float]) -> list[tuple[str, bool]]:
    """What the row may cost, what it does cost, and whether that is within it."""
    timed = {peer["function"]: peer for peer in table if peer["seconds"]}
    units = {FLOOR: floor_seconds(row, bandwidth), MICROSECONDS: 1e-6}
    said = []
    for peer, most in row["bars"].items():
        text = f"<= {most:.3g} {peer}" if peer == MICROSECONDS else f"<= {most:.3g} x {peer}"
        cost = None
        if row["function"] in timed and peer in units:
            cost = statistics.median(row["seconds"]) / units[peer]
        elif row["function"] in timed and peer in timed:
            cost = ratio(row, timed[peer])[1]
        if cost is None:
            said.append((f"{text}: not measured", False))
        else:
            said.append((f"{text}: {cost:.3g}", cost <= most))
    if "peak_bytes_allowed" in row:
        peak, allowed = row["peak_bytes"], row["peak_bytes_allowed"]
        said.append((f"memory <= {allowed:,} bytes: {peak:,}", peak <= allowed))
    return said


def is_wrong(row: Row) -> bool:
    return row["exact"] and row["status"] != "ok"


def floor_seconds(row: Row, bandwidth: dict[str, float]) -> float:
    if row["bytes_written"]:
        return (row["bytes_read"] + row["bytes_written"]) / bandwidth["copy"]
    return row["bytes_read"] / bandwidth.get("read", bandwidth["copy"])


def markdown(report: Report, pictures: Sequence[str] = ()) -> str:
    wrong = [r for r in report["rows"] if is_wrong(r)]
    bandwidths = report["bandwidth"]
    said = [
        (table, verdict)
        for table in _tables(report["rows"])
        for row in table
        for verdict in verdicts(row, table, bandwidths[str(row["threads"])])
    ]
    missed = [f"- {_place(table[0])}: {text}" for table, (text, met) in said if not met]
    lines = [
        f"# Benchmarks: {report['machine']['name']}",
        "",
        f"{report['date']}, {report['dtype']} on {report['device']}: `{report['command']}`",
        "",
        *(f"- {key}: {value}" for key, value in report["machine"].items() if key != "name"),
        "",
        "```",
        *report["config"].splitlines(),
        "```",
        "",
        NOTE,
        *[GPU_NOTE] * report["device"].startswith("cuda"),
        *["**Interrupted**: not all was measured.", ""] * (not report["complete"]),
        *(f"- **Wrong**, not timed: {_place(r)}: {r['function']}: {r['status']}" for r in wrong),
        *[""] * bool(wrong),
        f"Acceptance bars: {len(said) - len(missed)} of {len(said)} met"
        + ("; not met:" if missed else "."),
        "",
        *missed,
        "",
        *(f"![{Path(picture).stem}]({picture})" for picture in pictures),
    ]
    for threads, of_threads in itertools.groupby(report["rows"], lambda r: r["threads"]):
        bandwidth = bandwidths[str(threads)]
        speeds = " and ".join(f"{name} {speed / 1e9:.1f} GB/s" for name, speed in bandwidth.items())
        lines += ["", f"## Threads: {threads}", "", f"Bandwidth: {speeds}."]
        for (title, mode), rows in _grouped(of_threads, "title", "mode"):
            lines += ["", f"### {title}: {mode}", "", *_table(rows, bandwidth)]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row], bandwidth: dict[str, float]) -> Iterator[str]:
    price = rows[0]["function"]
    memory = rows[0]["mode"] == BOTH
    header = ["shape", "function", "us", "quartiles", f"x {price}", "quartiles"]
    header += ["floor us", "share", *["memory"] * memory, "error", "bar"]
    yield _line(header)
    yield _line(["--:", ":--", *["--:"] * (len(header) - 3), ":--"])
    for table in _tables(rows):
        for row in table:
            yield _line([_shape(row), *_cells(row, table, bandwidth, memory)])


def _cells(
    row: Row, table: Sequence[Row], bandwidth: dict[str, float], memory: bool
) -> Iterator[str]:
    yield row["function"]
    floor = floor_seconds(row, bandwidth)
    if row["seconds"]:
        low, median, high = (1e6 * q for q in quartiles(row["seconds"]))
        yield from (f"{median:,.1f}", f"{low:,.1f} - {high:,.1f}")
        if table[0]["seconds"]:
            low, cost, high = ratio(row, table[0])
            yield from (f"{cost:.3g}", f"{low:.3g} - {high:.3g}")
        else:
            yield from ("", "")
        yield from (f"{1e6 * floor:,.1f}", f"{1e8 * floor / median:.0f} %")
    else:
        yield from (f"**{row['status']}**" if is_wrong(row) else row["status"], *[""] * 5)
    if memory:
        gradient = row["bytes_written"]
        yield f"{row['peak_bytes'] / gradient:.2f}" if "peak_bytes" in row else ""
    forward = GRAPHS.get(row["mode"], row["mode"]) == FORWARD
    yield " / ".join(f"{error:.1g}" for error in row["errors"][: 1 if forward else None])
    yield "; ".join(
        f"{text}, {'met' if met else '**not met**'}"
        for text, met in verdicts(row, table, bandwidth)
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shape(row: Row) -> str:
    return " x ".join(f"{size:,}" for size in row["shape"])


def _place(row: Row) -> str:
    return f"{row['op']}, {_shape(row)}, {row['mode']}, threads: {row['threads']}"


def _tables(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that are compared with each other, the price first."""
    return [of for _, of in _grouped(rows, "threads", "op", "size", "mode")]


def _grouped(rows: Any, *keys: str) -> list[tuple[Any, list[Row]]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.items())


# --- plots ----------------------------------------------------------------------------------------

# Okabe and Ito's palette, told apart with any colour vision; the markers differ too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"


def figures(report: Report) -> dict[str, "Figure"]:
    """Name -> figure: one for an operation over its sizes, one for the bars of a file."""
    lines = _grouped((r for r in report["rows"] if r["plot"] == "lines"), "op", "title")
    bars = _grouped((r for r in report["rows"] if r["plot"] == "bars"), "file")
    return {
        **{op: _line_figure(title, rows) for (op, title), rows in lines},
        **{file: _bar_figure(rows) for (file,), rows in bars},
    }


def _line_figure(title: str, rows: Sequence[Row]) -> "Figure":
    figure, axes = _panels(rows, 3.4)
    figure.suptitle(title)
    for ax, panel in axes:
        for function, look in _styles(rows).items():
            costs = sorted(
                (r["size"], *cost) for r, cost in _costs(panel) if r["function"] == function
            )
            if costs:
                size, low, median, high = zip(*costs, strict=True)
                ax.plot(size, median, label=function, markersize=4, **look)
                ax.fill_between(size, low, high, color=look["color"], alpha=0.2, linewidth=0)
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted({row["size"] for row in rows}))
        ax.set_yscale("log")
        ax.set_xlabel("n")
        ax.set_ylabel(f"time / time of {panel[0]['function']}")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.grid(alpha=0.3)
        ax.label_outer()
    _legend(figure, axes[0][0])
    return figure


def _bar_figure(rows: Sequence[Row]) -> "Figure":
    labels = [f"{op}\n{_shape(of[0])}" for (op, _), of in _grouped(rows, "op", "size")]
    figure, axes = _panels(rows, 0.8 * len(labels) + 1)
    style = _styles(rows)
    thickness = 0.8 / len(style)
    for ax, panel in axes:
        for i, (function, look) in enumerate(style.items()):
            costs = [
                (labels.index(f"{r['op']}\n{_shape(r)}") + (i + 0.5) * thickness - 0.4, *cost)
                for r, cost in _costs(panel)
                if r["function"] == function
            ]
            for y, low, median, high in costs:
                spread = [[median - low], [high - median]]
                ax.barh(y, median, thickness, xerr=spread, color=look["color"], label=function)
                ax.annotate(f" {median:.2f}", (high, y), va="center", fontsize="small")
        ax.set_yticks(range(len(labels)), labels)
        ax.set_ylim(len(labels) - 0.5, -0.5)
        ax.margins(x=0.12)
        ax.set_xlabel(f"time / time of {panel[0]['function']}")
        ax.grid(axis="x", alpha=0.3)
        ax.set_axisbelow(True)
    _legend(figure, axes[0][0])
    return figure


def _costs(rows: Sequence[Row]) -> list[tuple[Row, Quartiles]]:
    """The ratio to its price of every row that was timed beside it."""
    return [
        (row, ratio(row, table[0]))
        for table in _tables(rows)
        for row in table
        if row["seconds"] and table[0]["seconds"]
    ]


def _panels(rows: Sequence[Row], height: float) -> tuple["Figure", list[tuple["Axes", list[Row]]]]:
    """A figure with a row of axes for each mode and a column for each number of threads."""
    from matplotlib.figure import Figure

    modes, threads = _grouped(rows, "mode"), _grouped(rows, "threads")
    size = (5.2 * len(threads) + 1.5, height * len(modes) + 0.8)
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(len(modes), len(threads), squeeze=False, sharex="col", sharey="row")
    panels = []
    for ((mode, count), panel), ax in zip(
        sorted(_grouped(rows, "mode", "threads")), axes.flat, strict=True
    ):
        ax.set_title(f"{mode}, threads: {count}", fontsize="medium")
        panels.append((ax, panel))
    return figure, panels


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    functions = dict.fromkeys(row["function"] for row in rows)
    looks = itertools.cycle(zip(COLORS, MARKERS, strict=True))
    return {f: {"color": c, "marker": m} for f, (c, m) in zip(functions, looks, strict=False)}


def _legend(figure: "Figure", ax: "Axes") -> None:
    handles = {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
