"""The fused losses against torch.nn.functional, their twins, and every way torch calls them."""

import math
import random
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sqloss
from sqloss import _ops, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan


# --- what is tested, and against what -------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A loss with its options, and torch's function of the same elements."""

    name: str  # sqloss.losses.<name> and sqloss.cvar_<name>
    torch_function: Callable[..., Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    weights: tuple[str, ...] = ()

    def draw(self, *shape, dtype=torch.float64, device="cpu"):
        """Tensors by the names of their arguments."""
        bce = self.name == "binary_cross_entropy_with_logits"
        tensors = {"input": torch.randn(shape, dtype=torch.float64)}
        tensors["target"] = (torch.rand if bce else torch.randn)(shape, dtype=torch.float64)
        for name in self.weights:
            tensors[name] = torch.rand(shape, dtype=torch.float64) + 0.1
        return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}

    def losses(self, tensors, **options):
        return getattr(sqloss.losses, self.name)(**tensors, **self.options, **options)

    def cvar(self, tensors, alpha, **options):
        function = getattr(sqloss, f"cvar_{self.name}")
        return function(**tensors, **self.options, alpha=alpha, **options)

    def elements(self, tensors):
        """The elements' losses in float64."""
        given_ = {name: tensor.double() for name, tensor in tensors.items()}
        weight = given_.pop("weight", None)
        elements = self.torch_function(**given_, **self.options, reduction="none")
        return elements if weight is None else elements * weight

    def differentiable(self, tensors):
        return [name for name in tensors if name in ("input", "target", "var")]


CASES = {
    "bce": Case("binary_cross_entropy_with_logits", F.binary_cross_entropy_with_logits),
    "bce, weighted": Case(
        "binary_cross_entropy_with_logits",
        F.binary_cross_entropy_with_logits,
        weights=("weight", "pos_weight"),
    ),
    "mse": Case("mse_loss", F.mse_loss),
    "mse, weighted": Case("mse_loss", F.mse_loss, weights=("weight",)),
    "smooth l1": Case("smooth_l1_loss", F.smooth_l1_loss, {"beta": 0.7}),
    "l1": Case("smooth_l1_loss", F.smooth_l1_loss, {"beta": 0.0}),
    "huber": Case("smooth_l1_loss", F.huber_loss, {"delta": 0.6}, ("weight",)),
    "gaussian nll": Case("gaussian_nll_loss", F.gaussian_nll_loss, {"full": True}, ("var",)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def by_samples(elements, reduction, sample_dims):
    rows = elements.reshape(*elements.shape[:sample_dims], -1)
    return rows.mean(-1) if reduction == "mean" else rows.sum(-1)


def with_gradients(tensors, names):
    return {name: tensor.detach().requires_grad_(name in names) for name, tensor in tensors.items()}


def tolerance(dtype, scale):
    """Of float32 (or float64) arithmetic on numbers up to scale, rounded to the dtype."""
    if dtype == torch.float64:
        return {"rtol": 1e-10, "atol": 1e-12 * scale}
    info = torch.finfo(dtype)
    return {"rtol": max(4e-6, info.eps), "atol": 4e-6 * scale + info.smallest_normal * info.eps}


def assert_matches_torch(case, tensors, alpha, reduction="mean", sample_dims=1):
    """Losses, value and all gradients equal those of torch's elements in float64."""
    options = {"reduction": reduction, "sample_dims": sample_dims}
    names = case.differentiable(tensors)
    leaves = with_gradients(tensors, names)
    value, losses = case.cvar(leaves, alpha, return_losses=True, **options)
    dtype = reference.losses_dtype(*tensors.values())
    assert value.dtype == losses.dtype == dtype and value.shape == ()

    doubles = with_gradients({k: v.double() for k, v in tensors.items()}, names)
    elements = case.elements(doubles)
    expected = by_samples(elements, reduction, sample_dims)
    scale = by_samples(elements.detach().abs(), reduction, sample_dims).max().item()
    torch.testing.assert_close(losses.double(), expected.detach(), **tolerance(dtype, scale))
    eps = torch.finfo(dtype).eps  # one operator may add losses in another order than two
    torch.testing.assert_close(value, sqloss.cvar(losses, alpha), rtol=eps, atol=eps * scale)
    assert torch.equal(losses, case.losses(tensors, **options))

    q = sqloss.tail_weights(losses, alpha)
    gradients = torch.autograd.grad(value, [leaves[name] for name in names])
    wanted = torch.autograd.grad(expected, [doubles[name] for name in names], q.double())
    for name, gradient, of_torch in zip(names, gradients, wanted, strict=True):
        assert gradient.dtype == tensors[name].dtype and gradient.shape == tensors[name].shape
        rounding = tolerance(gradient.dtype, of_torch.abs().max().item())
        torch.testing.assert_close(gradient.double(), of_torch, **rounding)
        if gradient.shape[:sample_dims] == q.shape:
            assert not gradient[q == 0].any(), "a sample outside of the tail has a gradient"


def assert_cross_entropy_matches_torch(tensors, alpha, **options):
    names = [name for name in ("input", "target") if tensors[name].is_floating_point()]
    leaves = with_gradients(tensors, names)
    value, losses = sqloss.cvar_cross_entropy(**leaves, **options, alpha=alpha, return_losses=True)
    dtype = reference.losses_dtype(*tensors.values())
    assert value.dtype == losses.dtype == dtype and value.shape == ()

    doubles = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    doubles = with_gradients(doubles, names)
    expected = F.cross_entropy(**doubles, **options, reduction="none")
    scale = expected.detach().abs().max().item()
    torch.testing.assert_close(losses.double(), expected.detach(), **tolerance(dtype, scale))
    assert torch.equal(losses, sqloss.losses.cross_entropy(**tensors, **options))
    mask = None
    if not tensors["target"].is_floating_point():
        mask = tensors["target"] != options.get("ignore_index", -100)
    eps = torch.finfo(dtype).eps  # as above
    tail = sqloss.cvar(losses, alpha, mask=mask)
    torch.testing.assert_close(value, tail, rtol=eps, atol=eps * scale)

    q = sqloss.tail_weights(losses, alpha, mask=mask)
    gradients = torch.autograd.grad(value, [leaves[name] for name in names])
    wanted = torch.autograd.grad(expected, [doubles[name] for name in names], q.double())
    for name, gradient, of_torch in zip(names, gradients, wanted, strict=True):
        assert gradient.dtype == tensors[name].dtype and gradient.shape == tensors[name].shape
        rounding = tolerance(gradient.dtype, of_torch.abs().max().item())
        torch.testing.assert_close(gradient.double(), of_torch, **rounding)
        by_target = gradient.movedim(1, -1) if gradient.dim() > 1 else gradient
        assert not by_target[q == 0].any(), "a target outside of the tail has a gradient"


# --- values and gradients -------------------------------------------------------------------------


SHAPES = [
    *((rows, size) for rows in (1, 2, 1000) for size in (1, 2, 15, 16, 17, 31)),
    *((rows, size) for rows in (1, 3) for size in (1023, 1024, 1025, 3000)),
    *((2, size) for size in (784, 8192, 8193, 70_001)),
    (50, 1025),
    (20_001, 1),
    (9000, 40),
]


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_torch_by_size(device, case, dtype):
    for shape in SHAPES:
        tensors = case.draw(*shape, dtype=dtype, device=device)
        assert_matches_torch(case, tensors, alpha=0.7)


def test_samples_of_millions_of_elements(device):
    tensors = CASES["mse"].draw(2, 5_000_001, dtype=torch.float32, device=device)
    assert_matches_torch(CASES["mse"], tensors, 0.5)


@every_case
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_torch_by_alpha_reduction_and_sample_dims(device, case, reduction):
    tensors = case.draw(5, 4, 3, 2, device=device)
    for sample_dims in (1, 2, 3, 4):
        for alpha in (0.0, 0.35, 0.8, 0.999):
            assert_matches_torch(case, tensors, alpha, reduction, sample_dims)
    assert_matches_torch(case, case.draw(7, device=device), 0.5, reduction)


@every_case
def test_alpha_0_is_torchs_mean(device, case):
    tensors = case.draw(6, 5, 4, device=device)
    torch.testing.assert_close(case.cvar(tensors, 0.0), case.elements(tensors).mean())
    fraction = getattr(sqloss, f"cvar_{case.name}")(**tensors, **case.options, tail_fraction=1.0)
    assert torch.equal(fraction, case.cvar(tensors, 0.0))


@every_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_by_dtype(device, case, dtype):
    for shape in ((30, 17), (3, 1500)):
        assert_matches_torch(case, case.draw(*shape, dtype=dtype, device=device), 0.6)
        assert_matches_torch(case, case.draw(*shape, dtype=dtype, device=device), 0.6, "sum")


@every_case
@pytest.mark.parametrize("of_input", DTYPES)
@pytest.mark.parametrize("of_target", DTYPES)
def test_torch_by_mixed_dtypes(device, case, of_input, of_target):
    """As the logits of a model in bfloat16 and the pixels of a data set in float32."""
    tensors = case.draw(20, 33, dtype=of_target, device=device)
    tensors["input"] = tensors["input"].to(of_input)
    assert_matches_torch(case, tensors, 0.6)


@every_case
def test_autocast_changes_nothing(device, case):
    tensors = case.draw(20, 33, dtype=torch.bfloat16, device=device)
    expected = case.cvar(tensors, 0.6)
    leaves = with_gradients(tensors, ["input"])
    with torch.autocast(device.type, torch.bfloat16):
        value = case.cvar(leaves, 0.6)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    value.backward()
    assert leaves["input"].grad.dtype == torch.bfloat16


@every_case
def test_half_precision_does_not_overflow(device, case):
    """70,000 elements of loss 1 and more sum to more than float16 holds."""
    tensors = case.draw(2, 70_000, dtype=torch.float16, device=device)
    tensors["input"] += 3
    total = case.cvar(tensors, 0.5, reduction="sum")
    assert 1e4 < total < 1e7 and total.dtype == torch.float32


def views(device):
    """Pairs of a view and what it should be told to be a view of, of every kind."""
    base = torch.rand(12, 10, 8, device=device)
    image = torch.rand(4, 3, 5, 6, device=device)
    return {
        "transposed": base.transpose(0, 2),
        "permuted": base.permute(1, 2, 0),
        "every second": base[::2, 1::3, ::4],
        "offset": base[3:, 2:, 1:],
        "narrow": base.narrow(1, 2, 5),
        "expanded rows": base[:1].expand(12, 10, 8),
        "expanded columns": base[:, :1, :].expand(12, 10, 8),
        "expanded scalar": base[0, 0, 0].expand(3, 4, 5),
        "channels last": image.contiguous(memory_format=torch.channels_last),
        "flipped diagonal": base.diagonal(dim1=0, dim2=2).t().flip(0),
        "unfolded": torch.rand(40, device=device).unfold(0, 8, 3),
        "rows of 2,000 apart": torch.rand(2000, 6, device=device).t(),
    }


@every_case
@pytest.mark.parametrize("view", views("cpu"))
def test_torch_by_strides(device, case, view):
    strided = views(device)[view]
    tensors = case.draw(*strided.shape, dtype=torch.float32, device=device)
    expected = case.losses({**tensors, "input": strided.contiguous()})
    torch.testing.assert_close(case.losses({**tensors, "input": strided}), expected)
    for name in tensors:
        assert_matches_torch(case, {**tensors, name: strided}, 0.6)
    assert_matches_torch(case, dict.fromkeys(tensors, strided), 0.6, sample_dims=2)


@every_case
def test_gradient_reaches_the_base_of_a_view(device, case):
    tensors = case.draw(6, 8, device=device)
    base = torch.zeros(8, 12, dtype=torch.float64, device=device, requires_grad=True)
    case.cvar({**tensors, "input": base.t()[::2] + 0}, 0.5).backward()
    through_a_copy = base.grad.clone()
    base.grad = None
    case.cvar({**tensors, "input": base.t()[::2]}, 0.5).backward()
    assert torch.equal(base.grad, through_a_copy) and base.grad.any()


def test_weights_broadcast(device):
    tensors = CASES["bce"].draw(6, 3, 4, 5, device=device)
    for shape in [(6, 3, 4, 5), (6, 1, 1, 1), (3, 1, 1), (5,), (1,), (), (6, 1, 4, 1)]:
        weight = torch.rand(shape, device=device).float()
        pos_weight = torch.rand(shape, device=device).double() * 3
        case = Case(CASES["bce"].name, F.binary_cross_entropy_with_logits)
        expanded = {"weight": weight.expand(6, 3, 4, 5), "pos_weight": pos_weight}
        assert_matches_torch(case, {**tensors, **expanded}, 0.5)
        value = case.cvar({**tensors, "weight": weight, "pos_weight": pos_weight}, 0.5)
        assert torch.equal(value, case.cvar({**tensors, **expanded}, 0.5))


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3, 1), (4, 1, 5), (1, 3, 5), (4, 3)])
@pytest.mark.parametrize("full", [False, True])
def test_var_broadcasts_as_in_torch(device, shape, full):
    case = Case("gaussian_nll_loss", F.gaussian_nll_loss, {"full": full, "eps": 0.3})
    tensors = case.draw(4, 3, 5, device=device)
    var = torch.rand(shape, device=device).double()  # some of it below eps
    assert_matches_torch(case, {**tensors, "var": var}, 0.4)


@pytest.mark.parametrize("var", [0.0, 0.5, 1, 2])
def test_var_may_be_a_number(device, var):
    case = CASES["gaussian nll"]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        tensors = case.draw(4, 5, dtype=dtype, device=device) | {"var": var}
        tensors = {k: v for k, v in tensors.items() if k != "var"}
        expanded = torch.full((4, 5), float(var), device=device)
        expected = case.cvar({**tensors, "var": expanded}, 0.5)
        got = case.cvar({**tensors, "var": var}, 0.5)
        assert torch.equal(got, expected) and got.dtype == expected.dtype


def broadcast_cases():
    """Shapes of input, target and var, most of which broadcast."""
    draw = random.Random(0)

    def variant(shape):
        shape = [1 if draw.random() < 0.3 else size for size in shape]
        shape = [draw.choice([0, 4]) if draw.random() < 0.05 else size for size in shape]
        if draw.random() < 0.25:
            shape = shape[: len(shape) - 1] if draw.random() < 0.3 else shape[1:]
        return tuple(shape)

    yield (5, 3), (5, 1), (5, 3)
    yield (2, 5, 3), (5, 3), (2, 5)
    yield (5,), (1,), (5,)
    yield (1, 3), (1, 3), (0, 1)
    for _ in range(300):
        shape = [draw.randint(1, 3) for _ in range(draw.randint(1, 3))]
        input = tuple(shape) if draw.random() < 0.7 else variant(shape)
        yield input, variant(shape), variant(shape) if draw.random() < 0.5 else input


@pytest.mark.parametrize("case", ["bce", "mse", "smooth l1", "l1", "huber", "gaussian nll"])
def test_what_torch_broadcasts_is_broadcast(device, case):
    """And what it refuses is refused; where it warns there is a warning."""
    case = CASES[case]
    names = ["input", "target"] + ["var"] * (case.name == "gaussian_nll_loss")
    accepted = refused = 0
    for shapes in broadcast_cases():
        leaves = {
            name: torch.rand(shape, dtype=torch.float64, device=device, requires_grad=True)
            for name, shape in zip(names, shapes, strict=False)
        }
        try:
            with warnings.catch_warnings(record=True) as of_torch:
                warnings.simplefilter("always")
                elements = case.torch_function(**leaves, **case.options, reduction="none")
        except (ValueError, RuntimeError):
            refused += 1
            with pytest.raises(ValueError, match=f"^{case.name}: (target|var): expected"):
                case.losses(leaves)
            continue
        if elements.dim() == 0:
            continue
        accepted += 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses = case.losses(leaves, reduction="sum")
        assert len(caught) == len(of_torch) and all(w.filename == __file__ for w in caught)
        expected = elements.unsqueeze(-1).flatten(1).sum(1)
        torch.testing.assert_close(losses, expected)
        inputs = [leaves[name] for name in names]
        grad = torch.rand_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(losses, inputs, grad), torch.autograd.grad(expected, inputs, grad)
        )
    assert accepted > 50 and refused > 20


def test_a_tail_of_what_is_broadcast(device):
    case = CASES["gaussian nll"]
    tensors = case.draw(6, 5, 4, device=device)
    tensors["target"], tensors["var"] = tensors["target"][0, :, :1], tensors["var"][:, :, 0]
    names = list(tensors)
    leaves = with_gradients(tensors, names)
    inputs = tuple(leaves.values())

    def value(*given_):
        return case.cvar(dict(zip(names, given_, strict=True)), 0.6)

    expected = sqloss.cvar(by_samples(case.elements(leaves), "mean", 1), 0.6)
    torch.testing.assert_close(value(*inputs), expected)
    torch.testing.assert_close(
        torch.autograd.grad(value(*inputs), inputs), torch.autograd.grad(expected, inputs)
    )
    assert torch.autograd.gradcheck(value, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(value, inputs, check_fwd_over_rev=True)
    half = [tensor.detach().half() for tensor in inputs]
    torch.testing.assert_close(value(*half).double(), expected, rtol=1e-3, atol=1e-3)
    rows = [torch.stack([tensor.detach(), 2 * tensor.detach()]) for tensor in inputs]
    alone = torch.stack([value(*given_) for given_ in zip(*rows, strict=True)])
    torch.testing.assert_close(torch.func.vmap(value)(*rows), alone)


def test_gradients_of_what_is_broadcast_are_summed_in_float32():
    """In half precision their parts overflow, and cancel to NaN."""
    x = torch.zeros(1, 1, dtype=torch.float16, requires_grad=True)
    target, var = torch.tensor([[1.0], [-1.0], [0.01]]), torch.full((1, 1), 1e-5)
    (gradient,) = torch.autograd.grad(sqloss.losses.gaussian_nll_loss(x, target, var).sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, -1000.0))


def test_what_is_broadcast_is_not_copied(peak_memory):
    x, y = torch.randn(64, 4096), torch.randn(64, 1)
    step = lambda: sqloss.cvar_gaussian_nll_loss(x, y, x.new_ones(64), alpha=0.5)  # noqa: E731
    assert peak_memory(step) < x.nbytes / 16


def test_compiled_what_is_broadcast():
    x, y = torch.randn(5, 3), torch.randn(3)
    compiled = torch.compile(
        lambda x, y: sqloss.cvar_mse_loss(x, y, alpha=0.5), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x, y), sqloss.cvar((x - y).square().mean(1), 0.5))


def test_a_negative_variance_counts_as_eps(device):
    mean, seen = torch.zeros(3, 1, device=device), torch.ones(3, 1, device=device)
    var = torch.tensor([[-1.0], [0.5], [0.1]], device=device)
    losses = sqloss.losses.gaussian_nll_loss(mean, seen, var, eps=0.5)
    expected = F.gaussian_nll_loss(mean, seen, var.clamp(min=0.5), reduction="none").squeeze(1)
    torch.testing.assert_close(losses, expected)


def test_empty_samples(device):
    tensors = CASES["mse"].draw(3, 0, device=device)
    assert sqloss.losses.mse_loss(**tensors, reduction="sum").tolist() == [0, 0, 0]
    assert sqloss.losses.mse_loss(**tensors).isnan().all()
    leaf = tensors["input"].requires_grad_()
    for reduction in ("mean", "sum"):
        value = sqloss.cvar_mse_loss(leaf, tensors["target"], alpha=0.5, reduction=reduction)
        assert value.isnan() if reduction == "mean" else value == 0
        assert torch.autograd.grad(value, leaf)[0].shape == (3, 0)


@every_case
def test_no_samples_have_no_losses(device, case):
    leaves = with_gradients(case.draw(0, 5, device=device), ["input"])
    losses = case.losses(leaves)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert leaves["input"].grad.shape == (0, 5)


# --- cross-entropy --------------------------------------------------------------------------------


def draw_classes(*shape, dtype=torch.float64, device="cpu", probabilities=False, weight=False):
    """input [N, C, ...] and target, and maybe weight."""
    tensors = {"input": 3 * torch.randn(shape, dtype=torch.float64)}
    if probabilities:
        tensors["target"] = torch.rand(shape, dtype=torch.float64)
    else:
        tensors["target"] = torch.randint(shape[1], (shape[0], *shape[2:]))
    if weight:
        tensors["weight"] = torch.rand(shape[1], dtype=torch.float64) + 0.1
    return {
        k: v.to(device, dtype) if v.is_floating_point() else v.to(device)
        for k, v in tensors.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probabilities", [False, True])
def test_cross_entropy_by_number_of_classes(device, dtype, probabilities):
    for n in (1, 2, 20):
        for classes in (1, 2, 3, 15, 16, 17, 31, 1000, 1025, 3000):
            tensors = draw_classes(
                n, classes, dtype=dtype, device=device, probabilities=probabilities
            )
            assert_cross_entropy_matches_torch(tensors, 0.7)
    tensors = draw_classes(2, 50_257, dtype=dtype, device=device, probabilities=probabilities)
    assert_cross_entropy_matches_torch(tensors, 0.3)


def test_cross_entropy_of_many_samples(device):
    for options in ({}, {"label_smoothing": 0.1}):
        tensors = draw_classes(40_003, 21, dtype=torch.float32, device=device)
        assert_cross_entropy_matches_torch(tensors, 0.9, **options)


@pytest.mark.parametrize(
    "shape",
    [(40, 5), (6, 5, 7), (3, 5, 4, 6), (2, 5, 3, 2, 4), (2, 19, 9, 13), (2, 70, 4, 5), (3, 150, 2)],
)
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("probabilities", [False, True])
def test_cross_entropy_by_shape_and_option(device, shape, weight, label_smoothing, probabilities):
    for dtype in (torch.float64, torch.float32):
        tensors = draw_classes(
            *shape, dtype=dtype, device=device, weight=weight, probabilities=probabilities
        )
        if not probabilities:
            tensors["target"][0, ...] = -100
        for alpha in (0.0, 0.45, 0.9):
            assert_cross_entropy_matches_torch(tensors, alpha, label_smoothing=label_smoothing)


@pytest.mark.parametrize("probabilities", [False, True])
def test_cross_entropy_of_one_sample_without_a_batch(device, probabilities):
    tensors = draw_classes(1, 6, device=device, probabilities=probabilities)
    tensors = {name: tensor.squeeze(0) for name, tensor in tensors.items()}
    extra = torch.tensor(2.0, device=device)
    value = sqloss.cvar_cross_entropy(**tensors, alpha=0.5)
    torch.testing.assert_close(value, F.cross_entropy(**tensors))
    assert sqloss.losses.cross_entropy(**tensors).shape == ()
    value, losses = sqloss.cvar_cross_entropy(**tensors, alpha=0.5, extra=extra, return_losses=True)
    assert losses.shape == () and losses == value == F.cross_entropy(**tensors) + 2
    assert_cross_entropy_matches_torch(tensors, 0.5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int16, torch.int8])
def test_cross_entropy_by_dtype_of_the_classes(device, dtype):
    tensors = draw_classes(30, 7, device=device)
    expected = sqloss.cvar_cross_entropy(**tensors, alpha=0.5)
    tensors["target"] = tensors["target"].to(dtype)
    assert torch.equal(sqloss.cvar_cross_entropy(**tensors, alpha=0.5), expected)


@pytest.mark.parametrize("of_input", DTYPES)
@pytest.mark.parametrize("of_others", DTYPES)
def test_cross_entropy_by_mixed_dtypes(device, of_input, of_others):
    for probabilities in (False, True):
        tensors = draw_classes(
            9, 33, dtype=of_others, device=device, weight=True, probabilities=probabilities
        )
        tensors["input"] = tensors["input"].to(of_input)
        assert_cross_entropy_matches_torch(tensors, 0.6, label_smoothing=0.2)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
        lambda x: torch.cat([x, x], dim=1)[:, 7:],
        lambda x: torch.cat([x[0, 0, 0, :1], x.flatten()])[1:].view_as(x),
        lambda x: x[:1].expand_as(x),
        lambda x: x[:, :1].expand_as(x),
        lambda x: x[:, :, :1].expand_as(x),
        lambda x: x.flip(0).movedim(0, 3).contiguous().movedim(3, 0),
    ],
)
def test_cross_entropy_by_strides(device, view):
    for probabilities in (False, True):
        tensors = draw_classes(
            4, 7, 6, 8, dtype=torch.float32, device=device, probabilities=probabilities
        )
        assert_cross_entropy_matches_torch({**tensors, "input": view(tensors["input"])}, 0.6)
    assert_cross_entropy_matches_torch({**tensors, "target": view(tensors["target"])}, 0.6)
    classes = draw_classes(4, 7, 6, 8, device=device)
    for target in (
        classes["target"].transpose(1, 2).contiguous().transpose(1, 2),
        classes["target"][:, :1].expand(4, 6, 8),
        classes["target"].repeat(1, 1, 2)[..., ::2],
    ):
        weight = torch.rand(14, device=device)[::2]
        assert_cross_entropy_matches_torch({**classes, "target": target, "weight": weight}, 0.6)


def test_ignored_targets_are_not_there(device):
    tensors = draw_classes(8, 5, 3, device=device)
    ignored = torch.rand(8, 3, device=device) < 0.4
    ignored[2] = True  # all of a sample
    tensors["target"][ignored] = 4
    kept = ~ignored & (tensors["target"] != 4)
    leaves = with_gradients({"input": tensors["input"]}, ["input"]) | {"target": tensors["target"]}
    value, losses = sqloss.cvar_cross_entropy(
        **leaves, alpha=0.5, ignore_index=4, return_losses=True
    )
    alone = F.cross_entropy(
        tensors["input"].movedim(1, -1)[kept], tensors["target"][kept], reduction="none"
    )
    torch.testing.assert_close(value, sqloss.cvar(alone, 0.5))
    torch.testing.assert_close(losses[kept], alone)
    assert not losses[~kept].any()
    value.backward()
    assert not leaves["input"].grad.movedim(1, -1)[~kept].any()


def test_ignored_logits_are_not_looked_at(device):
    tensors = draw_classes(4, 3, device=device)
    tensors["input"][1] = NAN
    tensors["target"][1] = -100
    leaf = tensors["input"].requires_grad_()
    value = sqloss.cvar_cross_entropy(leaf, tensors["target"], alpha=0.0)
    value.backward()
    assert value.isfinite() and leaf.grad.isfinite().all() and not leaf.grad[1].any()
    extra = torch.tensor([1.0, NAN, 3.0, 2.0], device=device)
    assert sqloss.cvar_cross_entropy(leaf, tensors["target"], alpha=0.5, extra=extra).isfinite()


def test_an_ignore_index_may_be_a_class_or_far_away(device):
    tensors = draw_classes(40, 6, device=device)
    assert_cross_entropy_matches_torch(tensors, 0.5, ignore_index=2)
    tensors["target"][::3] = -1
    assert_cross_entropy_matches_torch(tensors, 0.5, ignore_index=-1)
    tensors["target"][::3] = 255
    assert_cross_entropy_matches_torch(tensors, 0.5, ignore_index=255, label_smoothing=0.1)
    as_bytes = {**tensors, "target": tensors["target"].to(torch.uint8)}
    assert_cross_entropy_matches_torch(tensors, 0.5, ignore_index=255)
    assert torch.equal(
        sqloss.cvar_cross_entropy(**as_bytes, alpha=0.5, ignore_index=255),
        sqloss.cvar_cross_entropy(**tensors, alpha=0.5, ignore_index=255),
    )


def test_all_targets_ignored_is_an_error(kernel_raises):
    def call(x, target):
        return sqloss.cvar_cross_entropy(x, target, alpha=0.5)

    message = (
        "^cvar_cross_entropy: target, ignore_index: expected at least one target that is not "
        "ignored, got none$"
    )
    for f in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        with kernel_raises(ValueError, match=message):
            f(torch.randn(3, 4), torch.full((3,), -100))


@pytest.mark.parametrize("shape", [(3, 4), (3, 40), (3, 4, 5)])
def test_ignored_targets_lose_nothing(device, shape):
    tensors = draw_classes(*shape, device=device)
    tensors["input"][1] = NAN
    leaf = tensors["input"].requires_grad_()
    losses = sqloss.losses.cross_entropy(leaf, tensors["target"].fill_(-100))
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    assert not losses.any() and not gradient.any()


@pytest.mark.parametrize("bad", [-1, 4, 7, -99, 2**40])
def test_a_class_out_of_range_is_an_index_error(kernel_raises, bad):
    x, target = torch.randn(70, 4, 3), torch.zeros(70, 3, dtype=torch.int64)
    target[69, 2] = bad
    last = x.movedim(1, 2).contiguous().movedim(2, 1)
    message = (
        r"^{}: target: expected class indices in \[0, 4\) or ignore_index \(-100\), "
        f"got {bad}$"
    )

    def tail(x, target):
        return sqloss.cvar_cross_entropy(x, target, alpha=0.5)

    for name, f, logits in (
        ("cvar_cross_entropy", tail, x),
        ("cvar_cross_entropy", torch.compile(tail, fullgraph=True, backend="aot_eager"), x),
        ("cross_entropy", sqloss.losses.cross_entropy, x),
        ("cross_entropy", sqloss.losses.cross_entropy, last),
    ):
        with kernel_raises(IndexError, match=message.format(name)):
            f(logits, target)
    with pytest.raises(IndexError, match=message.format("cross_entropy")):
        reference.cross_entropy_losses(x, target, None, -100, 0.0, "cross_entropy")


# --- values that break naive versions -------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_any_size(device, dtype):
    logits = torch.tensor([0.0, 1e-4, -1e-4, 20, -20, 100, -100, 1e4, -1e4], device=device)
    if dtype != torch.float16:
        logits = torch.cat([logits, torch.tensor([1e30, -1e30], device=device)])
    logits = logits.to(dtype).repeat(3).unsqueeze(1)
    target = torch.tensor([0.0, 0.3, 1.0], device=device).to(dtype)
    target = target.repeat_interleave(len(logits) // 3).unsqueeze(1)
    assert_matches_torch(CASES["bce"], {"input": logits, "target": target}, 0.0)
    errors = {"input": logits, "target": torch.zeros_like(logits)}
    if dtype != torch.float16:
        errors["input"] = logits.clamp(-1e15, 1e15)  # whose square float32 holds
    for name in ("mse", "smooth l1", "l1"):
        for element in range(len(logits)):
            one = {name: tensor[element : element + 1] for name, tensor in errors.items()}
            assert_matches_torch(CASES[name], one, 0.0)


def test_a_loss_is_finite_where_only_the_square_is_not(device):
    """Of 1e25 in float32; torch's are infinite."""
    x, zero = torch.tensor([[1e25]], device=device), torch.zeros(1, 1, device=device)
    smooth = sqloss.losses.smooth_l1_loss(x, zero, beta=1e30)
    torch.testing.assert_close(smooth, torch.tensor([0.5e20], device=device))
    likely = sqloss.losses.gaussian_nll_loss(x, zero, var=1e30)
    torch.testing.assert_close(likely, torch.tensor([0.5e20], device=device))


def test_a_loss_is_finite_where_only_the_sum_is_not(device):
    x = torch.full((3, 40), 1.5e19, device=device)
    losses = sqloss.losses.mse_loss(x, torch.zeros_like(x))
    torch.testing.assert_close(losses, torch.full((3,), 2.25e38, device=device))


@pytest.mark.parametrize("x, y", [(INF, 0.0), (INF, 0.5), (-INF, 0.5), (-INF, 1.0)])
def test_an_infinitely_wrong_logit_costs_infinitely_much(device, x, y):
    """Where torch subtracts inf from inf for some."""
    tensors = {
        "input": torch.tensor([[x], [0.0]], device=device),
        "target": torch.tensor([[y], [0.5]], device=device),
    }
    losses = CASES["bce"].losses(tensors)
    assert losses[0] == INF
    twin = reference.pointwise_losses(
        "binary_cross_entropy_with_logits", *tensors.values(), None, None, 0.0, False, 1, True
    )
    torch.testing.assert_close(losses, twin)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_of_huge_logits(device, dtype):
    for offset in (1e3, -1e3, 1e4, -3e4):
        tensors = draw_classes(20, 10, dtype=dtype, device=device)
        tensors["input"] = (tensors["input"].float() + offset).to(dtype)
        assert_cross_entropy_matches_torch(tensors, 0.5)
    for scale in (1e2, 1e3):
        tensors = draw_classes(20, 10, dtype=dtype, device=device)
        tensors["input"] *= scale
        assert_cross_entropy_matches_torch(tensors, 0.5)
        assert_cross_entropy_matches_torch(tensors, 0.5, label_smoothing=0.1)


@pytest.mark.parametrize("shape", [(50, 100), (50, 100, 3)])
def test_cross_entropy_of_what_huge_logits_have_in_common(device, shape):
    """It cancels: both ways of walking give what they give without it."""
    tensors = draw_classes(*shape, dtype=torch.float32, device=device)
    tensors["input"] += 30_000
    assert_cross_entropy_matches_torch(tensors, 0.5, label_smoothing=0.3)
    tensors["target"] = torch.randn(shape, device=device).softmax(1)
    assert_cross_entropy_matches_torch(tensors, 0.5)


def test_cross_entropy_of_classes_masked_by_minus_infinity(device):
    for shape in ((30, 6), (30, 40), (30, 1000), (30, 6, 4), (2, 70, 3)):
        tensors = draw_classes(*shape, dtype=torch.float32, device=device)
        tensors["target"].remainder_(4)
        tensors["input"][:, 4] = -INF
        tensors["input"][::2, 5:] = -INF
        assert_cross_entropy_matches_torch(tensors, 0.5)
        weight = torch.rand(shape[1], device=device)
        assert_cross_entropy_matches_torch({**tensors, "weight": weight}, 0.0)


@pytest.mark.parametrize("logits", [[INF, 0.0], [-INF, 0.0], [-INF, -INF], [INF, INF], [NAN, 0.0]])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}])
def test_cross_entropy_of_what_is_not_finite(device, logits, options):
    x = torch.tensor([logits, [1.0, 2.0]], device=device)
    by_class = x[:, :, None].expand(2, 2, 3)
    for target in (0, 1):
        classes = torch.tensor([target, 0], device=device)
        for tensors in ((x, classes), (by_class, classes[:, None].expand(2, 3))):
            got = sqloss.losses.cross_entropy(*tensors, **options)
            expected = F.cross_entropy(*tensors, reduction="none", **options)
            torch.testing.assert_close(got, expected, equal_nan=True)


@every_case
def test_nan_reaches_the_value_and_its_own_samples_gradient(device, case):
    for where in ("input", "target"):
        for element in (0, 16, 1030):
            tensors = case.draw(5, 1040, dtype=torch.float32, device=device)
            tensors[where][3, element] = NAN
            leaves = with_gradients(tensors, ["input"])
            value, losses = case.cvar(leaves, 0.8, return_losses=True)
            assert value.isnan() and losses.isnan().tolist() == [False] * 3 + [True, False]
            value.backward()
            gradient = leaves["input"].grad
            assert gradient[3, element].isnan()
            assert gradient.isnan().any(1).tolist() == [False] * 3 + [True, False]


def test_nan_logits_reach_the_value_and_their_own_gradient(device):
    tensors = draw_classes(5, 40, 2, dtype=torch.float32, device=device)
    tensors["input"][3, 33, 1] = NAN
    leaf = tensors["input"].requires_grad_()
    value = sqloss.cvar_cross_entropy(leaf, tensors["target"], alpha=0.9)
    value.backward()
    assert value.isnan() and leaf.grad[3, :, 1].isnan().all()
    assert leaf.grad.isnan().sum() == 40


@pytest.mark.parametrize("dtype, integer", [("float32", "int32"), ("float64", "int64")])
@pytest.mark.parametrize("payload", [1, 0x7A2, -1])  # 0x7A2: R's NA
def test_nan_of_any_bits_is_nan(device, dtype, integer, payload):
    """A kernel that computes with the bits of numbers must not make one of a NaN's."""
    quiet = torch.tensor(NAN, dtype=getattr(torch, dtype)).view(getattr(torch, integer))
    nan = (quiet | payload).view(getattr(torch, dtype)).to(device)
    for shape in ((3, 2), (3, 40), (3, 40, 2)):
        leaf = torch.zeros(shape, dtype=nan.dtype, device=device)
        leaf[1, 1] = nan
        leaf.requires_grad_()
        classes = torch.zeros(3, *shape[2:], dtype=torch.int64, device=device)
        for losses, of_element in (
            (sqloss.losses.binary_cross_entropy_with_logits(leaf, torch.zeros_like(leaf)), True),
            (sqloss.losses.cross_entropy(leaf, classes), False),
        ):
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
            assert losses[1].isnan().all() and losses[::2].isfinite().all()
            assert gradient[1, 1].isnan().all() and gradient[::2].isfinite().all()
            assert of_element or gradient[1].isnan().all()


@every_case
def test_nan_reaches_the_derivatives_of_formulas(device, case):
    """Those of double backward and forward mode, where there is no kernel."""
    tensors = case.draw(2, 3, device=device)
    tensors["input"][1, 2] = NAN
    leaves = with_gradients(tensors, ["input"])
    losses = case.losses(leaves)
    (gradient,) = torch.autograd.grad(losses.sum(), leaves["input"], create_graph=True)
    assert gradient.isnan().tolist() == [[False] * 3, [False, False, True]]
    x = tensors.pop("input")
    _, tangent = torch.func.jvp(
        lambda x: case.losses({"input": x, **tensors}), (x,), (torch.ones_like(x),)
    )
    assert tangent.isnan().tolist() == [False, True]


@every_case
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_no_gradient_of_the_loss_means_zeros_whatever_is_there(device, case, zero):
    """0 * inf and 0 * NaN are 0 here: samples outside of the tail are not read."""
    names = case.differentiable(case.draw(1, 1))
    for poison in (NAN, INF):
        tensors = case.draw(4, 1100, dtype=torch.float32, device=device)
        for tensor in tensors.values():
            tensor[1] = poison
            tensor[2, 5::7] = poison
        leaves = with_gradients(tensors, names)
        grad_losses = torch.tensor([1.0, zero, zero, 2.0], device=device)
        gradients = torch.autograd.grad(
            case.losses(leaves), [leaves[name] for name in names], grad_losses
        )
        for gradient in gradients:
            assert not gradient[1:3].any() and gradient[::3].isfinite().all()


def test_no_gradient_of_the_cross_entropy_means_zeros_whatever_is_there(device):
    for probabilities in (False, True):
        for poison in (NAN, INF, -INF):
            tensors = draw_classes(
                4, 40, 3, dtype=torch.float32, device=device, probabilities=probabilities
            )
            tensors["input"][1] = poison
            tensors["input"][2, ::3] = poison
            leaves = [tensor.requires_grad_() for tensor in tensors.values() if tensor.dim() == 3]
            grad_losses = torch.tensor([1.0, 0.0, -0.0, 2.0], device=device)
            losses = sqloss.losses.cross_entropy(**tensors)
            for gradient in torch.autograd.grad(losses, leaves, grad_losses[:, None].expand(4, 3)):
                assert not gradient[1:3].any() and gradient[::3].isfinite().all()


@pytest.mark.parametrize("shape", [(2, 3), (2, 40)])
def test_an_infinite_gradient_of_the_cross_entropy_is_no_nan(device, shape):
    """As of a loss scaled too much."""
    leaf = torch.randn(shape, device=device, requires_grad=True)
    target = torch.tensor([1, 0], device=device)
    (gradient,) = torch.autograd.grad(
        sqloss.losses.cross_entropy(leaf, target), leaf, torch.tensor([INF, 1.0], device=device)
    )
    assert (
        gradient[0, 1] == -INF and (gradient[0, 2:] == INF).all() and gradient[1].isfinite().all()
    )


def test_the_best_sample_may_be_infinitely_good(device):
    """Its gradient is infinite, and not asked for."""
    x = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]], device=device, requires_grad=True)
    weight = torch.tensor([[-INF], [1.0], [1.0]], device=device)
    value, losses = sqloss.cvar_mse_loss(
        x, torch.zeros_like(x), weight, alpha=0.5, return_losses=True
    )
    value.backward()
    assert losses.tolist() == [-INF, 4, 9] and x.grad.isfinite().all() and not x.grad[0].any()


# --- extra and return_losses ----------------------------------------------------------------------


@every_case
def test_extra_is_added_and_gets_the_tails_weights(device, case):
    tensors = case.draw(6, 5, 7, device=device)
    for sample_dims in (1, 2):
        extra = torch.randn(
            tensors["input"].shape[:sample_dims], dtype=torch.float64, device=device
        )
        extra.requires_grad_()
        options = {"reduction": "sum", "sample_dims": sample_dims}
        leaves = with_gradients(tensors, ["input"])
        value, losses = case.cvar(leaves, 0.7, extra=extra, return_losses=True, **options)
        assert not losses.requires_grad
        by_hand = case.losses(leaves, **options) + extra
        torch.testing.assert_close(losses, by_hand)
        torch.testing.assert_close(value, sqloss.cvar(by_hand, 0.7))
        assert torch.equal(case.cvar(leaves, 0.7, extra=extra, **options), value)
        of_extra, of_input = torch.autograd.grad(value, [extra, leaves["input"]])
        torch.testing.assert_close(of_extra, sqloss.tail_weights(losses, 0.7))
        expected = torch.autograd.grad(sqloss.cvar(by_hand, 0.7), leaves["input"])
        torch.testing.assert_close(of_input, expected[0])
    # of the extra alone, when the tensors want none
    value = case.cvar(tensors, 0.7, extra=(e := torch.randn(6, device=device, requires_grad=True)))
    value.backward()
    assert e.grad.dtype == torch.float32 and e.grad.sum().item() == pytest.approx(1)


def test_extra_of_the_cross_entropy(device):
    tensors = draw_classes(6, 5, 7, device=device)
    tensors["target"][2, 3] = -100
    mask = tensors["target"] != -100
    extra = torch.randn(6, 7, dtype=torch.float64, device=device, requires_grad=True)
    value, losses = sqloss.cvar_cross_entropy(**tensors, alpha=0.6, extra=extra, return_losses=True)
    torch.testing.assert_close(losses, sqloss.losses.cross_entropy(**tensors) + extra.detach())
    torch.testing.assert_close(value, sqloss.cvar(losses, 0.6, mask=mask))
    value.backward()
    torch.testing.assert_close(extra.grad, sqloss.tail_weights(losses, 0.6, mask=mask))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_extra", DTYPES)
def test_extra_by_dtype(device, dtype, of_extra):
    tensors = CASES["bce"].draw(9, 4, dtype=dtype, device=device)
    extra = torch.randn(9, device=device).to(of_extra).requires_grad_()
    value, losses = CASES["bce"].cvar(tensors, 0.5, extra=extra, return_losses=True)
    double = torch.float64 in (dtype, of_extra)
    assert value.dtype == losses.dtype == (torch.float64 if double else torch.float32)
    value.backward()
    assert extra.grad.dtype == of_extra


def test_returned_losses_have_no_graph():
    tensors = CASES["mse"].draw(5, 3)
    tensors["input"].requires_grad_()
    value, losses = CASES["mse"].cvar(tensors, 0.5, return_losses=True)
    assert value.requires_grad and not losses.requires_grad and losses.grad_fn is None


# --- losses and tail in one operator --------------------------------------------------------------


def has_kernel(operator, device):
    key = device.type.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"sqloss::{operator}", key)


def two_derivatives(value, inputs):
    """The gradients, and those of the sum of their squares, None where there are none."""
    gradients = torch.autograd.grad(value, inputs, create_graph=True)
    squares = sum(gradient.square().sum() for gradient in gradients)
    return gradients, torch.autograd.grad(squares, inputs, allow_unused=True)


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "shape", [(1, 5), (2, 8), (33, 1), (700, 3), (4096, 2), (4097, 2), (3, 8192), (2, 8193)]
)
def test_one_operator_does_what_two_do(device, case, dtype, shape):
    """Where it has a kernel: the last of its blocks finds the tail."""
    tensors = case.draw(*shape, dtype=dtype, device=device)
    tensors["input"] = tensors["input"].round()
    names = case.differentiable(tensors)
    given_extra = torch.randn(shape[0], dtype=dtype, device=device).round()
    for extra, alpha in ((None, 0.3), (given_extra, 0.8), (given_extra, 0.0)):
        results = []
        for in_one in (True, False):
            leaves = with_gradients(tensors, names)
            inputs = [leaves[name] for name in names]
            if extra is not None:
                inputs.append(extra.requires_grad_())
            if in_one:
                value, losses = case.cvar(leaves, alpha, extra=extra, return_losses=True)
                fused = shape[0] <= 4096 and shape[1] <= 8192
                fused = fused and has_kernel("pointwise_losses_cvar", device)
                assert ("Cvar" in value.grad_fn.name()) == fused
                assert not losses.requires_grad
            else:
                losses = case.losses(leaves)
                losses = losses if extra is None else losses + extra
                value = sqloss.cvar(losses, alpha)
            results.append((losses.detach(), value.detach(), *two_derivatives(value, inputs)))
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1:], results[1][1:])


CROSS_ENTROPY_OPTIONS = {
    "classes": {},
    "smoothed": {"label_smoothing": 0.1, "weight": True},
    "probabilities": {"probabilities": True},
}


@pytest.mark.parametrize("options", CROSS_ENTROPY_OPTIONS.values(), ids=CROSS_ENTROPY_OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [
        *((1, 5), (33, 1), (700, 3), (6, 700), (3, 2100), (4096, 2), (4097, 2)),  # by sample
        *((2, 64, 3), (8, 19, 4, 16), (4, 3, 1024), (3, 3, 1366)),  # by class
    ],
)
def test_one_operator_does_what_two_do_of_the_cross_entropy(device, shape, dtype, options):
    options = dict(options)
    given = {name: options.pop(name, False) for name in ("probabilities", "weight")}
    tensors = draw_classes(*shape, dtype=dtype, device=device, **given)
    tensors["input"] = tensors["input"].round()
    mask = None
    if not given["probabilities"]:
        mask = torch.rand(tensors["target"].shape, device=device) < 0.7
        mask.view(-1)[0] = True
        tensors["target"][~mask] = -100
    size = tensors["input"].numel() // shape[1]
    given_extra = torch.randn(shape[0], *shape[2:], dtype=dtype, device=device).round()
    for extra, alpha in ((None, 0.3), (given_extra, 0.8), (given_extra, 0.0)):
        results = []
        for in_one in (True, False):
            names = ["input", "target"] if given["probabilities"] else ["input"]
            leaves = with_gradients(tensors, names)
            inputs = [leaves[name] for name in names]
            if extra is not None:
                inputs.append(extra.requires_grad_())
            if in_one:
                arguments = {**leaves, **options, "alpha": alpha, "extra": extra}
                value, losses = sqloss.cvar_cross_entropy(**arguments, return_losses=True)
                fused = size <= 4096 and has_kernel("cross_entropy_losses_cvar", device)
                assert ("Cvar" in value.grad_fn.name()) == fused
                assert not losses.requires_grad
                assert torch.equal(sqloss.cvar_cross_entropy(**arguments), value)
            else:
                losses = sqloss.losses.cross_entropy(**leaves, **options)
                losses = losses if extra is None else losses + extra
                value = sqloss.cvar(losses, alpha, mask=mask)
            results.append((losses.detach(), value.detach(), *two_derivatives(value, inputs)))
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1:], results[1][1:])


@pytest.mark.parametrize("number", [NAN, INF, -INF])
def test_one_operator_ranks_what_is_not_finite(device, number):
    losses = torch.tensor([3.0, 1.0, number, 2.0, 5.0], device=device)
    x = torch.zeros(5, 1, device=device, requires_grad=True)
    for alpha in (0.0, 0.3, 0.6, 0.8, 0.9):
        leaf = losses.clone().requires_grad_()
        value = sqloss.cvar_mse_loss(x, torch.zeros_like(x), alpha=alpha, extra=leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        other = losses.clone().requires_grad_()
        expected = sqloss.cvar(other, alpha)
        torch.testing.assert_close(value, expected, equal_nan=True)
        (of_expected,) = torch.autograd.grad(expected, other)
        torch.testing.assert_close(gradient, of_expected)
        # of one class, whose loss is 0, and beside an ignored sample
        leaf = torch.cat([losses, losses.new_full((1,), NAN)]).requires_grad_()
        target = torch.tensor([0, 0, 0, 0, 0, -100], device=device)
        logits = torch.zeros(6, 1, device=device)
        value = sqloss.cvar_cross_entropy(logits, target, alpha=alpha, extra=leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        torch.testing.assert_close(value, expected, equal_nan=True)
        torch.testing.assert_close(gradient[:5], of_expected)
        assert gradient[5] == 0


def test_one_operator_says_what_it_takes(device):
    if not has_kernel("pointwise_losses_cvar", device):
        pytest.skip("two operators on this device")

    def call(x, extra=None, fraction=0.5):
        fraction = torch.tensor(fraction, dtype=torch.float64)
        return torch.ops.sqloss.pointwise_losses_cvar(
            fraction, extra, "mse", x, torch.zeros_like(x), None, None, 0.0, False, 1, True
        )

    x = torch.randn(6, 3, device=device)
    for arguments, message in (
        ((x.new_zeros(4097, 1),), "input: expected 1 to 4096 losses, got 4097"),
        ((x.new_zeros(0, 3),), "input: expected 1 to 4096 losses, got 0"),
        ((x.new_zeros(2, 8193),), "input: expected samples of 1 to 8192 elements, got 8193"),
        ((x.new_zeros(2, 0),), "input: expected samples of 1 to 8192 elements, got 0"),
        ((x, x.new_zeros(6).double()), "extra: expected Float .*, got Double"),
        ((x, x.new_zeros(5)), r"extra: expected Float of shape \[6\] .*, got Float of shape \[5\]"),
        ((x, None, 1.5), r"tail_fraction: expected a number in \(0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*arguments)
    with pytest.raises(NotImplementedError, match="expected tensors without tangents"):
        torch.func.jvp(lambda x: call(x)[0], (x,), (x,))
    # which the function knows how to do without it
    value, tangent = torch.func.jvp(
        lambda x: sqloss.cvar_mse_loss(x, torch.zeros_like(x), alpha=0.5), (x,), (x,)
    )
    torch.testing.assert_close(tangent, 2 * value)


def test_one_operator_says_what_it_takes_of_the_cross_entropy(device):
    if not has_kernel("cross_entropy_losses_cvar", device):
        pytest.skip("two operators on this device")

    def call(x, extra=None, fraction=0.5):
        fraction = torch.tensor(fraction, dtype=torch.float64)
        target = torch.zeros(x.shape[:1], dtype=torch.int64, device=device)
        return torch.ops.sqloss.cross_entropy_losses_cvar(
            fraction, extra, x, target, None, -100, 0.0
        )

    x = torch.randn(6, 3, device=device)
    for arguments, message in (
        ((x.new_zeros(4097, 1),), "input: expected 1 to 4096 losses, got 4097"),
        ((x.new_zeros(0, 3),), "input: expected 1 to 4096 losses, got 0"),
        ((x, x.new_zeros(6).double()), "extra: expected Float .*, got Double"),
        ((x, x.new_zeros(5)), r"extra: expected Float of shape \[6\] .*, got Float of shape \[5\]"),
        ((x, None, 1.5), r"tail_fraction: expected a number in \(0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match="cross_entropy_losses_cvar: " + message):
            call(*arguments)
    with pytest.raises(NotImplementedError, match="expected tensors without tangents"):
        torch.func.jvp(lambda x: call(x)[0], (x,), (x,))


# --- the same bits every time ---------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("shape", [(3, 70_001), (999, 31), (40, 3000)])
def test_same_bits_for_any_number_of_threads_and_repetition(case, shape):
    tensors = case.draw(*shape, dtype=torch.float32)
    names = case.differentiable(tensors)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            leaves = with_gradients(tensors, names)
            value, losses = case.cvar(leaves, 0.6, return_losses=True)
            value.backward()
            results.append([value.detach(), losses, *(leaves[name].grad for name in names)])
    finally:
        torch.set_num_threads(before)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.parametrize("shape", [(999, 31), (40, 3000), (2, 50_257), (3, 21, 64, 65)])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"probabilities": True}])
def test_same_bits_of_the_cross_entropy(shape, options):
    options = dict(options)
    probabilities = options.pop("probabilities", False)
    tensors = draw_classes(*shape, dtype=torch.float32, probabilities=probabilities)
    names = ["input", "target"] if probabilities else ["input"]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            leaves = with_gradients(tensors, names)
            value = sqloss.cvar_cross_entropy(**leaves, alpha=0.6, **options)
            value.backward()
            results.append([value.detach(), *(leaves[name].grad for name in names)])
    finally:
        torch.set_num_threads(before)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_same_bits_on_every_repetition(device):
    tensors = CASES["bce"].draw(300, 301, dtype=torch.float32, device=device)
    long = CASES["bce"].draw(3, 70_001, dtype=torch.float32, device=device)
    rows = draw_classes(300, 301, dtype=torch.float32, device=device)
    images = draw_classes(3, 40, 13, 17, dtype=torch.float32, device=device)

    def losses():
        return (
            CASES["bce"].losses(tensors),
            CASES["bce"].losses(long),
            sqloss.losses.cross_entropy(**rows),
            sqloss.losses.cross_entropy(**images, label_smoothing=0.1),
        )

    first = losses()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(losses(), first, strict=True))


CAPABILITY_PROGRAM = """
import sys, torch, sqloss
from sqloss.losses import *
g = torch.Generator().manual_seed(0)
out = []
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for shape in ((50, 301), (7, 3001), (301, 5)):
        # not randn: torch's own normals depend on the capability
        x = torch.rand(shape, generator=g).sub(0.5).mul(20).to(dtype).requires_grad_()
        y = torch.rand(shape, generator=g)
        v = torch.rand(shape, generator=g) + 0.1
        c = torch.randint(shape[1], shape[:1], generator=g)
        for losses in (
            binary_cross_entropy_with_logits(x, y), mse_loss(x, y), smooth_l1_loss(x, y),
            gaussian_nll_loss(x, y, v), cross_entropy(x, c),
            cross_entropy(x[:, :, None], c[:, None], label_smoothing=0.1),
            cross_entropy(x, x), cross_entropy(x[:, :, None], x[:, :, None]),
        ):
            out += [losses.detach(), *torch.autograd.grad(losses.sum(), x)]
torch.save(out, sys.argv[1])
"""


@pytest.mark.parametrize("capability, other", [("AVX2", "DEFAULT"), ("AVX512", "AVX2")])
def test_same_bits_for_every_cpu_capability(
    capability, other, need_capability, saved_with_capability
):
    """One build holds all vector widths, and none changes a bit; but for CPUs without fused
    multiply-add, which round more often.
    """
    need_capability(capability)
    result = saved_with_capability(CAPABILITY_PROGRAM, capability)
    for a, b in zip(saved_with_capability(CAPABILITY_PROGRAM, other), result, strict=True):
        if other == "DEFAULT":
            rounding = 1e3 * torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, b, rtol=rounding, atol=rounding * a.abs().max().item())
        else:
            assert torch.equal(a, b)


# --- autograd -------------------------------------------------------------------------------------


@every_case
def test_gradcheck_and_gradgradcheck(device, case):
    tensors = case.draw(4, 2, 3, device=device)
    names = case.differentiable(tensors)
    extra = torch.randn(4, dtype=torch.float64, device=device, requires_grad=True)
    leaves = with_gradients(tensors, names)
    rest = {name: tensor for name, tensor in tensors.items() if name not in names}

    def value(extra, *given_):
        given_ = dict(zip(names, given_, strict=True))
        return case.cvar({**given_, **rest}, 0.55, reduction="sum", extra=extra)

    def losses(*given_):
        return case.losses({**dict(zip(names, given_, strict=True)), **rest})

    every_way = {"check_forward_ad": True, "check_batched_grad": True}
    for f, inputs in [
        (value, (extra, *(leaves[name] for name in names))),
        (losses, tuple(leaves[name] for name in names)),
    ]:
        assert torch.autograd.gradcheck(f, inputs, **every_way)
        assert torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}])
def test_gradcheck_and_gradgradcheck_of_the_cross_entropy(device, probabilities, options):
    tensors = draw_classes(4, 3, 2, device=device, probabilities=probabilities, weight=True)
    if not probabilities:
        tensors["target"][1, 1] = -100
    weight = tensors.pop("weight")
    leaves = tuple(tensor.requires_grad_(tensor.dim() == 3) for tensor in tensors.values())

    def value(x, y):
        return sqloss.cvar_cross_entropy(x, y, weight, **options, alpha=0.55)

    def losses(x, y):
        return sqloss.losses.cross_entropy(x, y, weight, **options)

    for f in (value, losses):
        assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(f, leaves, check_fwd_over_rev=True)


@pytest.mark.parametrize("beta", [1e-30, 1e-40, 1e-46, 1e-300])
def test_second_derivative_of_smooth_l1_for_a_tiny_beta(device, beta):
    """Below the smallest number of float32, or whose reciprocal it does not hold."""
    x = torch.tensor([[-1.0, 0.0, 2.0]], device=device, requires_grad=True)
    loss = sqloss.losses.smooth_l1_loss(x, torch.zeros_like(x), beta=beta).sum()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(slope, x.detach().sign() / 3)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert not curvature[0, ::2].any() and not curvature.isnan().any()


def test_a_gradient_penalty(device):
    """Double backward through the fused loss into the parameters of a model."""
    layer = torch.nn.Linear(5, 4, dtype=torch.float64, device=device)
    x = torch.randn(9, 5, dtype=torch.float64, device=device, requires_grad=True)
    y = torch.rand(9, 4, dtype=torch.float64, device=device)

    def penalised(loss):
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(loss + slope.square().sum(), list(layer.parameters()))

    fused = sqloss.cvar_binary_cross_entropy_with_logits(layer(x), y, alpha=0.6)
    elements = F.binary_cross_entropy_with_logits(layer(x), y, reduction="none")
    for got, expected in zip(
        penalised(fused), penalised(sqloss.cvar(elements.mean(1), 0.6)), strict=True
    ):
        torch.testing.assert_close(got, expected)


@every_case
def test_only_wanted_gradients_are_computed(device, case):
    tensors = case.draw(5, 7, device=device)
    names = case.differentiable(tensors)
    everything = torch.autograd.grad(
        case.cvar(leaves := with_gradients(tensors, names), 0.5), [leaves[n] for n in names]
    )
    for name, expected in zip(names, everything, strict=True):
        leaves = with_gradients(tensors, [name])
        case.cvar(leaves, 0.5).backward()
        assert torch.equal(leaves[name].grad, expected)
        assert all(leaf.grad is None for other, leaf in leaves.items() if other != name)


def test_the_graph_is_freed_with_its_last_user():
    for function, target in (
        (sqloss.cvar_mse_loss, torch.rand(6, 4)),
        (sqloss.cvar_cross_entropy, torch.randint(4, (6,))),
    ):
        logits = torch.randn(6, 4, requires_grad=True) * 2
        memory = weakref.ref(logits)
        value = function(logits, target, alpha=0.5)
        del logits
        assert memory() is not None  # saved for backward
        del value
        assert memory() is None


def test_backward_twice_needs_retain_graph():
    for function, target in (
        (sqloss.cvar_mse_loss, torch.rand(6, 4)),
        (sqloss.cvar_cross_entropy, torch.randint(4, (6,))),
    ):
        leaf = torch.randn(6, 4, requires_grad=True)
        value = function(leaf, target, alpha=0.5)
        value.backward(retain_graph=True)
        once = leaf.grad.clone()
        value.backward()
        assert torch.equal(leaf.grad, 2 * once)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            value.backward()


def test_changing_the_logits_after_forward_is_noticed():
    for function, target in (
        (sqloss.cvar_mse_loss, torch.rand(6, 4)),
        (sqloss.cvar_cross_entropy, torch.randint(4, (6,))),
    ):
        logits = torch.randn(6, 4, requires_grad=True) * 2
        value = function(logits, target, alpha=0.5)
        with torch.no_grad():
            logits.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


def test_nothing_of_the_size_of_the_elements_is_saved_but_the_arguments():
    packed = []
    logits, target = torch.randn(6, 40, requires_grad=True), torch.rand(6, 40)
    classes = torch.randint(40, (6,))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t.data_ptr() if t.numel() > 6 else None) or t.clone(), lambda t: t
    ):
        first = sqloss.cvar_binary_cross_entropy_with_logits(logits, target, alpha=0.5)
        second = sqloss.cvar_cross_entropy(logits, classes, alpha=0.5)
    large = [pointer for pointer in packed if pointer is not None]
    assert sorted(large) == sorted([logits.data_ptr(), target.data_ptr(), logits.data_ptr()])
    (first + second).backward()
    assert logits.grad.isfinite().all()


def test_no_graph_where_none_is_wanted():
    tensors = CASES["mse"].draw(5, 3)
    assert not CASES["mse"].cvar(tensors, 0.5).requires_grad
    tensors["input"].requires_grad_()
    assert CASES["mse"].cvar(tensors, 0.5).requires_grad
    with torch.no_grad():
        assert not CASES["mse"].cvar(tensors, 0.5).requires_grad
    with torch.inference_mode():
        assert CASES["mse"].cvar(tensors, 0.5).isfinite()
        assert sqloss.cvar_cross_entropy(torch.randn(3, 4), torch.arange(3), alpha=0.5).isfinite()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    layer = torch.nn.Linear(5, 4)
    x, classes = torch.randn(30, 5), torch.randint(4, (30,))

    def step(x):
        return sqloss.cvar_cross_entropy(layer(x), classes, alpha=0.7)

    expected = torch.autograd.grad(step(x), list(layer.parameters()))
    checkpoint(step, x.requires_grad_(), use_reentrant=use_reentrant).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(layer.parameters(), expected, strict=True))


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_the_gradient_and_a_number_per_sample(peak_memory, dtype):
    n, d = 64, 20_000
    logits, target = torch.randn(n, d, dtype=dtype, requires_grad=True), torch.rand(n, d)
    classes, transposed = torch.randint(d, (n,)), torch.rand(d, n).t()
    for step in (
        lambda: sqloss.cvar_binary_cross_entropy_with_logits(logits, target, alpha=0.5).backward(),
        lambda: sqloss.cvar_mse_loss(logits, transposed, alpha=0.5).backward(),
        lambda: sqloss.cvar_cross_entropy(logits, classes, alpha=0.5).backward(),
    ):
        step()  # whatever is made once
        logits.grad = None
        assert peak_memory(step) <= logits.nbytes + 100 * n + 4096
        logits.grad = None


def test_the_measure_of_memory_sees_the_elements_losses(peak_memory):
    logits, target = torch.randn(64, 20_000, requires_grad=True), torch.rand(64, 20_000)

    def step():
        losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        sqloss.cvar(losses.mean(1), 0.5).backward()

    assert peak_memory(step) > 1.9 * logits.nbytes


# --- laws -----------------------------------------------------------------------------------------

finite = st.floats(-1e3, 1e3, allow_subnormal=False)
alphas = st.one_of(st.floats(0, 0.999), st.integers(0, 99).map(lambda i: i / 100))
names_of_cases = st.sampled_from(sorted(CASES))


@st.composite
def samples(draw):
    """A case and tensors of it, of a few samples."""
    case = CASES[draw(names_of_cases)]
    rows, elements = draw(st.integers(1, 8)), draw(st.integers(1, 20))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    tensors = case.draw(rows, elements)
    tensors["input"] *= draw(st.sampled_from([0.0, 1.0, 30.0]))
    return case, tensors


@given(samples(), alphas)
def test_law_between_mean_and_maximum(drawn, alpha):
    case, tensors = drawn
    value, losses = case.cvar(tensors, alpha, return_losses=True)
    slack = 1e-9 * max(1.0, losses.abs().max().item())
    assert losses.mean() - slack <= value <= losses.max() + slack
    torch.testing.assert_close(case.cvar(tensors, 0.0), case.elements(tensors).mean())


@given(samples(), alphas, alphas)
def test_law_monotone_in_alpha(drawn, a, b):
    case, tensors = drawn
    low, high = (case.cvar(tensors, alpha) for alpha in sorted((a, b)))
    assert low <= high + 1e-9 * max(1.0, high.abs().item())


@given(samples(), alphas, st.randoms(use_true_random=False))
def test_law_permutation_of_samples(drawn, alpha, random):
    """Losses and gradients go with their samples, bit for bit."""
    case, tensors = drawn
    order = list(range(len(tensors["input"])))
    random.shuffle(order)
    permuted = {name: tensor[order] for name, tensor in tensors.items()}
    leaves, moved = with_gradients(tensors, ["input"]), with_gradients(permuted, ["input"])
    value, losses = case.cvar(leaves, alpha, return_losses=True)
    again, losses_again = case.cvar(moved, alpha, return_losses=True)
    assert torch.equal(losses[order], losses_again)
    torch.testing.assert_close(value, again)
    value.backward(), again.backward()
    torch.testing.assert_close(leaves["input"].grad[order], moved["input"].grad)


@given(samples(), alphas, finite)
def test_law_translation_by_extra(drawn, alpha, shift):
    case, tensors = drawn
    extra = torch.full(tensors["input"].shape[:1], shift, dtype=torch.float64)
    value = case.cvar(tensors, alpha)
    shifted = case.cvar(tensors, alpha, extra=extra)
    assert abs(shifted - value - shift) <= 1e-9 * max(1.0, abs(shift), value.abs().item())


@given(samples(), alphas)
def test_law_sample_dims_only_group_elements(drawn, alpha):
    """Every element a sample, or every row one of its sums."""
    case, tensors = drawn
    elements = case.losses(tensors, sample_dims=2)
    torch.testing.assert_close(elements, case.elements(tensors))
    torch.testing.assert_close(case.losses(tensors, reduction="sum"), elements.sum(1))
    flat = {name: tensor.flatten().unsqueeze(1) for name, tensor in tensors.items()}
    torch.testing.assert_close(case.cvar(tensors, alpha, sample_dims=2), case.cvar(flat, alpha))


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**16), alphas, finite)
def test_law_cross_entropy_does_not_see_a_shift_of_the_logits(n, classes, seed, alpha, shift):
    torch.manual_seed(seed)
    tensors = draw_classes(n, classes)
    value = sqloss.cvar_cross_entropy(**tensors, alpha=alpha)
    moved = {**tensors, "input": tensors["input"] + shift}
    torch.testing.assert_close(
        sqloss.cvar_cross_entropy(**moved, alpha=alpha), value, rtol=1e-9, atol=1e-9
    )
    leaf = tensors["input"].requires_grad_()
    (gradient,) = torch.autograd.grad(sqloss.cvar_cross_entropy(**tensors, alpha=alpha), leaf)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(n, dtype=torch.float64))


# --- compile, export, fake tensors, torch.func ----------------------------------------------------

POINTWISE = [
    ("binary_cross_entropy_with_logits", 0.0, False),
    ("mse", 0.0, False),
    ("smooth_l1", 0.5, False),
    ("smooth_l1", 0.0, False),
    ("huber", 0.5, False),
    ("gaussian_nll", 1e-6, True),
]


def pointwise_arguments(device="cpu"):
    """Arguments of the operator, small and of every kind."""
    for index, (loss, parameter, full) in enumerate(POINTWISE):
        x, y, w, o = torch.rand(4, 4, 3, 5, device=device) + 0.1
        other = o if loss in ("gaussian_nll", "binary_cross_entropy_with_logits") else None
        weight = w if index % 2 else None
        if index % 3 == 0:
            x, y = x.bfloat16(), y.double()
        if index % 3 == 1:
            x, y, weight = (t if t is None else t.movedim(0, 2) for t in (x, y, weight))
            other = None if other is None else other[:1].expand_as(other).movedim(0, 2)
        yield loss, x, y, weight, other, parameter, full, 1 + index % 3, index % 2 == 0


def cross_entropy_arguments(device="cpu"):
    x = torch.randn(4, 5, 3, device=device)
    classes = torch.randint(5, (4, 3), device=device)
    classes[1, 1] = -100
    weight = torch.rand(5, device=device)
    yield x, classes, None, -100, 0.0
    yield x.movedim(0, 2).contiguous().movedim(2, 0), classes, weight, -100, 0.1
    yield x.bfloat16(), torch.rand_like(x), None, -100, 0.1
    yield x.double(), torch.rand_like(x), weight.double(), -100, 0.0
    yield x[:, :, 0], classes[:, 0], None, -100, 0.0


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, requires_grad):
    ops = torch.ops.sqloss
    for loss, input, target, weight, other, *rest in pointwise_arguments(device):
        input, target = (t.detach().requires_grad_(requires_grad) for t in (input, target))
        if loss == "gaussian_nll":
            other = other.detach().requires_grad_(requires_grad)
        arguments = (loss, input, target, weight, other, *rest)
        torch.library.opcheck(ops.pointwise_losses, arguments)
        losses = ops.pointwise_losses(*arguments).detach()
        grad = torch.rand_like(losses).requires_grad_(requires_grad)
        mask = [True, requires_grad, loss == "gaussian_nll"]
        torch.library.opcheck(ops.pointwise_losses_backward, (grad, *arguments, mask))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_of_the_cross_entropy(device, requires_grad):
    forward = torch.ops.sqloss.cross_entropy_losses
    backward = torch.ops.sqloss.cross_entropy_losses_backward
    for input, target, weight, *rest in cross_entropy_arguments(device):
        input = input.detach().requires_grad_(requires_grad)
        probabilities = target.is_floating_point()
        target = target.detach().requires_grad_(requires_grad and probabilities)
        torch.library.opcheck(forward, (input, target, weight, *rest))
        losses, log_sum_exp = forward(input.detach(), target.detach(), weight, *rest)
        grad = torch.rand_like(losses).requires_grad_(requires_grad)
        arguments = (grad, input, target, weight, log_sum_exp, *rest)
        torch.library.opcheck(backward, (*arguments, [True, probabilities]))
        torch.library.opcheck(backward, (*arguments, [False, probabilities]))


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compile_fullgraph_with_dynamic_shapes(device, backend):
    def step(x, y, classes):
        bce, losses = sqloss.cvar_binary_cross_entropy_with_logits(
            x, y, alpha=0.8, reduction="sum", extra=x[:, 0], return_losses=True
        )
        return (
            bce
            + losses.mean()
            + sqloss.cvar_cross_entropy(x, classes, tail_fraction=0.3, label_smoothing=0.1)
            + sqloss.cvar_mse_loss(x, y, y[:1].detach(), alpha=0.5)
            + sqloss.cvar_smooth_l1_loss(x, y, alpha=0.5, delta=0.5)
            + sqloss.cvar_gaussian_nll_loss(x, y, y.exp(), alpha=0.5)
            + sqloss.losses.gaussian_nll_loss(x, y, 0.5).mean()
            + sqloss.losses.cross_entropy(x, y.softmax(1)).sum()
            + sqloss.cvar_cross_entropy(x, y.softmax(1), alpha=0.5)
            + sqloss.cvar_gaussian_nll_loss(x, y[:, :1], y.exp()[:, 0], alpha=0.5)
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for n in (20, 33, 47):
        x = torch.randn(n, 7, device=device, requires_grad=True)
        y = torch.rand(n, 7, device=device, requires_grad=True)
        classes = torch.randint(7, (n,), device=device)
        value = compiled(x, y, classes)
        torch.testing.assert_close(value, step(x, y, classes))
        expected = torch.autograd.grad(step(x, y, classes), (x, y))
        torch.testing.assert_close(torch.autograd.grad(value, (x, y)), expected)


def test_compiled_backward_uses_the_kernels():
    graphs = []

    def keep(graph, _):
        graphs.append(graph.code)
        return graph

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=lambda g, i: make_boxed_func(keep(g, i)))
    x, y, classes = torch.randn(9, 4, requires_grad=True), torch.rand(9, 4), torch.arange(9) % 4

    def step(x):
        of_pixels = sqloss.cvar_binary_cross_entropy_with_logits(x, y, alpha=0.8)
        return of_pixels + sqloss.cvar_cross_entropy(x, classes, alpha=0.8)

    torch.compile(step, fullgraph=True, backend=backend)(x).backward()
    for name in ("pointwise_losses", "cross_entropy_losses", "superquantile"):
        assert f"sqloss.{name}.default" in graphs[0]
        assert f"sqloss.{name}_backward.default" in graphs[1]
    torch.testing.assert_close(x.grad, torch.autograd.grad(step(x), x)[0])


def test_alpha_changes_without_compiling_again():
    compilations = 0

    def backend(graph, _):
        nonlocal compilations
        compilations += 1
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def step(x, y, alpha):
        return sqloss.cvar_mse_loss(x, y, alpha=alpha)

    x, y = torch.randn(2, 50, 3)
    for i in range(12):
        alpha = 0.05 + 0.07 * i
        torch.testing.assert_close(step(x, y, alpha), sqloss.cvar_mse_loss(x, y, alpha=alpha))
    # torch.compile takes the first float for a constant, and the second shows that it is not
    assert compilations <= 2


TAIL_FUNCTIONS = {
    "cvar_binary_cross_entropy_with_logits": lambda x: (x, x),
    "cvar_cross_entropy": lambda x: (x, x),
    "cvar_mse_loss": lambda x: (x, x),
    "cvar_smooth_l1_loss": lambda x: (x, x),
    "cvar_gaussian_nll_loss": lambda x: (x, x, x),
    "cvar": lambda x: (x,),
    "value_at_risk": lambda x: (x,),
    "tail_weights": lambda x: (x,),
    "tail_indices": lambda x: (x[:, 0],),
    "tail_loss": lambda x: (lambda rows: rows.sum(1), x),
}


@pytest.mark.parametrize("name", TAIL_FUNCTIONS)
def test_compiled_an_alpha_out_of_range_is_an_error_of_its_function(name):
    torch._dynamo.reset()
    arguments = TAIL_FUNCTIONS[name]
    x = torch.rand(9, 3)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x, number, argument):
        return getattr(sqloss, name)(*arguments(x), **{argument: number})

    message = r"^{}: alpha, tail_fraction: expected alpha in \[0, 1\) .*got {}"
    for argument, numbers in (("alpha", (0.5, 0.6, 1.5, 0.7, -0.5)), ("tail_fraction", (2.0,))):
        for number in numbers:
            if 0 <= number < 1:
                step(x, number, argument)
                continue
            got = f"alpha = {number}" if argument == "alpha" else "alpha = -1, tail_fraction = 2"
            with pytest.raises(ValueError, match=message.format(name, got)):
                step(x, number, argument)


def test_compiled_module_follows_its_alpha():
    criterion = sqloss.nn.CrossEntropyLoss(torch.rand(4), alpha=0.5, label_smoothing=0.1)
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    x, classes = torch.randn(20, 4), torch.randint(4, (20,))
    for alpha in (0.5, 0.9, 0.2):
        criterion.alpha = alpha
        assert torch.equal(compiled(x, classes), criterion(x, classes))


def test_export_with_dynamic_shapes():
    class Objective(torch.nn.Module):
        def forward(self, x, y, classes):
            return sqloss.cvar_mse_loss(x, y, alpha=0.8) + sqloss.cvar_cross_entropy(
                x, classes, alpha=0.8
            )

    def draw(n):
        return torch.randn(n, 6), torch.randn(n, 6), torch.randint(6, (n,))

    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Objective(),
        draw(4),
        dynamic_shapes={"x": {0: batch}, "y": {0: batch}, "classes": {0: batch}},
    )
    given_ = draw(9)
    assert torch.equal(program.module()(*given_), Objective()(*given_))


def test_fake_tensors_and_tracing():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode():
        x, y = torch.randn(3, 5, 2, requires_grad=True), torch.rand(3, 5, 2).bfloat16()
        value, losses = sqloss.cvar_mse_loss(x, y, alpha=0.5, sample_dims=2, return_losses=True)
        assert value.shape == () and losses.shape == (3, 5)
        classes = torch.randint(5, (3, 2))
        (value + sqloss.cvar_cross_entropy(x, classes, alpha=0.5)).backward()
        assert x.grad.shape == (3, 5, 2)
    x, y, classes = torch.randn(8, 4), torch.rand(8, 4), torch.randint(4, (8,))
    for f, other in (
        (lambda x, y: sqloss.cvar_mse_loss(x, y, alpha=0.5), y),
        (lambda x, classes: sqloss.cvar_cross_entropy(x, classes, alpha=0.5), classes),
    ):
        for mode in ("real", "fake", "symbolic"):  # in the last one sizes are no numbers
            traced = make_fx(f, tracing_mode=mode)(x, other)
            torch.testing.assert_close(traced(x, other), f(x, other))


@every_case
def test_func_grad_vmap_and_their_compositions(device, case):
    from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

    batch = case.draw(6, 5, 4, device=device)
    names = list(batch)
    x, *rest = batch.values()

    def f(x, *rest):
        return case.cvar(dict(zip(names, (x, *rest), strict=True)), 0.6)

    def one_by_one(function):
        return torch.stack([function(*row) for row in zip(x, *rest, strict=True)])

    torch.testing.assert_close(vmap(f)(x, *rest), one_by_one(f))
    moved = [tensor.movedim(0, 1) for tensor in (x, *rest)]
    torch.testing.assert_close(vmap(f, in_dims=1)(*moved), one_by_one(f))

    def by_autograd(x, *rest):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(f(leaf, *rest), leaf)[0]

    gradients = one_by_one(by_autograd)
    first = [tensor[0] for tensor in rest]
    torch.testing.assert_close(grad(f)(x[0], *first), gradients[0])
    torch.testing.assert_close(vmap(grad(f))(x, *rest), gradients)
    alone = vmap(grad(f), in_dims=(0, *(None for _ in rest)))(x, *first)
    torch.testing.assert_close(alone, torch.stack([by_autograd(row, *first) for row in x]))
    torch.testing.assert_close(grad(lambda x: vmap(f)(x, *rest).sum())(x), gradients)

    def at_first(x):
        return f(x, *first)

    pull_back = vjp(at_first, x[0])[1]
    torch.testing.assert_close(pull_back(x.new_tensor(2.0))[0], 2 * gradients[0])
    along = jvp(at_first, (x[0],), (x[1],))[1]
    torch.testing.assert_close(along, (gradients[0] * x[1]).sum())
    torch.testing.assert_close(jacrev(at_first)(x[0]), gradients[0])
    torch.testing.assert_close(hessian(at_first)(x[0]), jacrev(jacrev(at_first))(x[0]))
    leaf = x[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(at_first(leaf), leaf, create_graph=True)
    if slope.requires_grad:
        (curvature,) = torch.autograd.grad(slope.sum(), leaf)
        torch.testing.assert_close(hessian(at_first)(x[0]).sum((0, 1)), curvature)


def test_func_of_the_cross_entropy(device):
    from torch.func import grad, hessian, jacrev, jvp, vmap

    x = torch.randn(6, 5, 4, 3, dtype=torch.float64, device=device)
    weight = torch.rand(4, device=device)
    classes = torch.randint(4, (6, 5, 3), device=device)
    classes[:, 1, 1] = -100
    probabilities = torch.rand(6, 5, 4, 3, dtype=torch.float64, device=device)
    for target in (classes, probabilities):

        def f(x, target):
            return sqloss.cvar_cross_entropy(x, target, weight, alpha=0.6, label_smoothing=0.1)

        def by_autograd(x, target):
            leaf = x.clone().requires_grad_()
            return torch.autograd.grad(f(leaf, target), leaf)[0]

        pairs = list(zip(x, target, strict=True))
        torch.testing.assert_close(vmap(f)(x, target), torch.stack([f(*p) for p in pairs]))
        gradients = torch.stack([by_autograd(*p) for p in pairs])
        torch.testing.assert_close(vmap(grad(f))(x, target), gradients)
        alone = vmap(grad(f), in_dims=(0, None))(x, target[0])
        torch.testing.assert_close(alone[0], gradients[0])
        one = vmap(grad(f), in_dims=(None, 0))(x[0], target)
        torch.testing.assert_close(one[0], gradients[0])
        tangent = jvp(lambda x, t=target: f(x, t[0]), (x[0],), (x[1],))[1]
        torch.testing.assert_close(tangent, (gradients[0] * x[1]).sum())
        at_first = lambda x, t=target: f(x, t[0])  # noqa: E731
        torch.testing.assert_close(hessian(at_first)(x[0]), jacrev(jacrev(at_first))(x[0]))

    leaf = probabilities.clone().requires_grad_()
    losses = [f(*pair) for pair in zip(x, leaf, strict=True)]
    (gradients,) = torch.autograd.grad(sum(losses), leaf)
    in_target = grad(f, argnums=1)
    torch.testing.assert_close(vmap(in_target)(x, probabilities), gradients)
    one = vmap(in_target, in_dims=(0, None))(x, probabilities[0])
    torch.testing.assert_close(one[0], gradients[0])
    one = vmap(in_target, in_dims=(None, 0))(x[0], probabilities)
    torch.testing.assert_close(one[0], gradients[0])
    y, along = probabilities[0], probabilities[1]
    tangent = jvp(lambda y: f(x[0], y), (y,), (along,))[1]
    torch.testing.assert_close(tangent, (gradients[0] * along).sum())
    torch.testing.assert_close(
        hessian(f, argnums=(0, 1))(x[0], y), jacrev(jacrev(f, argnums=(0, 1)), (0, 1))(x[0], y)
    )
    with pytest.raises(ValueError, match=r"^cross_entropy: weight: expected one for all of vmap's"):
        vmap(sqloss.losses.cross_entropy)(x, classes, torch.rand(6, 4))
    # a row of logits each, without a batch dimension of their own
    rows, labels = torch.randn(7, 4, device=device), torch.randint(4, (7,), device=device)
    per_row = vmap(lambda row, label: sqloss.losses.cross_entropy(row, label))(rows, labels)
    torch.testing.assert_close(per_row, F.cross_entropy(rows, labels, reduction="none"))


def test_per_sample_gradients_of_a_model(device):
    from torch.func import functional_call, grad, vmap

    model = torch.nn.Linear(5, 3, device=device)
    x, y = torch.randn(8, 5, device=device), torch.rand(8, 3, device=device)

    def loss(parameters, x, y):
        logits = functional_call(model, parameters, (x.unsqueeze(0),))
        return sqloss.losses.binary_cross_entropy_with_logits(logits, y.unsqueeze(0)).squeeze(0)

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    got = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    for i in range(8):
        expected = torch.autograd.grad(
            loss(dict(model.named_parameters()), x[i], y[i]), model.weight
        )
        torch.testing.assert_close(got["weight"][i], expected[0])


def test_compiled_autograd():
    x, y = torch.randn(9, 4, requires_grad=True), torch.rand(9, 4)
    classes = torch.randint(4, (9,))

    def step():
        return sqloss.cvar_mse_loss(x * 2, y, alpha=0.5) + sqloss.cvar_cross_entropy(
            x * 2, classes, alpha=0.5
        )

    (expected,) = torch.autograd.grad(step(), x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        step().backward()
    torch.testing.assert_close(x.grad, expected)


# --- devices without a kernel ---------------------------------------------------------------------


def test_devices_without_a_kernel_get_the_twins(call_without_kernel):
    ops = torch.ops.sqloss
    for arguments in pointwise_arguments():
        losses = call_without_kernel(ops.pointwise_losses, *arguments)
        torch.testing.assert_close(losses, ops.pointwise_losses(*arguments))
        grad, mask = torch.rand_like(losses), [True, True, arguments[0] == "gaussian_nll"]
        got = call_without_kernel(ops.pointwise_losses_backward, grad, *arguments, mask)
        expected = ops.pointwise_losses_backward(grad, *arguments, mask)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
            assert a.stride() == b.stride()
    for input, target, weight, *rest in cross_entropy_arguments():
        got = call_without_kernel(ops.cross_entropy_losses, input, target, weight, *rest)
        expected = ops.cross_entropy_losses(input, target, weight, *rest)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        grad = torch.rand_like(got[0])
        mask = [True, target.is_floating_point()]
        arguments = (grad, input, target, weight, got[1], *rest, mask)
        gradients = call_without_kernel(ops.cross_entropy_losses_backward, *arguments)
        for gradient, expected in zip(
            gradients, ops.cross_entropy_losses_backward(*arguments), strict=True
        ):
            torch.testing.assert_close(gradient, expected)
            assert gradient.stride() == expected.stride()


def test_devices_without_a_kernel_warn_once(monkeypatch):
    monkeypatch.setattr(_ops, "_warned", set())
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    operator = torch.ops.sqloss.pointwise_losses.default
    with pytest.warns(UserWarning, match="losses has no kernel for device type cpu") as caught:
        for arguments in pointwise_arguments():
            operator._op_dk(key, *arguments)
    assert len(caught) == 1


# --- errors ---------------------------------------------------------------------------------------

X, Y = torch.arange(6.0).view(2, 3), torch.ones(2, 3)
G = X.clone().requires_grad_()
POINTWISE_ERRORS = [
    (lambda f: f([1.0], Y), TypeError, "input: expected a tensor, got list"),
    (lambda f: f(X, 1.0), TypeError, "target: expected a tensor, got float"),
    (lambda f: f(X.long(), Y), TypeError, "input: expected a dense tensor of .*int64"),
    (lambda f: f(X, Y.long()), TypeError, "target: expected a dense tensor of .*int64"),
    (lambda f: f(X, Y > 0), TypeError, "target: expected a dense tensor of .*bool"),
    (lambda f: f(X.to_sparse(), Y), TypeError, "input: .*torch.sparse_coo"),
    (lambda f: f(X, Y[:, :2]), ValueError, r"target: expected .* input, \(2, 3\), got \(2, 2\)"),
    (lambda f: f(X, Y.to("meta")), ValueError, "target: expected the device of input, cpu, got me"),
    (lambda f: f(X[0, 0], Y[0, 0]), ValueError, "input: expected at least one dimension"),
    (lambda f: f(X, Y, sample_dims=0), ValueError, r"sample_dims: expected .*\[1, 2\].*got 0"),
    (lambda f: f(X, Y, sample_dims=3), ValueError, r"sample_dims: .*\(2, 3\), got 3"),
    (lambda f: f(X, Y, sample_dims=-1), ValueError, "sample_dims: .*got -1"),
    (lambda f: f(X, Y, sample_dims=True), TypeError, "sample_dims: expected an int, got bool"),
    (lambda f: f(X, Y, sample_dims=1.0), TypeError, "sample_dims: expected an int, got float"),
    (
        lambda f: f(X, Y, reduction="none"),
        ValueError,
        "reduction: expected 'mean' or 'sum', got 'n",
    ),
    (
        lambda f: f(X, Y, reduction=None),
        ValueError,
        "reduction: expected 'mean' or 'sum', got None",
    ),
]
CVAR_ERRORS = [
    (lambda f, *a: f(*a), TypeError, "alpha, tail_fraction: expected one of them, got neither"),
    (lambda f, *a: f(*a, alpha=0.5, tail_fraction=0.5), TypeError, "one of them, got both"),
    (lambda f, *a: f(*a, alpha=1.0), ValueError, r"alpha: expected a confidence level in \[0, 1\)"),
    (lambda f, *a: f(*a, alpha="0.5"), TypeError, "alpha: expected a number, got str"),
    (lambda f, *a: f(*a, tail_fraction=0), ValueError, r"tail_fraction: .*\(0, 1\], got 0"),
    (lambda f, *a: f(*a, alpha=0.5, extra=1.0), TypeError, "extra: expected a tensor, got float"),
    (lambda f, *a: f(*a, alpha=0.5, extra=X[:, 0].long()), TypeError, "extra: .*int64"),
    (lambda f, *a: f(*a, alpha=0.5, extra=X), ValueError, r"extra: .*losses, \(2,\), got \(2, 3\)"),
    (lambda f, *a: f(*a, alpha=0.5, extra=X[:1, 0]), ValueError, r"extra: .*got \(1,\)"),
    (lambda f, *a: f(*a, alpha=0.5, extra=X[0, 0]), ValueError, r"extra: .*got \(\)"),
    (lambda f, *a: f(*a, alpha=0.5, extra=X[:, 0].to("meta")), ValueError, "extra: .*device"),
]
NAMES = ["binary_cross_entropy_with_logits", "mse_loss", "smooth_l1_loss"]


def both(name, **options):
    """The function of the losses and that of their tail, by the names in their errors."""
    tail = getattr(sqloss, f"cvar_{name}")
    yield name, lambda *a, **k: getattr(sqloss.losses, name)(*a, **k, **options)
    yield f"cvar_{name}", lambda *a, **k: tail(*a, **k, **options, alpha=0.5)


@pytest.mark.parametrize("name", [*NAMES, "gaussian_nll_loss"])
@pytest.mark.parametrize("call, error, message", POINTWISE_ERRORS)
def test_errors_name_function_argument_expected_and_got(name, call, error, message):
    options = {"var": 1.0} if name == "gaussian_nll_loss" else {}
    for function, f in both(name, **options):
        with pytest.raises(error, match=f"^{function}: {message}"):
            call(f)


@pytest.mark.parametrize("name", [*NAMES, "gaussian_nll_loss", "cross_entropy"])
@pytest.mark.parametrize("call, error, message", CVAR_ERRORS)
def test_errors_of_the_tail(name, call, error, message):
    function = getattr(sqloss, f"cvar_{name}")
    target = torch.tensor([0, 1]) if name == "cross_entropy" else Y
    given_ = (X, target, 1.0) if name == "gaussian_nll_loss" else (X, target)
    with pytest.raises(error, match=f"^cvar_{name}: .*{message}"):
        call(function, *given_)


WEIGHT_ERRORS = [
    ([1.0], TypeError, "expected a tensor, got list"),
    (Y.long(), TypeError, "expected a dense tensor of .*int64"),
    (Y > 0, TypeError, "expected a dense tensor of .*bool"),
    (
        Y[:, :2],
        ValueError,
        r"expected a shape that broadcasts to that of input, \(2, 3\), got \(2, 2",
    ),
    (Y[None], ValueError, r"expected a shape that broadcasts .*got \(1, 2, 3\)"),
    (Y.to("meta"), ValueError, "expected the device of input, cpu, got meta"),
    (G, ValueError, "expected a tensor without gradient"),
]


@pytest.mark.parametrize("weight, error, message", WEIGHT_ERRORS)
def test_errors_of_weights(weight, error, message):
    for name in NAMES:
        for function, f in both(name, weight=weight):
            with pytest.raises(error, match=f"^{function}: weight: {message}"):
                f(X, Y)
    for function, f in both(NAMES[0], pos_weight=weight):
        with pytest.raises(error, match=f"^{function}: pos_weight: {message}"):
            f(X, Y)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"beta": -1.0}, ValueError, "beta: expected a finite number >= 0, got -1.0"),
        ({"beta": NAN}, ValueError, "beta: .*got nan"),
        ({"beta": "1"}, TypeError, "beta: expected a number, got str"),
        ({"beta": torch.tensor(1.0)}, TypeError, "beta: expected a number, got Tensor"),
        ({"delta": 0.0}, ValueError, "delta: expected a finite number > 0, got 0.0"),
        ({"delta": INF}, ValueError, "delta: expected a finite number > 0, got inf"),
        (
            {"delta": 2.0, "beta": 0.5},
            ValueError,
            "beta, delta: expected one of them, got beta=0.5",
        ),
    ],
)
def test_errors_of_beta_and_delta(options, error, message):
    for function, f in both("smooth_l1_loss", **options):
        with pytest.raises(error, match=f"^{function}: {message}"):
            f(X, Y)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"var": -1.0}, ValueError, "var: expected a finite number >= 0, got -1.0"),
        ({"var": NAN}, ValueError, "var: expected a finite number >= 0, got nan"),
        ({"var": [1.0]}, TypeError, "var: expected a number, got list"),
        ({"var": Y.long()}, TypeError, "var: expected a dense tensor"),
        ({"var": Y.to("meta")}, ValueError, "var: expected the device of input"),
        ({"var": Y[0]}, ValueError, r"var: expected a number or the shape of input, .*got \(3,\)"),
        ({"var": Y[:1, :1]}, ValueError, r"var: expected a number .*, got \(1, 1\)"),
        ({"var": Y[:, :2]}, ValueError, r"var: expected a number .*, got \(2, 2\)"),
        ({"var": 1.0, "eps": 0}, ValueError, "eps: expected a finite number > 0, got 0"),
        ({"var": 1.0, "eps": "0"}, TypeError, "eps: expected a number, got str"),
    ],
)
def test_errors_of_var_and_eps(options, error, message):
    for function, f in both("gaussian_nll_loss", **options):
        with pytest.raises(error, match=f"^{function}: {message}"):
            f(X, Y)


C = torch.tensor([0, 2])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda f: f([1.0], C), TypeError, "input: expected a tensor, got list"),
        (lambda f: f(X.long(), C), TypeError, "input: expected a dense tensor"),
        (lambda f: f(X[0, 0], C), ValueError, r"input: expected \[C\] or \[N, C, ...\], got a sca"),
        (lambda f: f(X, 1), TypeError, "target: expected a tensor, got int"),
        (lambda f: f(X, C > 0), TypeError, "target: expected classes .*, got torch.bool"),
        (lambda f: f(X, C.to(torch.complex64)), TypeError, "target: expected classes .*complex64"),
        (
            lambda f: f(X, C[:1]),
            ValueError,
            r"target: expected classes of shape \(2,\) or .*\(1,\)",
        ),
        (lambda f: f(X, C[:, None]), ValueError, r"target: expected classes of .*\(2, 1\)"),
        (lambda f: f(X[0], C), ValueError, r"target: expected classes of shape \(\) or .*\(2,\)"),
        (lambda f: f(X, Y[:, :2]), ValueError, r"target: expected the shape of input, \(2, 3\)"),
        (lambda f: f(X, C.to("meta")), ValueError, "target: expected the device of input, cpu"),
        (lambda f: f(X, Y, ignore_index=1), ValueError, "ignore_index: expected none with prob"),
        (
            lambda f: f(X, C, ignore_index=2**63),
            ValueError,
            "ignore_index: expected an int64, got 9",
        ),
        (
            lambda f: f(X, C, ignore_index=1.0),
            TypeError,
            "ignore_index: expected an int, got float",
        ),
        (lambda f: f(X, C, [1.0]), TypeError, "weight: expected a tensor, got list"),
        (lambda f: f(X, C, C), TypeError, "weight: expected a dense tensor"),
        (lambda f: f(X, C, Y), ValueError, r"weight: expected one .* shape \(3,\), got \(2, 3\)"),
        (lambda f: f(X, C, Y[0, :2]), ValueError, r"weight: expected one weight per .*\(2,\)"),
        (lambda f: f(X, C, Y[0].to("meta")), ValueError, "weight: expected the device of input"),
        (lambda f: f(X, C, G[0]), ValueError, "weight: expected a tensor without gradient"),
        (
            lambda f: f(X, C, label_smoothing=-0.1),
            ValueError,
            r"label_smoothing: .*\[0, 1\], got -",
        ),
        (lambda f: f(X, C, label_smoothing=1.1), ValueError, r"label_smoothing: .*\[0, 1\], got 1"),
        (lambda f: f(X, C, label_smoothing=NAN), ValueError, "label_smoothing: .*got nan"),
        (lambda f: f(X, C, label_smoothing="0"), TypeError, "label_smoothing: .*got str"),
    ],
)
def test_errors_of_the_cross_entropy(call, error, message):
    for function, f in both("cross_entropy"):
        with pytest.raises(error, match=f"^{function}: {message}"):
            call(f)


@every_case
def test_an_empty_batch_has_no_tail(case):
    with pytest.raises(ValueError, match=f"^cvar_{case.name}: input: expected at least one"):
        case.cvar(case.draw(0, 5), 0.5)
    with pytest.raises(ValueError, match=f"^cvar_{case.name}: input: expected at least one"):
        case.cvar(case.draw(4, 0, 5), 0.5, sample_dims=2)


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0)])
def test_an_empty_batch_has_no_tail_of_cross_entropies(device, shape):
    x = torch.empty(shape, device=device, requires_grad=True)
    target = torch.empty(shape[:1] + shape[2:], dtype=torch.int64, device=device)
    for given_ in (target, x.detach()):
        with pytest.raises(ValueError, match=r"^cvar_cross_entropy: input: expected at least one"):
            sqloss.cvar_cross_entropy(x, given_, alpha=0.5)
        losses = sqloss.losses.cross_entropy(x, given_)
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        assert losses.numel() == 0 and gradient.shape == x.shape


def test_weights_may_require_gradients_where_none_are_taken():
    with torch.no_grad():
        assert sqloss.cvar_mse_loss(X, Y, G, alpha=0.5).isfinite()
        assert sqloss.cvar_cross_entropy(X, G.softmax(1), G[0], alpha=0.5).isfinite()


def test_no_derivative_in_the_weights_is_taken_for_zero():
    from torch.func import grad, jvp

    bce = sqloss.cvar_binary_cross_entropy_with_logits
    for function, f in (
        (sqloss.cvar_mse_loss, lambda w: sqloss.cvar_mse_loss(X, Y, w, alpha=0.5)),
        (bce, lambda w: bce(X, Y, pos_weight=w, alpha=0.5)),
        (sqloss.cvar_cross_entropy, lambda w: sqloss.cvar_cross_entropy(X, C, w[0], alpha=0.5)),
    ):
        message = f"^{function.__name__}: .*weight: expected a tensor without gradient"
        with pytest.raises(ValueError, match=message):
            grad(f)(Y)
        with pytest.raises(ValueError, match=message):
            jvp(f, (Y,), (Y,))


# --- where the kernels change -------------------------------------------------------------------

# Around a warp, a block, and what a block's shared memory holds
LIMITS = [1, 2, 31, 32, 33, 127, 129, 255, 257, 1023, 1024, 1025, 4097, 2**14 + 1, 49_153]


@every_case
@pytest.mark.parametrize("n", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_where_the_kernels_change(device, case, n, dtype):
    assert_matches_torch(case, case.draw(3, n, dtype=dtype, device=device), 0.5)
    assert_matches_torch(case, case.draw(n, 3, dtype=dtype, device=device), 0.5)
    assert_matches_torch(case, case.draw(n + 2, dtype=dtype, device=device), 0.5)


@pytest.mark.parametrize("n", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probabilities", [False, True])
def test_cross_entropy_where_the_kernels_change(device, n, dtype, probabilities):
    options = {"dtype": dtype, "device": device, "probabilities": probabilities, "weight": True}
    for shape in ((3, n), (n, 3), (2, 5, n), (1, min(n, 4097), 3)):
        tensors = draw_classes(*shape, **options)
        if probabilities:
            tensors["target"] = tensors["target"] / tensors["target"].sum(1, keepdim=True)
        assert_cross_entropy_matches_torch(tensors, 0.5, label_smoothing=0.1)


def test_a_class_out_of_range_asserts_on_a_gpu(gpu, tmp_path):
    """In a process of its own, for CUDA's context ends with it."""
    program = """
import torch
import sqloss
target = torch.tensor([0, 3], device="cuda")
sqloss.losses.cross_entropy(torch.zeros(2, 3, device="cuda"), target)
torch.cuda.synchronize()
"""
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert said.returncode != 0 and "device-side assert" in said.stderr


def test_more_elements_than_32_bits_can_count(roomy_gpu):
    n, elements = 2**16 + 1, 2**15
    x = torch.zeros(n, elements, dtype=torch.bfloat16, device=roomy_gpu)
    x[-1] = 2
    x.requires_grad_()
    value, losses = sqloss.cvar_mse_loss(
        x, torch.zeros_like(x), tail_fraction=1 / n, return_losses=True
    )
    assert value.item() == 4 and losses.unique().tolist() == [0, 4] and losses[-1] == 4
    (gradient,) = torch.autograd.grad(value, x)
    assert gradient[-1].unique().tolist() == [4 / elements]
    assert gradient[:-1].count_nonzero() == 0
    del gradient, losses, value

    target = torch.zeros(n, dtype=torch.int64, device=roomy_gpu)
    target[-1] = elements - 1
    with torch.no_grad():
        x[-1, -1] = -20  # the least likely of its classes
    value, losses = sqloss.cvar_cross_entropy(x, target, tail_fraction=1 / n, return_losses=True)
    assert losses[:-1].unique().tolist() == pytest.approx([math.log(elements)], rel=1e-5)
    expected = 20 + math.log(math.exp(2) * (elements - 1) + math.exp(-20))
    assert value.item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(value, x)
    assert gradient[-1, -1].item() == -1 and gradient[:-1].count_nonzero() == 0
