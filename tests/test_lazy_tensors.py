"""Tensors whose memory does not hold their elements, as arguments of every operator: sign bits
that are still to be applied, zeros without memory, results of collectives nobody has waited for.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce

import sqloss


@pytest.fixture(scope="module", autouse=True)
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def negative(x):
    return torch._neg_view(-x)


def imaginary(x):
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def collected(x):
    return all_reduce(x, "sum", dist.group.WORLD)


def zeros(x):
    return torch._efficientzerotensor(x.shape, dtype=x.dtype)


KINDS = {
    negative: lambda x: x.is_neg() and x.dtype != torch.bool,
    imaginary: lambda x: x.is_neg() and x.stride(-1) == 2,
    collected: lambda x: isinstance(x, AsyncCollectiveTensor),
    zeros: lambda x: x._is_zerotensor(),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
MAY_BE_ZEROS = {"losses", "input", "target", "loc", "extra", "seed", "rows"}


def as_kind(kind, name, tensor):
    """The tensor as that kind, if there is such a one: there is no sign of bool."""
    there_is = {
        negative: tensor.dtype != torch.bool,
        imaginary: tensor.is_floating_point() and tensor.dim() > 0,
        collected: True,
        zeros: name in MAY_BE_ZEROS,
    }[kind]
    if not there_is:
        return tensor
    lazy = kind(tensor)
    assert KINDS[kind](lazy)
    return lazy


def rand(*shape):
    return torch.rand(shape) + 0.1


def pointwise(function, n, **tensors):
    return partial(function, alpha=0.8), {
        "input": torch.randn(n, 6),
        "target": torch.rand(n, 6),
        **tensors,
    }


def cross_entropy(target, n=50):
    return partial(sqloss.cvar_cross_entropy, alpha=0.8, return_losses=True), {
        "input": torch.randn(n, 5),
        "target": target,
        "weight": rand(5),
        "extra": torch.randn(n),
    }


def latents(function, **tensors):
    tensors = {"loc": torch.randn(7, 3), "scale": rand(7, 3), **tensors}
    return function, {**tensors, "seed": torch.tensor(7), "rows": torch.arange(7)}


def cases():
    losses, weight, mask = torch.randn(50), rand(50), torch.rand(50) < 0.7
    rows = {"losses": torch.randn(5, 40), "weight": rand(40), "mask": torch.rand(5, 40) < 0.7}
    bce = sqloss.cvar_binary_cross_entropy_with_logits
    student_t, normal = sqloss.student_t_rsample_kl, sqloss.normal_rsample_kl
    ranks = sqloss.distributed
    return {
        "cvar": (partial(sqloss.cvar, alpha=0.8), {"losses": losses}),
        "cvar, rows": (partial(sqloss.cvar, alpha=0.8, dim=1), rows),
        "cvar, double": (
            partial(sqloss.cvar, alpha=0.8),
            {"losses": losses.double(), "weight": weight.double()},
        ),
        "value_at_risk": (partial(sqloss.value_at_risk, alpha=0.8, dim=1), rows),
        "tail_weights": (partial(sqloss.tail_weights, alpha=0.8, dim=1), rows),
        "tail_indices": (
            partial(sqloss.tail_indices, alpha=0.8),
            {"losses": losses, "mask": mask},
        ),
        "tail_loss": (
            lambda input, mask: sqloss.tail_loss(torch.square, input, alpha=0.8, mask=mask),
            {"input": losses, "mask": mask},
        ),
        "bce, few": pointwise(bce, 30, weight=rand(30, 6), pos_weight=rand(6), extra=rand(30)),
        "bce, many": pointwise(bce, 3000, weight=rand(3000, 6), extra=rand(3000)),
        "mse": pointwise(sqloss.cvar_mse_loss, 30, weight=rand(30, 6)),
        "smooth l1": pointwise(sqloss.cvar_smooth_l1_loss, 30),
        "gaussian nll": pointwise(sqloss.cvar_gaussian_nll_loss, 30, var=rand(30, 6)),
        "cross-entropy, classes": cross_entropy(torch.randint(5, (50,))),
        "cross-entropy, probabilities": cross_entropy(torch.rand(50, 5)),
        "cross-entropy, many": cross_entropy(torch.randint(5, (5000,)), 5000),
        "Student-t": latents(student_t, df=1 + rand(3), prior_df=2 + rand(3)),
        "normal": latents(normal),
        "distributed.cvar": (
            partial(ranks.cvar, alpha=0.8),
            {"losses": losses, "weight": weight, "mask": mask},
        ),
        "distributed.cvar, double": (
            partial(ranks.cvar, alpha=0.8),
            {"losses": losses.double(), "weight": weight.double()},
        ),
        "distributed.tail_indices": (
            partial(ranks.tail_indices, alpha=0.8),
            {"losses": losses, "weight": weight, "mask": mask},
        ),
        "distributed.tail_loss": (
            lambda input, mask: ranks.tail_loss(torch.square, input, alpha=0.8, mask=mask),
            {"input": losses, "mask": mask},
        ),
    }


HAVE_GRADIENTS = {"losses", "input", "var", "loc", "scale", "df"}


def outcomes(function, tensors, incoming):
    """Outputs, and gradients for these of the outputs."""
    leaves = {
        name: tensor.detach().requires_grad_()
        for name, tensor in tensors.items()
        if name in HAVE_GRADIENTS
    }
    outputs = function(**{**tensors, **leaves})
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    wanted = [output for output in outputs if output.requires_grad]
    gradients = []
    if wanted:
        gradients = torch.autograd.grad(
            wanted,
            list(leaves.values()),
            [incoming(output) for output in wanted],
            allow_unused=True,
        )
    return [*(output.detach() for output in outputs), *gradients]


def ones(output):
    return torch.full(output.shape, -1.5, dtype=output.dtype)


@every_kind
@pytest.mark.parametrize("case", cases())
def test_elements_are_read_and_not_memory(case, kind):
    function, tensors = cases()[case]
    lazy = {name: as_kind(kind, name, tensor) for name, tensor in tensors.items()}
    plain = {name: tensor.clone() for name, tensor in lazy.items()}
    assert not any(lies(tensor) for tensor in plain.values() for lies in KINDS.values())
    expected = outcomes(function, plain, ones)
    got = outcomes(function, lazy, ones)
    got_of_lazy_gradients = outcomes(
        function, plain, lambda output: as_kind(kind, "", ones(output))
    )
    for a, b, c in zip(got, got_of_lazy_gradients, expected, strict=True):
        assert (a is None) == (b is None) == (c is None)
        if c is not None:
            assert torch.equal(a, c) and torch.equal(b, c)


@pytest.mark.parametrize("kind", [negative, imaginary])
@pytest.mark.parametrize("case", ["cvar, rows", "bce, few", "cross-entropy, classes", "Student-t"])
def test_compiled(case, kind):
    """Where they are made in the graph, and where they come into it."""
    function, tensors = cases()[case]
    lazy = {name: as_kind(kind, name, tensor) for name, tensor in tensors.items()}

    def in_graph(**tensors):
        return function(**{name: as_kind(kind, name, tensor) for name, tensor in tensors.items()})

    expected = outcomes(function, tensors, ones)
    for each, given in ((function, lazy), (in_graph, tensors)):
        compiled = torch.compile(each, backend="aot_eager")
        torch.testing.assert_close(outcomes(compiled, given, ones), expected)


def test_tangents_that_are_zeros():
    losses, weight = torch.randn(50), rand(50)
    for tangent, of_value in ((zeros(losses), 0.0), (negative(torch.ones(50)), 1.0)):
        with forward_ad.dual_level():
            value = sqloss.cvar(forward_ad.make_dual(losses, tangent), 0.8, weight=weight)
            got = forward_ad.unpack_dual(value).tangent
            assert got.item() == pytest.approx(of_value)


def test_the_sign_that_was_lost():
    losses = torch.tensor([1 + 3j]).conj().imag
    for cvar in (sqloss.cvar, sqloss.distributed.cvar):
        assert cvar(losses, 0.5).item() == -3
