"""The tail of losses on many ranks against that of all of them in one process."""

import itertools
import math
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import sqloss
from sqloss import reference
from sqloss._ops import distributed as op

sys.path.insert(0, str(Path(__file__).parent))
import ranks as on_ranks  # what the processes import, too

ALPHAS = [0.0, 0.3, 0.5, 0.8, 0.97, 1 - 2**-53]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan
EXACT = {"rtol": 1e-12, "atol": 1e-15}


@pytest.fixture(scope="module")
def ranks():
    ranks = on_ranks.Ranks(8, groups=(1, 2, 3, 8))
    yield ranks
    ranks.close()


def split(tensor, sizes):
    return None if tensor is None else tensor.split(sizes)


def shards_of(n, count):
    """Uneven sizes of shards, some of them empty."""
    cuts = torch.randint(n + 1, (count - 1,)).sort().values.tolist()
    return [b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True)]


# --- processes ------------------------------------------------------------------------------------


def special(n):
    x = torch.randn(n)
    x[torch.rand(n) < 0.03] = -INF
    x[torch.rand(n) < 0.02] = INF
    return x.masked_fill(torch.rand(n) < 0.005, NAN)


LOSSES = {
    "normal": torch.randn,
    "ties": lambda n: torch.randn(n).mul(2).round(),
    "special": special,
    "huge": lambda n: torch.randn(n) * 3e4,
    "constant": lambda n: torch.full((n,), 0.1),
}


@pytest.mark.parametrize("count", [2, 3, 8])
def test_it_is_the_tail_of_all_losses(ranks, count):
    cases = []
    for i, (kind, dtype) in enumerate(itertools.product(LOSSES, DTYPES)):
        n = (5, 700, 64)[(i + count) % 3]
        alpha, options = [
            (0.8, {}),
            (0.3, {"mask": torch.rand(n) < 0.7}),
            (0.97, {"weight": torch.rand(n).double() + 0.01}),
            (0.5, {"weight": torch.randint(1, 3, (n,)), "mask": torch.rand(n) < 0.9}),
            (0.999, {}),  # one loss, on one rank
        ][i % 5]
        cases.append((LOSSES[kind](n).to(dtype), alpha, options))
    sizes = [shards_of(len(losses), count) for losses, _, _ in cases]
    of_ranks = [
        [
            (
                losses.split(size)[rank],
                {name: given.split(size)[rank] for name, given in options.items()},
            )
            for size, (losses, _, options) in zip(sizes, cases, strict=True)
        ]
        for rank in range(count)
    ]
    calls = [(alpha, {}) for _, alpha, _ in cases]
    results = ranks.run(on_ranks.tails, of_ranks, calls)

    for i, (losses, alpha, options) in enumerate(cases):
        values, gradients, indices, weights = zip(*(of_rank[i] for of_rank in results), strict=True)
        assert all(torch.equal(v.nan_to_num(), values[0].nan_to_num()) for v in values)
        eps = torch.finfo(losses.dtype).eps
        close = {"rtol": max(2 * eps, 1e-12), "atol": 1e-12 + eps / 100, "equal_nan": True}
        expected = sqloss.cvar(losses, alpha, **options)
        torch.testing.assert_close(values[0], expected, **close)

        q = sqloss.tail_weights(losses, alpha, **options)
        torch.testing.assert_close(torch.cat(gradients) / count, q, **close)
        starts = [sum(sizes[i][:rank]) for rank in range(count)]
        rows = torch.cat([r + start for r, start in zip(indices, starts, strict=True)])
        dense = torch.zeros_like(q).index_put((rows,), torch.cat(weights) / count)
        torch.testing.assert_close(dense, q, **close)
        assert (torch.cat(weights) > 0).all()


WAYS = ["all rows", "tail_indices", "tail_loss", "tail_backward", "tail_backward, no_sync"]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_parameters_are_those_of_one_process(ranks, reduction, way):
    x, y = torch.randn(60, 4).double(), torch.randn(60, 2).double()
    order = on_ranks.losses_of(on_ranks.regression(), x, y).argsort()
    some, last = torch.rand(60) < 0.7, torch.arange(60) >= 40
    for rows, sizes, mask in (  # of the tail of 12 rows: some, all and none
        (torch.arange(60), [30, 30], None),
        (torch.arange(60), [13, 40, 7], some),
        (order, [40, 20], None),
        (torch.arange(60), [60, 0], None),
        (torch.arange(60), [40, 0, 20], last),
    ):
        model = on_ranks.regression()
        value = sqloss.cvar(on_ranks.losses_of(model, x[rows], y[rows]), 0.8, mask=mask)
        value.backward()
        expected = value.detach(), [parameter.grad for parameter in model.parameters()]
        masks = [None] * len(sizes) if mask is None else mask.split(sizes)
        of_ranks = list(zip(x[rows].split(sizes), y[rows].split(sizes), masks, strict=True))
        for got in ranks.run(on_ranks.gradients, of_ranks, way, 0.8, reduction):
            torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize(
    "way, option",
    [
        *itertools.product(WAYS[2:], ["find_unused_parameters", "gradient_as_bucket_view"]),
        *itertools.product(WAYS[2:4], ["static_graph"]),  # with no_sync an internal error of torch
    ],
)
def test_options_of_distributed_data_parallel(ranks, way, option):
    x, y = torch.randn(40, 4).double(), torch.randn(40, 2).double()
    model = on_ranks.regression()
    value = sqloss.cvar(on_ranks.losses_of(model, x, y), 0.8)
    value.backward()
    expected = value.detach(), [parameter.grad for parameter in model.parameters()]
    of_ranks = list(zip(x.split([33, 7]), y.split([33, 7]), [None, None], strict=True))
    for got in ranks.run(on_ranks.gradients, of_ranks, way, 0.8, "mean", **{option: True}):
        torch.testing.assert_close(got, expected, **EXACT)


def test_ranks_with_different_numbers_of_batches(ranks):
    x, y = torch.randn(5, 12, 4).double(), torch.randn(5, 12, 2).double()
    batches = list(zip(x, y, strict=True))
    of_ranks = batches[:3], [(x[:5], y[:5]) for x, y in batches]
    first, second = ranks.run(on_ranks.of_uneven_batches, of_ranks)
    for step, (x, y) in enumerate(batches):
        model = on_ranks.regression()
        rows = [*range(12), *range(5)] if step < 3 else range(5)
        sqloss.cvar(on_ranks.losses_of(model, x[rows], y[rows]), 0.8).backward()
        expected = [parameter.grad for parameter in model.parameters()]
        torch.testing.assert_close(first[step], expected, **EXACT)
        torch.testing.assert_close(second[step], expected, **EXACT)


def test_join_that_ends_with_the_first_rank(ranks):
    x, y = torch.randn(3, 12, 4).double(), torch.randn(3, 12, 2).double()
    batches = list(zip(x, y, strict=True))
    for error in ranks.run(on_ranks.in_join, [batches, batches[:2]]):
        assert isinstance(error, RuntimeError) and "exhausted" in str(error)
    assert not any(isinstance(r, Exception) for r in ranks.run(on_ranks.in_join, [batches] * 2))


def differing(**of_second):
    first = {"function": "cvar", "losses": torch.randn(9), "alpha": 0.8}
    return [
        (each.pop("function"), each.pop("losses"), each)
        for each in (dict(first), {**first, **of_second}, dict(first))
    ]


@pytest.mark.parametrize(
    "second, message",
    [
        (
            {"alpha": 0.9},
            "alpha, tail_fraction: expected the same on all ranks, got alpha=0.8 on rank 0, 2, "
            "alpha=0.9 on rank 1",
        ),
        (
            {"alpha": None, "tail_fraction": 0.5},
            "alpha, tail_fraction: .* tail_fraction=0.5 on rank 1",
        ),
        (
            {"losses": torch.randn(9).double()},
            "losses: expected the same on all ranks, got torch.float32 on rank 0, 2, torch.float64",
        ),
        (
            {"losses": torch.randn(0).half(), "alpha": 0.1},
            "losses: .* torch.float16 on rank 1; alpha, tail_fraction: .* alpha=0.1 on rank 1",
        ),
        (
            {"weight": torch.ones(9)},
            "weight: expected the same on all ranks, got none on rank 0, 2, a tensor on rank 1",
        ),
        (
            {"grad_reduction": "sum"},
            "grad_reduction: expected the same on all ranks, got mean on rank 0, 2, sum on rank 1",
        ),
        (
            {"function": "tail_indices"},
            "the function: expected the same on all ranks, got distributed.cvar on rank 0, 2, "
            "distributed.tail_indices on rank 1",
        ),
    ],
)
def test_disagreement_is_named_on_every_rank(ranks, second, message):
    for rank, error in enumerate(ranks.run(on_ranks.raises, differing(**second))):
        name = "tail_indices" if rank == 1 and "function" in second else "cvar"
        assert isinstance(error, ValueError)
        with pytest.raises(ValueError, match=f"^distributed.{name}: {message}"):
            raise error


@pytest.mark.parametrize(
    "of_ranks, message",
    [
        ([{}, {}], "losses: expected one that counts on any of the ranks, got none"),
        (
            [{"losses": torch.ones(3), "mask": torch.zeros(3).bool()}, {}],
            "losses: expected one that counts on any of the ranks, got none",
        ),
        (
            [{"losses": torch.ones(3), "weight": torch.zeros(3)}, {"weight": torch.ones(0)}],
            "losses: expected one that counts on any of the ranks, got none",
        ),
        (
            [
                {"losses": torch.ones(3), "weight": torch.ones(3)},
                {"losses": torch.ones(2), "weight": torch.tensor([1.0, -1.0])},
            ],
            "weight: expected finite values >= 0",
        ),
        (
            [
                {"losses": torch.ones(3), "weight": torch.full((3,), 1e308, dtype=torch.float64)},
                {"weight": torch.ones(0)},
            ],
            "weight: expected a finite sum over all ranks",
        ),
    ],
)
def test_what_is_wrong_on_one_rank_is_an_error_on_all(ranks, of_ranks, message):
    calls = [
        ("cvar", each.pop("losses", torch.ones(0)), {"alpha": 0.5, **each}) for each in of_ranks
    ]
    for error in ranks.run(on_ranks.raises, calls):
        assert isinstance(error, ValueError)
        with pytest.raises(ValueError, match=f"^distributed.cvar: {message}"):
            raise error


def test_a_rank_outside_of_the_group(ranks):
    _, error = ranks.run(on_ranks.not_in_the_group, [True, False])
    assert "distributed.cvar: group: expected one of which this rank is" in str(error)


def test_a_rank_that_is_late_ends_in_a_time_out_with_the_name_of_the_function(ranks):
    error, nothing = ranks.run(on_ranks.late, [True, False])
    assert isinstance(error, RuntimeError) and nothing is None
    assert "distributed.cvar: expected all 2 ranks of the group to call it, but " in str(error)
    assert "all_reduce failed on rank 0" in str(error)


@pytest.mark.parametrize("how, function", [("late", "cvar"), ("killed", "tail_loss")])
def test_a_rank_that_leaves_in_the_middle_is_an_error_on_the_others(how, function):
    ranks = on_ranks.Ranks(2, groups=(2,))
    try:
        start = time.monotonic()
        error, other = ranks.run(on_ranks.leaves, ["stays", how], function)
        assert time.monotonic() - start < 10 * on_ranks.LATE.total_seconds()
    finally:
        ranks.close()
    assert isinstance(error, RuntimeError)
    assert f"distributed.{function}: expected all 2 ranks of the group to call it" in str(error)
    assert isinstance(other, EOFError if how == "killed" else RuntimeError)


def test_without_torch_distributed():
    assert not dist.is_initialized()
    for call in (
        lambda x: sqloss.distributed.cvar(x, 0.5),
        lambda x: sqloss.distributed.tail_indices(x, 0.5),
        lambda x: sqloss.distributed.tail_loss(torch.square, x, alpha=0.5),
        lambda x: sqloss.distributed.tail_backward(torch.square, x, alpha=0.5, chunk_size=1),
    ):
        with pytest.raises(ValueError, match="group: expected torch"):
            call(torch.randn(3))


@pytest.mark.parametrize(
    "make, message",
    [
        ("batch_norm", r"got DistributedDataParallel\.module\.1\.1 \(BatchNorm1d\), in training"),
        ("sync_batch_norm", r"got Normalised\.1\.1 \(SyncBatchNorm\), in training mode"),
        ("dropout", r"got DistributedDataParallel\.module\.1\.1 \(Dropout\), .* random numbers"),
        ("random_numbers", "no random numbers from torch's own generators"),
    ],
)
def test_functions_that_two_passes_cannot_take(ranks, make, message):
    x = torch.randn(20, 4)
    error, other = ranks.run(on_ranks.named, [x, x[:0]], make)
    assert isinstance(error, ValueError)
    with pytest.raises(ValueError, match=f"^distributed.tail_loss: fn: expected .*{message}"):
        raise error
    assert isinstance(other, RuntimeError if make == "random_numbers" else ValueError)


def test_an_error_on_one_rank_is_one_on_all(ranks):
    high, low = torch.rand(20, 4) + 50, torch.rand(20, 4)
    for make, kind, message in (
        ("fails_on_large_losses", ZeroDivisionError, "by zero"),
        ("by_position", ValueError, "expected the same loss of a row without the other rows"),
    ):
        for way in ("tail_loss", "tail_backward"):
            first, error, last = ranks.run(on_ranks.named, [low, high, low[:0]], make, way)
            assert isinstance(error, kind) and message in str(error)
            for other in (first, last):
                assert isinstance(other, RuntimeError)
                expected = f"distributed.{way}: fn: expected no error on any rank, got one on rank "
                assert str(other).startswith(expected)
    # Rounding on some ranks alone is measured by all of them, and is none of these
    for way in ("tail_loss", "tail_backward"):
        for result in ranks.run(on_ranks.named, [low, high[:1], low[:0]], "rounding_alone", way):
            assert not isinstance(result, Exception)
    # Rows that are all in the tail, in their order, are the same in both passes
    for result in ranks.run(on_ranks.named, [high[:4], low[:10], low[:6]], "by_position"):
        assert not isinstance(result, Exception)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "tail_indices"])
def test_parameters_that_are_sharded_over_ranks(ranks, way):
    x, rows = torch.rand(50, 1, 6, 6).double(), torch.arange(50)
    model = on_ranks.vae()
    value = sqloss.cvar(on_ranks.vae_losses(model, x, rows), 0.8)
    value.backward()
    expected = value.detach(), [parameter.grad for parameter in model.parameters()]
    for sizes in ([30, 20], [50, 0]):
        of_ranks = list(zip(x.split(sizes), rows.split(sizes), strict=True))
        for got in ranks.run(on_ranks.sharded_gradients, of_ranks, way):
            torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("way", ["tail_loss", "tail_backward, no_sync"])
def test_rounding_is_measured_of_parameters_that_are_sharded(ranks, way):
    """By all ranks together: in each forward they gather parameters."""
    x, rows = torch.rand(50, 1, 6, 6).double(), torch.arange(50)
    of_ranks = list(zip(x.split([30, 20]), rows.split([30, 20]), strict=True))
    for result in ranks.run(on_ranks.sharded_gradients, of_ranks, way, "rounded"):
        assert not isinstance(result, Exception)
    for result in ranks.run(on_ranks.sharded_gradients, of_ranks, way, "coupled"):
        assert isinstance(result, (ValueError, RuntimeError)) and "fn: expected" in str(result)


# --- one process of its own -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_any_shape_and_strides(alone):
    losses = torch.randn(6, 10)[:, ::2].t().requires_grad_()
    value = sqloss.distributed.cvar(losses, 0.8)
    torch.testing.assert_close(value, sqloss.cvar(losses, 0.8))
    (gradient,) = torch.autograd.grad(2 * value, losses, create_graph=True)
    torch.testing.assert_close(gradient, 2 * sqloss.tail_weights(losses, 0.8))


def test_the_gradient_is_linear_in_that_of_the_value(alone):
    losses = torch.randn(20).double().requires_grad_()
    scale = torch.tensor(3.0).double().requires_grad_()
    (gradient,) = torch.autograd.grad(
        scale * sqloss.distributed.cvar(losses, 0.8), losses, create_graph=True
    )
    torch.testing.assert_close(
        torch.autograd.grad(gradient.square().sum(), scale)[0],
        6 * sqloss.tail_weights(losses, 0.8).square().sum(),
    )


PAYLOADS = {  # int64 without sample weights, and with
    torch.float64: ([2066, 2048, 2048, 2048, 1024, 1029], [2066, *[6144] * 4, 3072, 3077]),
    torch.float32: ([2066, 2048, 1029], [2066, 6144, 6144, 3077]),
    torch.bfloat16: ([2066, 37], [2066, 6144, 101]),
    torch.float16: ([2066, 37], [2066, 6144, 101]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["kernel", "reference"])
def test_there_are_as_many_collectives_as_promised(alone, monkeypatch, dtype, way):
    payloads = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: payloads.append(tensor.numel()))
    monkeypatch.setattr(op, "distributed_superquantile", WAY[way])
    for n, weighted in itertools.product((3, 1000), (False, True)):
        losses, weight = torch.randn(n).to(dtype).requires_grad_(), torch.rand(n)
        value = sqloss.distributed.cvar(losses, 0.8, weight=weight if weighted else None)
        value.backward()
        assert payloads == PAYLOADS[dtype][weighted]
        payloads.clear()


def test_forward_mode_is_refused(alone):
    with forward_ad.dual_level():
        losses = forward_ad.make_dual(torch.randn(5), torch.ones(5))
        with pytest.raises(NotImplementedError, match="losses: expected no tangent"):
            sqloss.distributed.cvar(losses, 0.5)


def test_torch_compile_breaks_its_graph_there(alone):
    losses = torch.randn(50, requires_grad=True)
    step = torch.compile(lambda x: 3 * sqloss.distributed.cvar(2 * x, 0.8), backend="eager")
    (gradient,) = torch.autograd.grad(step(losses), losses)
    torch.testing.assert_close(gradient, 6 * sqloss.tail_weights(losses, 0.8))


def test_autocast_computes_in_float32(alone):
    losses = torch.randn(30).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = sqloss.distributed.cvar(losses, 0.8)
        _, weights = sqloss.distributed.tail_indices(losses, 0.8)
    assert value.dtype == weights.dtype == torch.float32


def test_dtensors_are_refused_by_name(alone):
    x = torch.randn(9)
    losses = distribute_tensor(x, DeviceMesh("cpu", [0]), [Shard(0)]).requires_grad_()
    for function, of in ((sqloss.cvar, "cvar"), (sqloss.distributed.cvar, "distributed.cvar")):
        message = (
            rf"^{of}: losses: expected a tensor of this process, got a DTensor: full_tensor\(\)"
        )
        with pytest.raises(TypeError, match=message):
            function(losses, 0.5)
    value = sqloss.distributed.cvar(losses.to_local(), 0.5, grad_reduction="sum")
    value.backward()
    assert torch.equal(value, sqloss.cvar(losses.full_tensor(), 0.5))
    torch.testing.assert_close(losses.grad.to_local(), sqloss.tail_weights(x, 0.5))


def test_transforms_of_torch_func_are_refused(alone):
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(NotImplementedError, match=r"transforms of torch\.func are not"):
            transform(lambda x: sqloss.distributed.cvar(2 * x, 0.5).sum())(torch.randn(5, 4)[0])


def test_inference_mode_and_no_grad(alone):
    x = torch.randn(9, requires_grad=True)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            value = sqloss.distributed.cvar(x, 0.5)
            assert not value.requires_grad and torch.equal(value, sqloss.cvar(x, 0.5))
            loss = sqloss.distributed.tail_loss(torch.square, x, alpha=0.5)
            assert torch.equal(loss, sqloss.cvar(x.square(), 0.5))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="outside of torch"):
        sqloss.distributed.tail_backward(pytest.fail, x, alpha=0.5, chunk_size=1)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: sqloss.distributed.cvar(torch.randn(3), 0.5, grad_reduction="none"),
            ValueError,
            r"distributed.cvar: grad_reduction: expected one of \('mean', 'sum'\), got 'none'",
        ),
        (
            lambda: sqloss.distributed.cvar(torch.randn(3), 1.5),
            ValueError,
            "distributed.cvar: alpha: expected a confidence level",
        ),
        (
            lambda: sqloss.distributed.cvar(torch.ones(3).long(), 0.5),
            TypeError,
            "distributed.cvar: losses: expected a dense tensor of float16",
        ),
        (
            lambda: sqloss.distributed.cvar(torch.ones(3), 0.5, mask=torch.ones(2).bool()),
            ValueError,
            "distributed.cvar: mask: expected a shape that broadcasts",
        ),
        (
            lambda: sqloss.distributed.tail_loss(torch.abs, torch.ones(3), alpha=2),
            ValueError,
            "distributed.tail_loss: alpha: expected a confidence level",
        ),
        (
            lambda: sqloss.distributed.tail_loss(torch.abs, torch.ones(0), alpha=0.5),
            ValueError,
            "losses: expected one that counts on any of the ranks, got none",
        ),
        (
            lambda: sqloss.distributed.tail_backward(
                torch.abs, torch.ones(3), alpha=0.5, chunk_size=0
            ),
            ValueError,
            "distributed.tail_backward: chunk_size: expected at least 1, got 0",
        ),
        (
            lambda: sqloss.distributed.tail_indices(torch.randn(3, 2), 0.5),
            ValueError,
            r"distributed.tail_indices: losses: expected shape \[N\], got \(3, 2\)",
        ),
    ],
)
def test_errors(alone, call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- the digits, on threads -----------------------------------------------------------------------


def test_kernel_and_reference_agree_bit_for_bit():
    """Also with each other, as ranks on different devices."""

    def mixed(x, *arguments):
        twin = reference.distributed_superquantile
        return (twin if x.numel() == 300 else op.distributed_superquantile)(x, *arguments)

    for kind, dtype in itertools.product(LOSSES, DTYPES):
        n = 700
        losses = (LOSSES[kind](n) * 1.7).to(dtype)
        weight, mask = torch.randn(n).mul(3).exp(), torch.rand(n) < 0.7
        for alpha in (0.0, 0.35, 0.9, 1 - 2**-53):
            for given_ in ({}, {"mask": mask}, {"weight": weight, "mask": mask}):
                ways = op.distributed_superquantile, reference.distributed_superquantile, mixed
                first, *others = [
                    on_threads(losses, alpha, [300, 400], **given_, superquantile=way)[0]
                    for way in ways
                ]
                for other in others:
                    for got, expected in zip(other, first, strict=True):
                        assert torch.equal(got.nan_to_num(1e5), expected.nan_to_num(1e5))
                        assert got.dtype == expected.dtype and got.shape == expected.shape


def test_on_a_gpu_it_has_the_bits_of_the_kernel_and_the_host_does_not_wait(gpu):
    def found(losses, weight, mask):  # of one rank
        return op.distributed_superquantile(
            losses, 0.2, weight, mask, [1, 2, 3], 1, 1, lambda sums: None, lambda equal: None, "f"
        )

    weight, mask = torch.randn(700).exp(), torch.rand(700) < 0.7
    for dtype, given_ in itertools.product(DTYPES, ((None, None), (None, mask), (weight, mask))):
        tensors = torch.randn(700).to(dtype), *given_
        on_gpu = [None if tensor is None else tensor.to(gpu) for tensor in tensors]
        found(*on_gpu)  # makes its constants
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = found(*on_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for a, b in zip(got, found(*tensors), strict=True):
            assert torch.equal(a.cpu(), b)


def on_threads(losses, alpha, sizes, weight=None, mask=None, superquantile=None):
    """(value, threshold, counts) on each rank."""
    superquantile = superquantile or op.distributed_superquantile
    shards = [split(tensor, sizes) for tensor in (losses, weight, mask)]

    def run(rank, all_reduce):
        def check(equal):
            assert equal.all()

        x, w, m = (None if tensor is None else tensor[rank] for tensor in shards)
        config, ranks = [1, 2, 65535], len(sizes)
        return superquantile(x, 1 - alpha, w, m, config, ranks, 1, all_reduce, check, "function")

    return on_ranks.in_threads(len(sizes), run)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LOSSES)
def test_threshold_and_counts_are_those_of_one_process_bit_for_bit(dtype, kind):
    for n in (1, 9, 500):
        losses, mask = LOSSES[kind](n).to(dtype), torch.rand(n) < 0.7
        mask[0] = True
        for alpha in ALPHAS:
            for given_ in ({}, {"mask": mask}):
                expected = sqloss.value_at_risk(losses, alpha, **given_)
                counts = reference.superquantile(losses, 1 - alpha, **given_)[2]
                for _, threshold, got in on_threads(losses, alpha, shards_of(n, 3), **given_):
                    assert threshold.dtype == dtype and got.tolist() == counts.tolist()
                    assert torch.equal(threshold.nan_to_num(77), expected.nan_to_num(77))
                    assert not (threshold == 0 and threshold.signbit())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_bits_do_not_depend_on_the_layout(dtype, weighted):
    n = 3000
    losses = (torch.randn(n).exp() * torch.randn(n)).to(dtype)
    weight = torch.randn(n).mul(3).exp() if weighted else None
    for alpha in ALPHAS:
        results = set()
        for sizes in ([n], shards_of(n, 2), shards_of(n, 5), [0, n, 0], [1] * 20 + [n - 20]):
            order = torch.randperm(n)
            shuffled = weight[order] if weighted else None
            for result in on_threads(losses[order], alpha, sizes, shuffled):
                results.add(tuple(x for tensor in result for x in tensor.reshape(-1).tolist()))
        assert len(results) == 1


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e-30, 1e30, 1e307])
def test_losses_and_weights_of_any_magnitude(scale):
    losses = torch.randn(200, dtype=torch.float64)
    weight = torch.rand(200, dtype=torch.float64) + 0.5
    for alpha in ALPHAS:
        value = on_threads(losses * scale, alpha, [120, 80])[0][0]
        expected = sqloss.cvar(losses, alpha) * scale
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-322)
        if 1e-300 <= scale < 1e300:
            value, threshold, _ = on_threads(losses, alpha, [120, 80], weight * scale)[0]
            torch.testing.assert_close(value, sqloss.cvar(losses, alpha, weight=weight), **EXACT)
            assert threshold == sqloss.value_at_risk(losses, alpha, weight=weight)


@pytest.mark.parametrize("way", ["kernel", "reference"])
def test_ties_add_up_exactly(way):
    """Where sums cancel: each loss counts to its last bit, however many there are of it."""
    near = math.nextafter(-0.1, 0)
    losses = torch.tensor([-0.1] + [near] * 1000 + [0.1] * 1001, dtype=torch.float64)
    exact = sum(map(Fraction, losses.tolist())) / len(losses)
    for order in (torch.arange(2002), torch.randperm(2002)):
        value = on_threads(losses[order], 0.0, [1000, 1002], superquantile=WAY[way])[0][0]
        assert value.item() == pytest.approx(float(exact), rel=1e-15)


@pytest.mark.parametrize("way", ["kernel", "reference"])
def test_a_weight_that_is_nothing_beside_the_largest(way):
    losses = torch.tensor([1e-10, 1e300, 2e-10], dtype=torch.float64)
    weight = torch.tensor([1.0, 1e-30, 1.0], dtype=torch.float64)
    for alpha, expected in ((0.0, 1.5e-10), (0.6, 2e-10)):
        value, *_ = on_threads(losses, alpha, [1, 2], weight, superquantile=WAY[way])[0]
        assert value.item() == pytest.approx(expected, rel=1e-15)
    for special in (INF, NAN):  # which no weight makes smaller
        losses[1] = special
        value, *_ = on_threads(losses, 0.0, [1, 2], weight, superquantile=WAY[way])[0]
        torch.testing.assert_close(value.item(), special, equal_nan=True)


WAY = {
    "kernel": op.distributed_superquantile,
    "reference": reference.distributed_superquantile,
}


def on_equal_ranks(losses, alpha, ranks, way, weight=None):
    """(value, threshold, counts) of as many ranks that all have these losses."""
    config = [1, 2, 3]

    def all_reduce(sums):
        sums.mul_(ranks)

    return WAY[way](
        losses, 1 - alpha, weight, None, config, ranks, ranks, all_reduce, print, "function"
    )


@pytest.mark.parametrize("way", ["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gradients_of_very_many_ranks(way, dtype):
    """The weight of a loss in the tail of all of them, 5e-9, is 0 in half precision."""
    losses = torch.randn(1000).to(dtype).requires_grad_()
    value, threshold, counts = on_equal_ranks(losses.detach(), 0.8, 10**6, way)
    assert threshold == sqloss.value_at_risk(losses, 0.8)
    value = op.with_gradient(value, losses, None, None, threshold, counts)
    value += 1  # in place
    (gradient,) = torch.autograd.grad(value, losses)
    torch.testing.assert_close(gradient, sqloss.tail_weights(losses, 0.8))
    (scaled,) = torch.autograd.grad(
        65504 * op.with_gradient(threshold, losses, None, None, threshold, counts), losses
    )
    assert scaled.isfinite().all()


@pytest.mark.parametrize("way", ["kernel", "reference"])
@pytest.mark.parametrize("weighted", [False, True])
def test_more_losses_than_sums_can_hold(way, weighted):
    weight = torch.ones(9) if weighted else None
    on_equal_ranks(torch.randn(8), 0.5, 2**31, way, weight[:8] if weighted else None)
    with pytest.raises(ValueError, match="losses: expected at most 17179869184 on all ranks"):
        on_equal_ranks(torch.randn(9), 0.5, 2**31, way, weight)


def test_an_outlier_hides_nothing():
    losses = torch.tensor([1.0] * 999 + [1e18], dtype=torch.float64)
    for alpha in (0.0, 0.5):
        k = (1 - alpha) * 1000
        value = on_threads(losses, alpha, [400, 600])[0][0]
        assert value.item() == pytest.approx((1e18 + k - 1) / k, rel=1e-15)


floats = st.one_of(
    st.floats(-1e6, 1e6, width=32), st.integers(-2, 2).map(float), st.sampled_from([INF, -INF, NAN])
)


@settings(max_examples=60)
@given(
    st.lists(st.lists(floats, max_size=12), min_size=1, max_size=4).filter(any),
    st.sampled_from(ALPHAS),
    st.sampled_from(DTYPES),
)
def test_law_the_tail_is_that_of_the_concatenation(shards, alpha, dtype):
    losses = torch.tensor([x for shard in shards for x in shard], dtype=torch.float64).to(dtype)
    value, threshold, counts = reference.superquantile(losses.double(), 1 - alpha)
    for got in on_threads(losses, alpha, list(map(len, shards))):
        eps = torch.finfo(dtype).eps
        scale = losses.double().nan_to_num(0, 0, 0).abs().max().item()
        expected = value.to(dtype)
        close = {"rtol": 2 * eps, "atol": 4 * eps * eps * scale + 1e-7 * (dtype == torch.float16)}
        torch.testing.assert_close(got[0], expected, **close, equal_nan=True)
        assert torch.equal(got[1].double().nan_to_num(0.5), threshold.nan_to_num(0.5))
        assert torch.equal(got[2], counts)
