"""The benchmarks run from end to end, refuse to time what is wrong, and count right."""

import importlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sqloss

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a file of benchmarks/, as `python benchmarks/run.py` does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def run(benchmark, monkeypatch):
    measure = benchmark("measure")
    monkeypatch.setattr(measure, "BLOCK_SECONDS", 1e-5)
    monkeypatch.setattr(measure, "ROUNDS", 5)
    monkeypatch.setattr(measure, "POOL_BYTES", 2**12)
    monkeypatch.setattr(measure, "BANDWIDTH_BYTES", 2**20)
    threads = torch.get_num_threads()
    yield lambda *arguments: benchmark("run").main(["--quick", *map(str, arguments)])
    torch.set_num_threads(threads)


def test_a_run_writes_tables_numbers_and_plots(run, tmp_path, capsys):
    sizes, files = [64, 100], [tmp_path / "it.md", tmp_path / "it.json"]
    status = run(
        *("--op", "cvar", "mse_loss", "--sizes", *sizes, "--threads", 1, 2),
        *("--output", files[0], "--json", files[1], "--plot", tmp_path / "plots"),
    )
    text, progress = capsys.readouterr()
    assert status == 0
    assert text == files[0].read_text() + "\n"
    assert "threads 2: mse_loss 100: forward + backward" in progress
    assert "![it-cvar](plots/it-cvar.png)" in text
    assert "### sqloss.cvar of n random normal losses: forward + backward" in text
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"it-cvar.png", "it-losses.png"}

    rows = json.loads(files[1].read_text())["rows"]
    assert {(r["op"], r["size"], r["threads"]) for r in rows} == {
        (op, n, t) for op in ("cvar", "mse_loss") for n in sizes for t in (1, 2)
    }
    for row in rows:
        assert row["status"] == "ok"
        assert len(row["seconds"]) == 5 and min(row["seconds"]) > 0
    cvar = [r for r in rows if r["function"] == "sqloss.cvar" and r["mode"] == "forward + backward"]
    assert {(r["bytes_read"], r["bytes_written"]) for r in cvar} == {(4 * n, 4 * n) for n in sizes}
    assert all(r["peak_bytes"] >= r["bytes_written"] for r in cvar)


def cvar_of_nothing(x, alpha):
    return x.mean()


def cvar_without_its_gradient(x, alpha):
    return sqloss.superquantile(x.detach(), alpha) + 0 * x.sum()


def cvar_that_raises(x, alpha):
    raise RuntimeError("not today")


@pytest.mark.parametrize(
    "wrong, said",
    [
        (cvar_of_nothing, "wrong"),
        (cvar_without_its_gradient, "wrong"),
        (cvar_that_raises, "not today"),
    ],
)
def test_a_wrong_function_is_not_timed(run, tmp_path, capsys, monkeypatch, wrong, said):
    monkeypatch.setattr(sqloss, "cvar", wrong)
    assert run("--op", "cvar", "--sizes", 64, "--json", tmp_path / "it.json") == 1
    assert f"| 64 | sqloss.cvar | **{said}** |" in capsys.readouterr().out
    for row in json.loads((tmp_path / "it.json").read_text())["rows"]:
        assert (row["status"], bool(row["seconds"])) == (
            (said, False) if row["function"] == "sqloss.cvar" else ("ok", True)
        )


def another_seed(function):
    def drawn(*arguments, seed, **options):
        return function(*arguments, seed=seed + 1, **options)

    return drawn


def test_random_numbers_are_checked_where_they_are_known(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sqloss, "normal_rsample_kl", another_seed(sqloss.normal_rsample_kl))
    assert run("--op", "rsample_kl", "--sizes", 8, "--json", tmp_path / "it.json") == 1
    for row in json.loads((tmp_path / "it.json").read_text())["rows"]:
        ours, wrong = row["function"].startswith("sqloss"), row["function"] == "sqloss, normal"
        assert row["status"] == ("wrong" if wrong else "ok")
        assert bool(row["seconds"]) != wrong and bool(row["errors"]) == ours


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(run, dtype):
    operations = ("cvar", "weighted", "value_at_risk", "inputs")
    assert run("--dtype", dtype, "--sizes", 64, "--op", *operations) == 0
    operations = ("batched", "rsample_kl", "kl_of_many_samples")
    assert run("--dtype", dtype, "--sizes", 8, "--op", *operations) == 0


def test_what_was_measured_before_an_interrupt_is_written(benchmark, run, tmp_path, monkeypatch):
    module, measured = benchmark("run"), []

    def measure(case, *rest):
        if measured:
            raise KeyboardInterrupt
        measured.append(case)
        return benchmark("measure").measure(case, *rest)

    monkeypatch.setattr(module, "measure", measure)
    assert run("--op", "cvar", "--sizes", 64, 100, "--output", tmp_path, "--json", tmp_path) == 1
    (markdown,), (numbers,) = tmp_path.glob("*.md"), tmp_path.glob("*.json")
    assert markdown.stem == numbers.stem and "**Interrupted**" in markdown.read_text()
    assert {row["size"] for row in json.loads(numbers.read_text())["rows"]} == {64}


def test_what_was_measured_before_an_error_is_written(benchmark, run, tmp_path, monkeypatch):
    module, file = benchmark("run"), tmp_path / "it.json"
    operations, said = ("mse_loss", "cvar"), []

    def stop(case, *rest):
        """In the midst of a case of the second table."""
        rows = benchmark("measure").measure(case, *rest)
        yield next(rows)
        if file.exists():
            said.append(json.loads(file.read_text()))
            raise RuntimeError("not today")
        yield from rows

    monkeypatch.setattr(module, "measure", stop)
    with pytest.raises(RuntimeError, match="not today"):
        run("--op", *operations, "--sizes", 64, "--output", tmp_path / "it.md", "--json", file)
    (killed_here,), written = said, json.loads(file.read_text())
    assert not killed_here["complete"] and not written["complete"]
    assert {row["op"] for row in killed_here["rows"]} == {"mse_loss"}
    assert written["rows"][:-1] == killed_here["rows"]
    assert written["rows"][-1]["op"] == "cvar"
    assert "**Interrupted**" in (tmp_path / "it.md").read_text()


class Waits(TorchDispatchMode):
    """Whether numbers of tensors are asked for in Python, or sizes that depend on them."""

    seen = False

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        by_mask = operator is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.seen |= by_mask or operator is torch.ops.aten._local_scalar_dense.default
        return operator(*args, **(kwargs or {}))


def test_what_waits_for_the_device_is_said_not_to_be_capturable(benchmark, monkeypatch):
    # What torch.compile, in tests before this one, switches off
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    like, found = {"device": torch.device("cpu"), "dtype": torch.float32}, {}
    for file in ("superquantile", "losses", "student_t"):
        for name, operation in benchmark(file).OPERATIONS.items():
            case = operation.case(2, **like)
            for c in case.contenders:
                inputs = (c.inputs or case.inputs)()
                with Waits() as waits:
                    c.function(*(inputs if c.uses is None else [inputs[i] for i in c.uses]))
                assert not (waits.seen and c.capturable), (name, c.name)
                found.setdefault(waits.seen, []).append(c.name)
    assert "quantile mask" in found[True] and "torch StudentT" in found[True]


def test_a_training_step(run, tmp_path):
    assert run("--op", "vae", "--sizes", 8, "--json", tmp_path / "it.json") == 0
    rows = json.loads((tmp_path / "it.json").read_text())["rows"]
    assert [(r["function"], r["mode"]) for r in rows] == [
        ("mean in torch", "training step"),
        ("sqloss", "training step"),
    ]
    assert all(len(r["seconds"]) == 5 for r in rows)


def test_a_gpu(gpu, run, tmp_path):
    """Loops and CUDA graphs are timed, and what can't be captured is left out of these."""
    waiting = {
        "cvar": {"quantile mask", "sqwash"},
        "gaussian_nll_loss": {"torch", "torch + topk().mean()", "torch + sqloss.cvar"},
        "rsample_kl": {"torch StudentT", "torch StudentT, df [m] learned"},
    }
    operations, file = (*waiting, "mse_loss", "vae"), tmp_path / "it.json"
    assert run("--device", gpu, "--sizes", 64, "--op", *operations, "--json", file) == 0
    said = json.loads(file.read_text())
    assert all(speeds.keys() == {"copy"} for speeds in said["bandwidth"].values())
    modes = {op: set() for op in operations}
    for row in said["rows"]:
        in_a_graph = row["mode"].endswith("graph")
        waits = in_a_graph and row["function"] in waiting.get(row["op"], ())
        assert row["status"] == ("not in a graph" if waits else "ok")
        assert bool(row["seconds"]) != waits
        modes[row["op"]].add(in_a_graph)
    assert all(of_op == {False, True} for of_op in modes.values())


def test_a_new_file_takes_part(benchmark, tmp_path, monkeypatch):
    (tmp_path / "student_t_of_a_test.py").write_text("OPERATIONS = {'sample': None}")
    (tmp_path / "helper_of_a_test.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = benchmark("run").operations(tmp_path)
    assert found == {"student_t_of_a_test": {"sample": None}}


def row(function, seconds, **more):
    return {"function": function, "seconds": seconds, "bars": {}, **more}


def test_ratios_are_those_of_each_round(benchmark):
    report = benchmark("report")
    # the machine slows down by 10: the ratio of the medians would be 2 / 20
    peer, mine = row("mean", [1, 1, 20, 20, 20]), row("mine", [2, 2, 2, 40, 40])
    assert report.ratio(mine, peer) == (2, 2, 2)
    assert report.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2, 3, 4)


def test_bars(benchmark):
    report, speed = benchmark("report"), {"read": 4.0, "copy": 2.0}
    bytes_moved = {"bytes_read": 4, "bytes_written": 0}
    mean, slow = row("mean", [1.0] * 5), row("topk", [])
    mine = row("mine", [1.1] * 5, bars={"mean": 1.2, "topk": 0.05}, **bytes_moved)
    table = [mean, mine, slow]
    assert report.verdicts({**mean, **bytes_moved}, table, speed) == []
    assert report.verdicts(mine, table, speed) == [
        ("<= 1.2 x mean: 1.1", True),
        ("<= 0.05 x topk: not measured", False),
    ]
    mine["seconds"] = [1.3] * 5
    assert report.verdicts(mine, table, speed)[0] == ("<= 1.2 x mean: 1.3", False)
    mine["bars"] = {"the floor": 1.25, "us": 1.4e6}
    assert report.verdicts(mine, table, speed) == [
        ("<= 1.25 x the floor: 1.3", False),
        ("<= 1.4e+06 us: 1.3e+06", True),
    ]
    mine.update(bars={}, peak_bytes=2000, peak_bytes_allowed=1999)
    assert report.verdicts(mine, table, speed) == [("memory <= 1,999 bytes: 2,000", False)]


def test_floors(benchmark):
    floor_seconds, bandwidth = benchmark("report").floor_seconds, {"read": 4.0, "copy": 2.0}
    assert floor_seconds({"bytes_read": 8, "bytes_written": 0}, bandwidth) == 2
    assert floor_seconds({"bytes_read": 8, "bytes_written": 4}, bandwidth) == 6
    assert floor_seconds({"bytes_read": 8, "bytes_written": 0}, {"copy": 2.0}) == 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_bar_has_its_peer_and_its_mode(benchmark, device):
    """Cases make nothing before they are measured: those of a GPU are looked at on any machine."""
    run, measure = benchmark("run"), benchmark("measure")
    like = {"device": torch.device(device), "dtype": torch.float32}
    bars = []
    for of_file in run.operations(BENCHMARKS).values():
        for name, operation in of_file.items():
            for size in run.sizes_of(operation, like["device"], quick=False):
                case = operation.case(size, **like)
                known = {c.name for c in case.contenders} | {measure.FLOOR, measure.MICROSECONDS}
                for contender in case.contenders:
                    assert contender.bars.keys() <= set(case.modes)
                    for mode, of_mode in contender.bars.items():
                        assert of_mode.keys() <= known
                        bars += [(name, size, mode, peer) for peer in of_mode]
    if device == "cuda":
        assert ("cvar", 2**28, measure.FORWARD, measure.FLOOR) in bars
        assert ("cvar", 2**19, measure.in_graph(measure.FORWARD), measure.MICROSECONDS) in bars
        assert ("vae", 128, measure.in_graph(measure.STEP), "mean in torch") in bars


def test_peak_bytes_sees_what_is_freed_within(benchmark):
    def call():
        return torch.empty(1000, dtype=torch.uint8).add(1).add(1).sum(dtype=torch.uint8)

    assert 2000 <= benchmark("measure").peak_bytes(call, torch.device("cpu")) < 2100


@pytest.mark.parametrize(
    "actual, expected, error",
    [
        ([1.0, 2.0], [1.0, 2.0], 0),
        ([1.0, 2.5], [1.0, 1.0], 0.75),
        ([torch.nan, -torch.inf], [torch.nan, -torch.inf], 0),
        ([torch.nan, 1.0], [1.0, 1.0], torch.nan),
        ([torch.inf, 1.0], [1.0, 1.0], torch.inf),
        ([1.0, 0.0], [0.0, 0.0], 1),
    ],
)
def test_relative_error(benchmark, actual, expected, error):
    expected = torch.tensor(expected, dtype=torch.float64)
    said = benchmark("measure").relative_error(torch.tensor(actual), expected)
    assert said == error or (math.isnan(said) and math.isnan(error))


def test_sizes_are_of_an_operation(run, capsys):
    with pytest.raises(SystemExit):
        run("--sizes", 64)
    assert "--sizes: expected --op as well, got none" in capsys.readouterr().err


def test_bias_of_the_mean_of_the_ranks_tails(benchmark, monkeypatch):
    distributed = benchmark("distributed")
    monkeypatch.setattr(distributed, "LOSSES", 2**16)
    draw = distributed.DISTRIBUTIONS["exponential"]
    assert distributed.bias(draw, 1, 64, 0.1) == pytest.approx((0, 0), abs=1e-12)
    error, lost = distributed.bias(draw, 8, 8, 0.1)
    assert -0.18 < error < -0.14 and 0.23 < lost < 0.28
    table = list(distributed.bias_table())
    assert len([row for row in table if row.startswith("| exponential")]) == len(
        distributed.BATCHES
    )


def test_cost_of_the_tail_of_two_processes(benchmark):
    *_, row = benchmark("distributed").cost_table([2], rounds=3)
    assert row.startswith("| 2 | 2,066, 2,048, 1,029 |") and " us " in row


@pytest.fixture
def tail(benchmark, monkeypatch):
    """Of small models and few rounds."""
    tail, measure = benchmark("tail"), benchmark("measure")
    monkeypatch.setattr(measure, "BLOCK_SECONDS", 1e-5)
    monkeypatch.setattr(tail, "MNIST", (1, 4, 4))
    monkeypatch.setattr(tail, "HIDDEN", 8)
    monkeypatch.setattr(tail, "BATCHES", (16, 512))
    monkeypatch.setattr(tail, "SIZES", [((1, 4, 4), {}, (16, 32), (0.5,))])
    monkeypatch.setattr(tail, "SAMPLES", 2**10)
    monkeypatch.setattr(tail, "CHUNK", 64)
    threads = torch.get_num_threads()
    yield tail
    torch.set_num_threads(threads)


def test_the_cost_of_the_tail_alone(tail, tmp_path, capsys):
    tail.main(["--threads", "1", "--seconds", "0", "--output", str(tmp_path / "it.md")])
    text, _ = capsys.readouterr()
    assert text == (tmp_path / "it.md").read_text() + "\n"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    steps = [row for row in rows if len(row) == 7 and row[0] == "1"]
    assert [(row[1], row[2]) for row in steps] == [
        (batch, name)
        for batch in ("16", "512")
        for name in (
            *("mean in torch, normal", "mean, normal", "dense, normal", "tail, normal"),
            *("mean, t", "dense, t", "tail, t"),
        )
    ]
    judged = [row for row in steps if row[6]]
    assert [(row[1], row[2]) for row in judged] == [("512", "tail, normal")]
    sizes = [row for row in rows if len(row) == 9 and row[1] == "1 x 4 x 4"]
    assert [(row[3], row[8]) for row in sizes] == [("16", "dense"), ("32", "dense")]


def test_the_memory_of_the_tail_alone(tail):
    peaks = tail.peaks_of_steps()
    price, of_sqloss, accumulated, whole, half = peaks.values()
    assert 0 < half < whole < 3 * price
    assert 0 < of_sqloss < accumulated < whole
    assert tail.gradient_error(torch.float64) < 1e-12


def test_every_step_has_the_gradient_of_its_loss(tail):
    torch.manual_seed(0)
    model, images = sqloss.models.VAE((1, 4, 4), (8,), 3).double(), torch.rand(40, 1, 4, 4).double()

    def gradient(risk):
        torch.manual_seed(1)
        model.zero_grad()
        tail.of_sqloss(risk, model, images).backward()
        return [parameter.grad for parameter in model.parameters()]

    torch.testing.assert_close(gradient(tail.tail_alone), gradient(tail.all_images))


def test_reading_images(benchmark, tmp_path):
    pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    datasets = benchmark("datasets")
    threads = torch.get_num_threads()
    datasets.draw_faces(tmp_path, 20)
    rows = [datasets.measure(str(tmp_path), 8, workers) for workers in (0, 1)]
    torch.set_num_threads(threads)
    assert [row["epoch"] > 0 for row in rows] == [True, True]
    *_, in_memory, _mapped = datasets.table(rows, 20, 8)
    assert re.fullmatch(r"\| 0 \(in memory\) \|( [\d.,]+( s| MiB)? \|){4}", in_memory)


def test_the_time_of_groups(benchmark, tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        output = tmp_path / "it.md"
        benchmark("groups").main(["--images", "60", "90", "--output", str(output)])
    finally:
        torch.set_num_threads(threads)
    text = output.read_text()
    assert capsys.readouterr().out == text + "\n"
    rows = [
        line[2:].split(" | ") for line in text.splitlines() if line.startswith(("| 60", "| 90"))
    ]
    first, second = ([row[1] for row in rows if row[0] == images] for images in ("60", "90"))
    assert first == second and first[-1] == "networkx"
    assert all(float(cell) >= 0 for row in rows for cell in row[2:6])
