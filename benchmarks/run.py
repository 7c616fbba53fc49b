"""Times sqloss beside the mean and beside what people write instead: `python benchmarks/run.py`.

Every function is checked against its float64 twin before it is timed; a wrong one is reported,
not timed, and the exit status is then 1. Each file beside this one that has OPERATIONS takes part.
"""

import argparse
import contextlib
import datetime
import importlib
import io
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measure import Operation, bandwidth, measure
from report import Report, figures, is_wrong, markdown

import sqloss
from sqloss.common.files import as_json, write_atomically

HERE = Path(__file__).parent
SECONDS, QUICK_SECONDS = 3.0, 0.3  # for the rounds of each table
DTYPES = ("float16", "bfloat16", "float32", "float64")


def main(arguments: Sequence[str] | None = None) -> int:
    files = operations(HERE)
    args = parse(arguments, [name for of_file in files.values() for name in of_file])
    device = torch.device(args.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    report: Report = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/run.py", *(arguments or sys.argv[1:])]),
        "machine": machine(device),
        "config": config(),
        "dtype": args.dtype,
        "device": args.device,
        "complete": False,
        "bandwidth": {},
        "rows": [],
    }
    for option, suffix in (("output", ".md"), ("json", ".json")):
        path = getattr(args, option)
        if path and path.is_dir():
            setattr(args, option, path / f"{report['machine']['name']}{suffix}")
    try:
        for threads in args.threads:
            torch.set_num_threads(threads)
            say(f"threads {threads}: bandwidth")
            report["bandwidth"][str(threads)] = bandwidth(device)
            for file, of_file in files.items():
                for name in [name for name in of_file if name in args.op]:
                    rows = rows_of(file, name, of_file[name], threads, device, args)
                    report["rows"].extend(rows)
                    write_json(report, args)  # a kill leaves these
        report["complete"] = True
    except KeyboardInterrupt:
        pass
    finally:
        write(report, args)
    return int(any(is_wrong(row) for row in report["rows"]) or not report["complete"])


def rows_of(
    file: str,
    name: str,
    operation: Operation,
    threads: int,
    device: torch.device,
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    for size in args.sizes or sizes_of(operation, device, args.quick):
        where = f"threads {threads}: {name} {size:,}"
        say(where)
        case = operation.case(size, dtype=getattr(torch, args.dtype), device=device)
        seconds = QUICK_SECONDS if args.quick else SECONDS
        common = {
            "file": file,
            "op": name,
            "title": operation.title,
            "plot": operation.plot,
            "threads": threads,
            "size": size,
            "shape": list(case.shape),
        }
        measured = measure(case, device, seconds, lambda what, where=where: say(f"{where}: {what}"))
        yield from ({**common, **row} for row in measured)


def sizes_of(operation: Operation, device: torch.device, quick: bool) -> Sequence[int]:
    if quick and operation.quick is not None:
        return operation.quick
    if device.type == "cuda" and operation.gpu_sizes is not None:
        return operation.gpu_sizes
    return operation.sizes


def write(report: Report, args: argparse.Namespace) -> None:
    write_json(report, args)
    pictures = []
    if args.plot:
        stem = args.output.stem if args.output else report["machine"]["name"]
        for name, figure in figures(report).items():
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=150)
            path = args.plot / f"{stem}-{name}.png"
            write_atomically(path, picture.getbuffer())
            pictures.append(os.path.relpath(path, args.output.parent if args.output else "."))
    text = markdown(report, pictures)
    if args.output:
        write_atomically(args.output, text.encode())
    print(text)


def write_json(report: Report, args: argparse.Namespace) -> None:
    if args.json:
        write_atomically(args.json, as_json(report))


def parse(arguments: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds: a minute")
    parser.add_argument(
        "--op",
        nargs="+",
        choices=names,
        metavar="OP",
        help=f"which operations: {', '.join(names)}",
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        help="of the --op: losses, or rows of those that take a matrix",
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every number, of every round")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="PNGs; needs matplotlib")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the Markdown, as a file too; a folder: named after the machine, as with --json",
    )
    args = parser.parse_args(arguments)
    if args.sizes and not args.op:
        parser.error(
            "--sizes: expected --op as well, got none: what is small for one is huge for another"
        )
    if args.plot and not find_spec("matplotlib"):
        parser.error("--plot: expected matplotlib, got none: pip install '.[bench]'")
    args.op = args.op or names
    for folder in (args.plot, args.json and args.json.parent, args.output and args.output.parent):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    return args


def operations(folder: Path) -> dict[str, dict[str, Operation]]:
    """File -> name -> operation."""
    stems = sorted(path.stem for path in folder.glob("*.py") if path != Path(__file__))
    modules = {stem: importlib.import_module(stem) for stem in stems}
    return {stem: m.OPERATIONS for stem, m in modules.items() if hasattr(m, "OPERATIONS")}


def machine(device: torch.device) -> dict[str, str]:
    def read(path: str) -> str:
        return Path(path).read_text().strip() if Path(path).exists() else ""

    model = re.search(r"model name\s*: (.*)", read("/proc/cpuinfo"))
    cpu = model[1] if model else platform.processor() or platform.machine()
    cores = os.cpu_count()
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    sizes = [
        f"L{read(f'{c}/level')} {read(f'{c}/type').lower()} {read(f'{c}/size')}" for c in caches
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    said = {
        "name": slug(f"{cpu} {cores}cpu"),
        "CPU": f"{cpu}, {cores} cores",
        "caches": ", ".join(sizes) or "unknown",
        "memory": f"{memory:.0f} GiB",
        "OS": platform.platform(),
        "Python": platform.python_version(),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        said["name"] = slug(gpu.name)
        said["GPU"] = (
            f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, L2 {gpu.L2_cache_size >> 20} MiB"
        )
    return said


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def config() -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        sqloss.show_config()
    return text.getvalue()


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
