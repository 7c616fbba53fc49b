"""The rows of the tail against the definition, and losses of them alone against all losses."""

import copy
import itertools
import math
import threading
import weakref
from fractions import Fraction
from functools import partial
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import sqloss
from sqloss import reference
from sqloss.models import VAE

ALPHAS = [0.0, 0.1, 0.3, 0.5, 0.7, 0.75, 0.8, 0.9, 0.95, 0.999, 1 - 2**-53]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan
EXACT = {"rtol": 1e-12, "atol": 1e-12}


# --- tail_indices ---------------------------------------------------------------------------------


def assert_is_the_tail(losses, alpha, mask=None):
    indices, weights = sqloss.tail_indices(losses, alpha, mask=mask)
    expected = reference.tail_indices(losses, 1 - alpha, mask)
    assert torch.equal(indices, expected[0])
    assert indices.dtype == torch.int64 and weights.dtype == losses.dtype
    torch.testing.assert_close(weights, expected[1].to(losses.dtype), rtol=1e-15, atol=0)
    return indices, weights


def test_worked_case(device):
    losses = torch.arange(10.0, dtype=torch.float64, device=device) ** 2
    indices, weights = sqloss.tail_indices(losses, 0.75)
    assert indices.tolist() == [7, 8, 9]
    torch.testing.assert_close(weights.cpu(), torch.tensor([0.2, 0.4, 0.4]).double())
    assert (weights * losses[indices]).sum().item() == pytest.approx(67.8, abs=1e-13)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 32, 100])
def test_as_many_as_k_rounded_up_at_every_two_decimal_alpha(n):
    losses = torch.randn(n, dtype=torch.float64)
    for percent in range(100):
        alpha = percent / 100
        indices, weights = sqloss.tail_indices(losses, alpha)
        assert len(indices) == math.ceil((1 - Fraction(str(alpha))) * n)
        dense = sqloss.tail_weights(losses, alpha)
        torch.testing.assert_close(
            torch.zeros_like(dense).index_put((indices,), weights), dense, rtol=1e-15, atol=0
        )
        assert torch.equal(indices, dense.nonzero().squeeze(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 5, 129, 9001])
def test_twin(device, n, dtype):
    losses = torch.randn(n, device=device).to(dtype)
    mask = torch.rand(n, device=device) < 0.7
    mask[n // 2] = True
    for alpha in ALPHAS:
        assert_is_the_tail(losses, alpha)
        assert_is_the_tail(losses, alpha, mask)
        assert_is_the_tail(losses[::2], alpha, mask[::2] | (n < 3))


SPECIAL = {
    "constant": [0.1] * 9,
    "two values": [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0],
    "signed zeros": [0.0, -0.0, -0.0, 0.0, -1.0],
    "infinities": [INF, 1.0, -INF, 2.0, INF, 0.0, -INF],
    "all -inf": [-INF] * 5,
    "NaN": [1.0, NAN, INF, -INF, NAN, 2.0, NAN],
    "all NaN": [NAN] * 5,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SPECIAL)
def test_twin_on_special_values(device, case, dtype):
    losses = torch.tensor(SPECIAL[case], dtype=dtype, device=device)
    mask = torch.arange(len(losses), device=device) % 3 != 1
    for alpha in ALPHAS:
        assert_is_the_tail(losses, alpha)
        assert_is_the_tail(losses, alpha, mask)


def test_ties_are_taken_by_index_and_share_evenly():
    losses = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 0.0])
    indices, weights = sqloss.tail_indices(losses, 0.6)  # k = 2.4: 3, and two of the three 2
    assert indices.tolist() == [0, 2, 3]
    torch.testing.assert_close(weights, torch.tensor([1 / 2.4, 0.7 / 2.4, 0.7 / 2.4]))


values = st.one_of(st.floats(-1e6, 1e6), st.integers(-2, 2).map(float))


@given(st.lists(values, min_size=1, max_size=40), st.sampled_from(ALPHAS), st.data())
def test_law_weights_are_a_subgradient(losses, alpha, data):
    """Of the superquantile: in its feasible set, and attaining its value."""
    losses = torch.tensor(losses, dtype=torch.float64)
    kept = data.draw(st.lists(st.booleans(), min_size=len(losses), max_size=len(losses)))
    mask = torch.tensor(kept) if any(kept) else None
    indices, weights = assert_is_the_tail(losses, alpha, mask)
    n = len(losses) if mask is None else int(mask.sum())
    k = max((1 - alpha) * n, 1)
    assert ((weights >= 0) & (weights <= 1 / k + 1e-15)).all()
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    if mask is not None:
        assert mask[indices[weights > 0]].all()
    value = sqloss.cvar(losses, alpha, mask=mask)
    scale = losses.abs().max().item() + 1
    torch.testing.assert_close((weights * losses[indices]).sum(), value, rtol=0, atol=1e-12 * scale)


def test_a_mask_leaves_the_size_and_fills_up_with_weight_zero():
    losses = torch.arange(10.0)
    indices, weights = sqloss.tail_indices(losses, 0.5, mask=losses < 4)
    assert indices.tolist() == [2, 3, 2, 2, 2] and weights.tolist() == [0.5, 0.5, 0, 0, 0]


def test_compiles_whole_and_at_any_size():
    @partial(torch.compile, fullgraph=True, dynamic=True, backend="aot_eager")
    def step(losses, mask):
        return *sqloss.tail_indices(losses, 0.8), *sqloss.tail_indices(losses, 0.5, mask=mask)

    for n in (64, 100, 7):
        losses, mask = torch.randn(n), torch.rand(n) < 0.8
        expected = *sqloss.tail_indices(losses, 0.8), *sqloss.tail_indices(losses, 0.5, mask=mask)
        got = step(losses, mask)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_a_graph_captures_it(capture):
    losses = torch.randn(1000, device="cuda")
    replay, outputs = capture(lambda: sqloss.tail_indices(losses, 0.8))
    for _ in range(3):
        losses.normal_()
        replay()
        expected = sqloss.tail_indices(losses, 0.8)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_autocast_gives_weights_in_float32():
    losses = torch.randn(30).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        indices, weights = sqloss.tail_indices(losses, 0.8)
    assert weights.dtype == torch.float32
    assert torch.equal(indices, sqloss.tail_indices(losses, 0.8)[0])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: sqloss.tail_indices(torch.randn(2, 3), 0.5),
            ValueError,
            r"tail_indices: losses: expected shape \[N\], got \(2, 3\)",
        ),
        (
            lambda: sqloss.tail_indices(torch.randn(0), 0.5),
            ValueError,
            "tail_indices: losses: expected at least one loss",
        ),
        (
            lambda: sqloss.tail_indices(torch.randn(3), 1.0),
            ValueError,
            "tail_indices: alpha: expected a confidence level",
        ),
        (
            lambda: sqloss.tail_indices(torch.randn(3), 0.5, mask=torch.ones(3)),
            TypeError,
            "tail_indices: mask: expected a bool tensor",
        ),
        (
            lambda: sqloss.tail_indices(torch.randn(3), 0.5, mask=torch.zeros(3).bool()),
            ValueError,
            "mask: expected at least one row that counts",
        ),
    ],
)
def test_errors_of_indices(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- tail_loss: the same as all losses ------------------------------------------------------------


def network(*sizes):
    layers = [layer for n, m in itertools.pairwise(sizes) for layer in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


class Regression(nn.Module):
    """Per-sample losses, as a module."""

    def __init__(self, *sizes):
        super().__init__()
        self.net = network(*sizes)

    def forward(self, x, y):
        return (self.net(x) - y).square().sum(1)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 0.97, 0.999])
def test_value_and_gradient_are_the_dense_ones(device, alpha):
    model = Regression(6, 10, 3).to(device)
    x = torch.randn(67, 6, dtype=torch.float64, device=device, requires_grad=True)
    y = torch.randn(67, 3, dtype=torch.float64, device=device)
    scale = torch.tensor(1.5, dtype=torch.float64, device=device, requires_grad=True)

    def losses(x, y):
        return scale * model(x, y)

    leaves = x, scale, *model.parameters()
    loss = sqloss.tail_loss(losses, x, y, alpha=alpha)
    dense = sqloss.cvar(losses(x, y), alpha)
    assert torch.equal(loss, dense)
    expected = torch.autograd.grad(3 * dense, leaves)
    got = torch.autograd.grad(3 * loss, leaves)
    torch.testing.assert_close(got, expected, **EXACT)
    assert (got[0] != 0).any(1).sum() == math.ceil(round((1 - alpha) * 67, 9))

    for chunk_size in (1, 7, 16, 1000):
        for leaf in leaves:
            leaf.grad = torch.ones_like(leaf)  # is added to
        value = sqloss.tail_backward(losses, x, y, alpha=alpha, chunk_size=chunk_size, gradient=3)
        torch.testing.assert_close(value, dense.detach(), **EXACT)
        for leaf, gradient in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, 1 + gradient, **EXACT)


def test_a_module_is_a_function_and_backward_accumulates():
    model = Regression(4, 8, 2)
    twin = copy.deepcopy(model)
    for _ in range(2):
        x, y = torch.randn(40, 4).double(), torch.randn(40, 2).double()
        sqloss.tail_loss(model, x, y, tail_fraction=0.3).backward()
        sqloss.cvar(twin(x, y), tail_fraction=0.3).backward()
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, **EXACT)


def gradients_of(model, backward):
    model.zero_grad()
    backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_a_mask_keeps_its_rows_out_even_of_the_second_pass():
    model, mask = Regression(4, 8, 2), torch.rand(40) < 0.3
    x, y = torch.randn(40, 4).double(), torch.randn(40, 2).double()
    x[~mask] = NAN
    dense = sqloss.cvar(model(x[mask], y[mask]), 0.7)
    loss = sqloss.tail_loss(model, x, y, alpha=0.7, mask=mask)
    torch.testing.assert_close(loss, dense, **EXACT)
    expected = gradients_of(model, dense.backward)
    torch.testing.assert_close(gradients_of(model, loss.backward), expected, **EXACT)
    got = gradients_of(
        model, lambda: sqloss.tail_backward(model, x, y, alpha=0.7, mask=mask, chunk_size=5)
    )
    torch.testing.assert_close(got, expected, **EXACT)


def test_only_rows_of_the_tail_have_a_graph():
    seen = []

    def losses(x):
        seen.append((len(x), torch.is_grad_enabled()))
        return x.square().sum(1)

    x = torch.randn(45, 3, requires_grad=True)
    loss = sqloss.tail_loss(losses, x, alpha=0.6)
    loss.backward()
    assert seen == [(45, False), (18, True)]

    seen.clear()
    sqloss.tail_backward(losses, x, alpha=0.6, chunk_size=10)
    assert seen == [(n, False) for n in (10, 10, 10, 10, 5)] + [(10, True), (8, True)]

    seen.clear()
    with torch.no_grad():
        value = sqloss.tail_loss(losses, x, alpha=0.6)
    assert seen == [(45, False)] and torch.equal(value, loss)


def test_where_gradients_are_disabled():
    weight = torch.tensor(2.0, requires_grad=True)
    called = []

    def losses(x):
        called.append(len(x))
        return weight * x

    x = torch.arange(10.0)
    for disabled in (torch.no_grad, torch.inference_mode):
        with disabled():
            value = sqloss.tail_loss(losses, x, alpha=0.8)
        assert value == 17 and not value.requires_grad and called == [10]
        called.clear()
    with torch.no_grad():
        sqloss.tail_backward(losses, x, alpha=0.8, chunk_size=10)
    assert weight.grad == 8.5
    called.clear()
    with torch.inference_mode():
        for_inference = x + 0
        with pytest.raises(RuntimeError, match=r"^tail_backward: .* outside of torch\.infer"):
            sqloss.tail_backward(losses, x, alpha=0.8, chunk_size=10)
    assert not called
    sqloss.tail_backward(losses, for_inference, alpha=0.8, chunk_size=10)
    assert weight.grad == 17


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_no_graph_stays_of_the_first_pass(chunk_size):
    """Where fn makes one itself: a penalty on the gradient in the input."""
    weight = torch.randn(3).double().requires_grad_()
    held = weakref.WeakSet()

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        saved = Saved(tensor)
        held.add(saved)
        return saved

    def losses(x):
        assert not held
        with torch.enable_grad(), saved_tensors_hooks(pack, lambda saved: saved.tensor):
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad((x * weight).sin().sum(), x, create_graph=True)
            return slope.square().sum(1)

    x = torch.randn(20, 3).double()
    if chunk_size is None:
        sqloss.tail_loss(losses, x, alpha=0.8).backward()
    else:
        sqloss.tail_backward(losses, x, alpha=0.8, chunk_size=chunk_size)
    (expected,) = torch.autograd.grad(sqloss.cvar(losses(x), 0.8), weight)
    torch.testing.assert_close(weight.grad, expected, **EXACT)


def test_chunks_go_once_through_the_graph_of_a_tensor():
    embed, head = nn.Linear(5, 4).double(), nn.Linear(4, 1).double()
    x = torch.randn(50, 5).double()

    def losses(h, free):
        return head(h).squeeze(1).square()  # no gradient reaches the other tensor

    free = torch.randn(50).double().requires_grad_()
    sqloss.tail_backward(losses, embed(x).tanh(), free, alpha=0.5, chunk_size=7)
    got = embed.weight.grad, head.weight.grad
    dense = sqloss.cvar(losses(embed(x).tanh(), free), 0.5)
    expected = torch.autograd.grad(dense, (embed.weight, head.weight))
    torch.testing.assert_close(got, expected, **EXACT)
    assert (free.grad == 0).all()


def test_the_value_is_that_of_all_losses_bit_for_bit():
    model = nn.Linear(20, 1)
    x = torch.randn(500, 20)
    loss = sqloss.tail_loss(lambda x: model(x).squeeze(1).exp(), x, alpha=0.8)
    assert torch.equal(loss, sqloss.cvar(model(x).squeeze(1).exp(), 0.8))


@pytest.mark.parametrize(
    "mask, error, message",
    [
        (torch.ones(3).bool(), ValueError, r"broadcasts to that of losses, \(8,\), got \(3,\)"),
        (torch.ones(8), TypeError, "expected a bool tensor, got torch.float32"),
        ([True] * 8, TypeError, "expected a tensor, got list"),
    ],
)
def test_a_wrong_mask_is_an_error_before_any_work(mask, error, message):
    with pytest.raises(error, match=f"^tail_loss: mask: .*{message}"):
        sqloss.tail_loss(pytest.fail, torch.randn(8), alpha=0.5, mask=mask)


def test_at_ties_it_is_a_subgradient():
    x = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 0.0], requires_grad=True)
    loss = sqloss.tail_loss(lambda x: x.clone(), x, alpha=0.6)
    loss.backward()
    assert loss == sqloss.cvar(x, 0.6)
    torch.testing.assert_close(x.grad, torch.tensor([1, 0, 0.7, 0.7, 0, 0]) / 2.4)


def test_nan_and_infinity():
    x = torch.tensor([1.0, NAN, 2.0, 3.0], requires_grad=True)
    sqloss.tail_loss(lambda x: 2 * x, x, alpha=0.5).backward()
    assert x.grad.tolist() == [0, 1, 0, 1]
    x = torch.tensor([1.0, INF, -INF, 3.0], requires_grad=True)
    loss = sqloss.tail_loss(lambda x: 2 * x, x, alpha=0.0)
    loss.backward()
    assert loss == INF and x.grad.tolist() == [0.5] * 4
    (grad,) = torch.autograd.grad(sqloss.tail_loss(lambda x: 2 * x, x, alpha=0.5) * INF, x)
    assert grad.tolist() == [0, INF, 0, INF]


def test_derivatives_of_the_gradient():
    model = Regression(3, 5, 2)
    x, y = torch.randn(20, 3).double().requires_grad_(), torch.randn(20, 2).double()

    def hessian_product(loss):
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, *model.parameters()])

    got = hessian_product(sqloss.tail_loss(model, x, y, alpha=0.8))
    torch.testing.assert_close(got, hessian_product(sqloss.cvar(model(x, y), 0.8)), **EXACT)


def test_torch_func_and_forward_mode():
    x, v = torch.randn(20, 3).double(), torch.randn(20, 3).double()

    def losses(x):
        return x.pow(3).sum(1)

    def tail(x):
        return sqloss.tail_loss(losses, x, alpha=0.8)

    def dense(x):
        return sqloss.cvar(losses(x), 0.8)

    torch.testing.assert_close(torch.func.grad(tail)(x), torch.func.grad(dense)(x), **EXACT)
    got, expected = torch.func.jvp(tail, (x,), (v,)), torch.func.jvp(dense, (x,), (v,))
    torch.testing.assert_close(got, expected, **EXACT)
    got, expected = torch.func.hessian(tail)(x), torch.func.hessian(dense)(x)
    torch.testing.assert_close(got, expected, **EXACT)


def test_autocast_casts_weights_again_for_the_graph():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(64, 8)

    def losses(x):
        return model(x).squeeze(1).square()

    with torch.autocast("cpu", torch.bfloat16):
        loss = sqloss.tail_loss(losses, x, alpha=0.8)
        dense = sqloss.cvar(losses(x), 0.8)
        got = gradients_of(model, lambda: sqloss.tail_backward(losses, x, alpha=0.8, chunk_size=5))
    assert loss.dtype == torch.float32
    expected = gradients_of(model, dense.backward)
    close = {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(got, expected, **close)
    torch.testing.assert_close(gradients_of(model, loss.backward), expected, **close)

    with torch.autocast("cpu", torch.bfloat16):
        step = torch.compile(sqloss.tail_loss, fullgraph=True, backend="aot_eager")
        compiled = step(losses, x, alpha=0.8)
    torch.testing.assert_close(gradients_of(model, compiled.backward), expected, **close)


def test_compiles_whole():
    model = Regression(4, 8, 2)
    x, y = torch.randn(50, 4).double(), torch.randn(50, 2).double()

    def step(x, y):
        return sqloss.tail_loss(model, x, y, alpha=0.8)

    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(x, y)
    dense = sqloss.cvar(model(x, y), 0.8)
    torch.testing.assert_close(loss, dense, **EXACT)
    got, expected = (torch.autograd.grad(v, list(model.parameters())) for v in (loss, dense))
    torch.testing.assert_close(got, expected, **EXACT)


def ways_to_compile(model, backend):
    fast = torch.compile(model, backend=backend)
    holder = SimpleNamespace(model=fast)
    in_place = copy.copy(model)
    in_place.compile(backend=backend)

    def losses(x, y):
        return model(x, y)

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = fast

        def forward(self, x, y):
            return self.inner(x, y)

    class Trainer:
        def __init__(self):
            self.models = [fast]

        def losses(self, x, y):
            return self.models[0](x, y)

    return {
        "a module": fast,
        "in a module": Holder(),
        "in a list": Trainer().losses,
        "a closure": lambda x, y: fast(x, y),
        "a function": torch.compile(losses, backend=backend),
        "a part": partial(torch.compile(losses, backend=backend), y=torch.zeros(1, 2).double()),
        "in place": in_place,
        "of an object": lambda x, y: holder.model(x, y),
        "a method of an object": MethodType(lambda holder, x, y: holder.model(x, y), holder),
        "a method": in_place.forward,
    }


@pytest.mark.parametrize("way", ways_to_compile(nn.Identity(), "eager"))
def test_what_is_compiled_is_compiled_once_for_each_pass(way):
    torch.compiler.reset()  # what other ways have compiled counts against a limit
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    model = Regression(4, 8, 2)
    fn = ways_to_compile(model, backend)[way]
    steps = []
    for _ in range(4):
        tensors = [torch.randn(50, n).double() for n in ((4,) if way == "a part" else (4, 2))]
        sqloss.tail_loss(fn, *tensors, alpha=0.8, check=False).backward()
        steps.append(len(compiled))
    assert steps == [steps[0]] * 4 and steps[0] == (0 if way == "a method" else 2)

    model.net.append(nn.BatchNorm1d(2).double())
    with pytest.raises(ValueError, match=r"\.net\.3 \(BatchNorm1d\)"):
        sqloss.tail_loss(fn, *tensors, alpha=0.8)


class Config(dict):
    __getattr__ = dict.__getitem__


class AnswersAll(dict):
    def __getattr__(self, name):
        return None


class Lies:
    __dict__ = __class__ = __globals__ = property(lambda self: pytest.fail("was asked"))


class Refuses:
    def __getattribute__(self, name):
        pytest.fail(f"was asked for {name}")


of_file = None  # set by a test


@pytest.mark.parametrize("kind", [Config, AnswersAll, Lies, Refuses])
def test_objects_within_reach_are_asked_nothing(kind, monkeypatch):
    config = kind()
    monkeypatch.setitem(globals(), "of_file", config)

    class Method:
        def __init__(self):
            self.config = config

        def losses(self, x):
            return x.square()

    class Callable(kind):
        def __call__(self, x):
            return x.square()

    ways = {
        "a closure": lambda x: x.square() if config is not None else x,
        "a global": lambda x: x.square() if of_file is not None else x,
        "a default": lambda x, config=config: x.square(),
        "a part": partial(lambda x, config: x.square(), config=config),
        "of a method": Method().losses,
        "the owner of a method": MethodType(lambda config, x: x.square(), config),
        "the function": Callable(),
    }
    x = torch.randn(20, requires_grad=True)
    (expected,) = torch.autograd.grad(sqloss.cvar(x.square(), 0.8), x)
    for way, fn in ways.items():
        (got,) = torch.autograd.grad(sqloss.tail_loss(fn, x, alpha=0.8), x)
        torch.testing.assert_close(got, expected, msg=way)


def test_an_object_whose_dictionary_is_itself_is_looked_into():
    model = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), backend="eager")

    class Names(dict):
        def __init__(self, **names):
            super().__init__(**names)
            self.__dict__ = self

    names = Names(model=model)
    with pytest.raises(ValueError, match=r"Sequential\.1 \(BatchNorm1d\)"):
        sqloss.tail_loss(lambda x: names.model(x).sum(1), torch.randn(20, 4), alpha=0.8)


def test_batches_larger_than_memory(peak_memory):
    """65,536 rows in the memory of accumulating 128 and 128, but for the losses of all."""
    model, n, size = Regression(16, 64, 64, 4).float(), 2**16, 128
    x, y = torch.randn(n, 16), torch.randn(n, 4)

    def ordinary():
        model(x[:size], y[:size]).mean().backward()

    def tail():
        sqloss.tail_backward(model, x, y, alpha=0.8, chunk_size=size)

    def dense():
        sqloss.cvar(model(x, y), alpha=0.8).backward()

    gradients = [gradients_of(model, step) for step in (tail, dense)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    peaks = [peak_memory(step) for step in (ordinary, tail, dense)]  # beside the gradients
    assert peaks[1] <= 1.2 * peaks[0] + 40 * n
    assert peaks[2] > 10 * peaks[1]


# --- tail_loss: noise -----------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["normal", "t"])
def test_noise_by_the_numbers_of_rows(prior):
    model = VAE((1, 8, 8), hidden=(16,), latent=4, prior=prior).double()
    x, seed = torch.rand(50, 1, 8, 8).double(), sqloss.draw_seed()

    def losses(x, rows):
        each = model.losses(x, seed, rows=rows)
        return each["reconstruction"] + each["kl"]

    rows = torch.arange(50)
    loss = sqloss.tail_loss(losses, x, rows, alpha=0.8)
    dense = sqloss.cvar(losses(x, None), 0.8)
    torch.testing.assert_close(loss, dense, **EXACT)
    expected = gradients_of(model, dense.backward)
    torch.testing.assert_close(gradients_of(model, loss.backward), expected, **EXACT)
    got = gradients_of(
        model, lambda: sqloss.tail_backward(losses, x, rows, alpha=0.8, chunk_size=6)
    )
    torch.testing.assert_close(got, expected, **EXACT)


def test_noise_as_a_tensor():
    loc = torch.randn(40, 3).double().requires_grad_()
    noise = torch.randn(40, 3).double()

    def losses(loc, noise):
        return (loc + noise).square().sum(1)

    loss = sqloss.tail_loss(losses, loc, noise, alpha=0.8)
    dense = sqloss.cvar(losses(loc, noise), 0.8)
    (got,), (expected,) = (torch.autograd.grad(v, loc) for v in (loss, dense))
    torch.testing.assert_close(got, expected, **EXACT)


def test_noise_of_other_rows_gives_another_gradient_and_an_error():
    loc = torch.randn(40, 3).double().requires_grad_()
    seed = sqloss.draw_seed()

    def losses(loc):  # draws rows 0, 1, 2, ... in both passes, whichever they are
        return sqloss.student_t_rsample(5.0, loc, 1.0, seed=seed).square().sum(1)

    with pytest.raises(ValueError, match="fn: expected the same loss of a row without the other"):
        sqloss.tail_loss(losses, loc, alpha=0.8)
    with pytest.raises(ValueError, match="tail_backward: fn: expected the same loss of a row"):
        sqloss.tail_backward(losses, loc, alpha=0.8, chunk_size=5)
    unchecked = sqloss.tail_loss(losses, loc, alpha=0.8, check=False)
    dense = sqloss.cvar(losses(loc), 0.8)
    (got,), (expected,) = (torch.autograd.grad(v, loc) for v in (unchecked, dense))
    assert (got - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.randn_like(x),
        lambda x: F.dropout(x),
        lambda x: sqloss.student_t_rsample(5.0, x, 1.0),
    ],
)
def test_random_numbers_are_refused(draw):
    with pytest.raises(ValueError, match="expected no random numbers from torch's own generators"):
        sqloss.tail_loss(lambda x: draw(x).sum(1), torch.randn(9, 3), alpha=0.5)


# --- tail_loss: what is refused -------------------------------------------------------------------

COUPLED = {
    "in training mode, which normalises by the statistics": lambda: nn.BatchNorm1d(4),
    "track_running_stats=False": lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(),
    r"with p=0\.3, which draws random numbers": lambda: nn.Dropout(0.3),
    r"with p=0\.5, which": lambda: nn.AlphaDropout(),
    "in training mode, which draws random numbers": lambda: nn.RReLU(),
}


@pytest.mark.parametrize("why", COUPLED)
@pytest.mark.parametrize("closure", [False, True])
def test_a_module_that_couples_rows_is_named(why, closure):
    inner = COUPLED[why]()
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), inner), nn.Flatten(0))
    before = copy.deepcopy(model.state_dict())
    kind = type(inner).__name__
    with pytest.raises(ValueError, match=rf"got Sequential\.1\.1 \({kind}\), .*{why}"):
        sqloss.tail_loss((lambda x: model(x)) if closure else model, torch.randn(8, 4), alpha=0.5)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    nn.Linear(2, 2)(torch.randn(1, 2))  # no hook stays
    assert not nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize(
    "module, x",
    [
        (nn.LSTM(3, 3, num_layers=2, dropout=0.2), torch.randn(8, 5, 3)),
        (nn.TransformerEncoderLayer(4, 2, 8), torch.randn(8, 5, 4)),
    ],
)
def test_dropout_inside_other_modules_is_named(module, x):
    with pytest.raises(ValueError, match="which draws random numbers"):
        sqloss.tail_loss(lambda x: module(x).flatten(1).sum(1), x, alpha=0.5)


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm1d(4).eval(),
        nn.Dropout(0.3).eval(),
        nn.Dropout(0.0),
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.RReLU().eval(),
    ],
)
def test_modules_that_treat_rows_alone_are_fine(module):
    layer, x = nn.Linear(4, 4), torch.randn(30, 4)

    def losses(x):
        return module(layer(x)).square().sum(1)

    got, expected = (
        torch.autograd.grad(v, layer.weight)
        for v in (sqloss.tail_loss(losses, x, alpha=0.8), sqloss.cvar(losses(x), 0.8))
    )
    torch.testing.assert_close(got, expected)


def product(x, weight):
    """x @ weight.T, whose sums have another order for each number of rows."""
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(len(x)))
    return sum(x[:, i, None] * weight[:, i] for i in order.tolist())


def measurements(monkeypatch):
    """What rounding explains, in the calls that are still to come."""
    measure, measured = sqloss.tail._rounding_of, []
    monkeypatch.setattr(
        sqloss.tail, "_rounding_of", lambda *args: measured.append(measure(*args)) or measured[-1]
    )
    return measured


def regression_near_its_end(distance, dtype):
    x, w = torch.randn(80, 20).to(dtype), torch.randn(1, 20).double()
    y = (x.double() @ w.t()).squeeze(1).to(dtype)
    weight = (w + distance * torch.randn(1, 20)).to(dtype).requires_grad_()
    return (lambda x, y: (product(x, weight).squeeze(1) - y).square()), (x, y)


def classification_near_its_end(distance, dtype):
    """Of integers, whose losses are differences of logits."""
    x, mixed = torch.randint(20, (80,)), torch.linalg.qr(torch.randn(20, 20))[0]
    embedding = (mixed * -math.log(distance)).to(dtype).requires_grad_()
    weight = mixed.to(dtype)
    return (lambda x: F.cross_entropy(product(embedding[x], weight), x, reduction="none")), (x,)


@pytest.mark.parametrize(
    "make, dtype",
    [
        (regression_near_its_end, torch.float32),
        (regression_near_its_end, torch.float64),
        (regression_near_its_end, torch.bfloat16),
        (classification_near_its_end, torch.float32),
        (classification_near_its_end, torch.bfloat16),
    ],
)
def test_a_training_that_converges_is_not_stopped(make, dtype, monkeypatch):
    measured = measurements(monkeypatch)
    eps = torch.finfo(dtype).eps
    for distance in (1e-2, 100 * eps, 30 * eps, 10 * eps, 3 * eps, eps, eps / 10, 0.5**100):
        losses, tensors = make(distance, dtype)
        sqloss.tail_loss(losses, *tensors, alpha=0.8)
        sqloss.tail_backward(losses, *tensors, alpha=0.8, chunk_size=9)

    # Else this tests nothing. Logarithms and exponentials round as the CPU has them.
    assert measured or make is classification_near_its_end


def noise_of_ones_own(x):
    return x + torch.randn(x.shape, generator=GENERATOR)


GENERATOR = torch.Generator()
ATTENTION = nn.MultiheadAttention(4, 1)
COUPLINGS = {
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "softmax": lambda x: x.softmax(0) * len(x),
    "the mean": lambda x: x - x.mean(0),
    "attention": lambda x: x + ATTENTION(x, x, x, need_weights=False)[0],
    "batch norm and attention": lambda x: ATTENTION(
        *3 * [F.batch_norm(x, None, None, training=True)[:, None]], need_weights=False
    )[0].squeeze(1),
    "a generator": noise_of_ones_own,
    "noise by position": lambda x: sqloss.student_t_rsample(5.0, x, 1.0, seed=torch.tensor(7)),
}


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_rows_that_depend_on_others_are_found_at_any_scale_of_losses(coupling):
    """And where losses are close to 0, if not by rounding alone."""
    couple, x = COUPLINGS[coupling], torch.randn(60, 4)
    for scale in (1.0, 1e-12, 1e-30, 1e12):
        with pytest.raises(ValueError, match="expected the same loss of a row without the other"):
            sqloss.tail_loss(lambda x: scale * couple(x).square().mean(1), x, alpha=0.8)  # noqa: B023
    with pytest.raises(ValueError, match="expected the same loss of a row without the other"):
        sqloss.tail_backward(lambda x: 1e-12 * couple(x).abs().mean(1), x, alpha=0.8, chunk_size=7)
    with pytest.raises(ValueError, match="rounding explains"):
        sqloss.tail_loss(lambda x: (1 + 1e-3 * couple(x) - 1).square().mean(1), x, alpha=0.8)


def test_measuring_rounding_leaves_no_trace():
    """In the random numbers, or in the weights that autocast has cast."""
    model, x, seen = nn.Linear(8, 1), torch.randn(64, 8), []

    def losses(x):
        seen.append(torch.is_grad_enabled())
        return model(x).squeeze(1).square() * len(x)

    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="rounding explains"):
            sqloss.tail_loss(losses, x, alpha=0.8)
        assert seen == [False, True, False, False, False]
        gradients_of(model, model(x).sum().backward)
    assert torch.equal(state, torch.get_rng_state())


def rounded(x):
    """Of other numbers of rows in another way."""
    return (x.square().sum(1) + x.shape[0] * 1e5) - x.shape[0] * 1e5


def coupled(x):
    return x.square().sum(1) * x.shape[0]


@pytest.mark.parametrize(
    "way",
    [
        lambda fn, x: torch.func.grad(partial(sqloss.tail_loss, fn, alpha=0.8))(x),
        lambda fn, x: torch.func.hessian(partial(sqloss.tail_loss, fn, alpha=0.8))(x),
        lambda fn, x: torch.func.jvp(partial(sqloss.tail_loss, fn, alpha=0.8), (x,), (x,)),
        lambda fn, x: sqloss.tail_loss(
            torch.compile(fn, fullgraph=True, backend="eager"), x, alpha=0.8
        ),
    ],
    ids=["grad", "hessian", "jvp", "compiled"],
)
def test_rounding_is_measured_in_transforms_and_of_compiled_functions(way, monkeypatch):
    x, measured = 0.1 * torch.randn(20, 4), measurements(monkeypatch)
    way(rounded, x)
    assert measured
    with pytest.raises(ValueError, match="rounding explains"):
        way(coupled, x)


def test_measuring_rounding_moves_no_probability_out_of_its_range():
    def losses(x):
        return len(x) * F.binary_cross_entropy(x, x.round(), reduction="none")

    x = torch.cat([torch.ones(30), torch.full((30,), 0.6)]).requires_grad_()
    with pytest.raises(ValueError, match="rounding explains"):
        sqloss.tail_loss(losses, x, alpha=0.7)


def test_attention_between_rows_is_found():
    attention = nn.MultiheadAttention(4, 1)

    def losses(x):
        return attention(x, x, x, need_weights=False)[0].square().sum(1) + x.square().sum(1)

    x = 10 * torch.randn(30, 4)
    with pytest.raises(ValueError, match="no dependence on the batch"):
        sqloss.tail_loss(losses, x, alpha=0.8)


def test_other_threads_are_left_alone():
    """A batch norm may train elsewhere while the rows are scored."""
    other, batch = nn.BatchNorm1d(3), torch.randn(5, 3)

    def losses(x):
        thread = threading.Thread(target=other, args=(batch,))
        thread.start()
        thread.join()
        return x.square()

    sqloss.tail_loss(losses, torch.randn(9), alpha=0.5)
    assert other.num_batches_tracked >= 1


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda x: sqloss.tail_loss(3, x, alpha=0.5),
            TypeError,
            "tail_loss: fn: expected a callable, got int",
        ),
        (
            lambda x: sqloss.tail_loss(torch.sum, alpha=0.5),
            TypeError,
            "tail_loss: tensors: expected at least one, got none",
        ),
        (
            lambda x: sqloss.tail_loss(torch.sum, [1.0], alpha=0.5),
            TypeError,
            "tail_loss: tensors: expected a tensor, got list",
        ),
        (
            lambda x: sqloss.tail_loss(torch.sum, x, x[:3], alpha=0.5),
            ValueError,
            r"tail_loss: tensors: expected the same number of rows, got shapes \(8,\), \(3,\)",
        ),
        (
            lambda x: sqloss.tail_loss(torch.sum, x[0], alpha=0.5),
            ValueError,
            "tail_loss: tensors: expected the same number of rows",
        ),
        (
            lambda x: sqloss.tail_loss(torch.sum, x[:0], alpha=0.5),
            ValueError,
            "tail_loss: tensors: expected at least one row",
        ),
        (
            lambda x: sqloss.tail_loss(torch.mean, x, alpha=0.5),
            ValueError,
            r"tail_loss: fn: expected one loss for each row .*, shape \(8,\), got \(\)",
        ),
        (
            lambda x: sqloss.tail_loss(lambda x: x[:, None], x, alpha=0.5),
            ValueError,
            r"tail_loss: fn: expected one loss for each row .*, got \(8, 1\)",
        ),
        (
            lambda x: sqloss.tail_loss(lambda x: None, x, alpha=0.5),
            TypeError,
            "tail_loss: fn: expected to return a tensor of losses, got NoneType",
        ),
        (
            lambda x: sqloss.tail_loss(torch.Tensor.long, x, alpha=0.5),
            TypeError,
            "tail_loss: fn: expected a dense tensor of float16, .* got torch.int64",
        ),
        (
            lambda x: sqloss.tail_loss(torch.abs, x),
            TypeError,
            "tail_loss: alpha, tail_fraction: expected one of them, got neither",
        ),
        (
            lambda x: sqloss.tail_backward(torch.abs, x, alpha=0.5, chunk_size=0),
            ValueError,
            "tail_backward: chunk_size: expected at least 1, got 0",
        ),
        (
            lambda x: sqloss.tail_backward(torch.abs, x, alpha=0.5, chunk_size=2.0),
            TypeError,
            "tail_backward: chunk_size: expected an int, got float",
        ),
        (
            lambda x: sqloss.tail_backward(torch.abs, x, alpha=0.5, chunk_size=2, gradient="1"),
            TypeError,
            "tail_backward: gradient: expected a number or a tensor without dimensions, got str",
        ),
        (
            lambda x: sqloss.tail_backward(torch.abs, x, alpha=0.5, chunk_size=2, gradient=x[:4]),
            ValueError,
            r"tail_backward: gradient: expected a number or .*, got shape \(4,\)",
        ),
    ],
)
def test_errors_of_losses(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(8))
