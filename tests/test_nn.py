import copy
import inspect
import pickle

import pytest
import torch

import sqloss


def test_module_is_the_function():
    losses = torch.randn(5, 7)
    weight, mask = torch.rand(5, 7), torch.rand(5, 7) < 0.8
    for options in ({"alpha": 0.7}, {"tail_fraction": 0.2, "dim": 1, "keepdim": True}):
        module = sqloss.nn.CVaR(**options)
        assert torch.equal(module(losses), sqloss.cvar(losses, **options))
        got = module(losses, weight=weight, mask=mask)
        assert torch.equal(got, sqloss.cvar(losses, weight=weight, mask=mask, **options))
        assert list(module.parameters()) == [] and module.state_dict() == {}


def test_alpha_is_an_attribute():
    module = sqloss.nn.CVaR(0.5)
    module.alpha = 0.0
    losses = torch.rand(10)
    torch.testing.assert_close(module(losses), losses.mean())


def test_repr():
    assert repr(sqloss.nn.CVaR(0.8)) == "CVaR(alpha=0.8)"
    module = sqloss.nn.CVaR(tail_fraction=0.1, dim=1)
    assert repr(module) == "CVaR(tail_fraction=0.1, dim=1)"
    assert repr(sqloss.nn.CVaR(0.5, keepdim=True)) == "CVaR(alpha=0.5, keepdim=True)"


def test_errors_come_when_it_is_made():
    with pytest.raises(ValueError, match="CVaR: alpha: expected a confidence level"):
        sqloss.nn.CVaR(1.0)
    with pytest.raises(TypeError, match="CVaR: alpha, tail_fraction: expected one of them"):
        sqloss.nn.CVaR()


# --- the fused losses -----------------------------------------------------------------------------

FUSED = {
    "BCEWithLogitsLoss": "cvar_binary_cross_entropy_with_logits",
    "CrossEntropyLoss": "cvar_cross_entropy",
    "MSELoss": "cvar_mse_loss",
    "SmoothL1Loss": "cvar_smooth_l1_loss",
    "GaussianNLLLoss": "cvar_gaussian_nll_loss",
}
OPTIONS = [
    ("BCEWithLogitsLoss", {"reduction": "sum", "sample_dims": 2}),
    ("CrossEntropyLoss", {"ignore_index": 1, "label_smoothing": 0.1}),
    ("MSELoss", {"reduction": "sum", "sample_dims": 2}),
    ("SmoothL1Loss", {"beta": 0.5, "reduction": "sum", "sample_dims": 2}),
    ("SmoothL1Loss", {"delta": 0.5}),
    ("GaussianNLLLoss", {"full": True, "eps": 0.1, "reduction": "sum", "sample_dims": 2}),
]


def inputs(name):
    x, y = torch.randn(6, 4), torch.rand(6, 4)
    if name == "CrossEntropyLoss":
        y = torch.randint(4, (6,))
        y[:2] = torch.tensor([0, 2])
    return (x, y, torch.rand(6, 4)) if name == "GaussianNLLLoss" else (x, y)


@pytest.mark.parametrize("name, options", OPTIONS)
def test_a_fused_module_is_its_function(name, options):
    for tail in ({"alpha": 0.4}, {"tail_fraction": 0.3}):
        module = getattr(sqloss.nn, name)(**options, **tail)
        function = getattr(sqloss, FUSED[name])
        given = inputs(name)
        assert torch.equal(module(*given), function(*given, **options, **tail))
        dims = 0 if name == "CrossEntropyLoss" else options.get("sample_dims", 1)
        extra = torch.randn(given[0].shape[: max(dims, 1)])
        module.return_losses = True
        value, losses = module(*given, extra=extra)
        expected = function(*given, extra=extra, return_losses=True, **options, **tail)
        assert torch.equal(value, expected[0]) and torch.equal(losses, expected[1])
        assert list(module.parameters()) == []


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_module_takes_the_arguments_of_torchs(name):
    """By name, but for those that torch itself deprecates; and of alpha 0 it is torch's."""
    ours = inspect.signature(getattr(sqloss.nn, name)).parameters
    torchs = inspect.signature(getattr(torch.nn, name)).parameters
    for parameter, of_torch in torchs.items():
        if parameter not in ("size_average", "reduce", "reduction"):
            assert ours[parameter].default == of_torch.default
    given = inputs(name)
    torch.testing.assert_close(
        getattr(sqloss.nn, name)(alpha=0.0)(*given), getattr(torch.nn, name)()(*given)
    )


def test_weights_are_buffers():
    weight, pos_weight = torch.rand(4), torch.rand(4) * 2
    module = sqloss.nn.BCEWithLogitsLoss(weight, pos_weight=pos_weight, alpha=0.5)
    x, y = inputs("BCEWithLogitsLoss")
    expected = sqloss.cvar_binary_cross_entropy_with_logits(
        x, y, weight, pos_weight=pos_weight, alpha=0.5
    )
    assert torch.equal(module(x, y), expected)
    assert set(module.state_dict()) == {"weight", "pos_weight"}
    assert module.double().weight.dtype == torch.float64
    module = sqloss.nn.CrossEntropyLoss(weight, alpha=0.5)
    x, y = inputs("CrossEntropyLoss")
    assert torch.equal(module(x, y), sqloss.cvar_cross_entropy(x, y, weight, alpha=0.5))
    assert set(module.state_dict()) == {"weight"}
    assert sqloss.nn.CrossEntropyLoss(alpha=0.5).state_dict() == {}


@pytest.mark.parametrize("name", ["MSELoss", "SmoothL1Loss"])
def test_weights_of_a_call(name):
    x, y = inputs(name)
    weight = torch.rand(6, 1)
    got = getattr(sqloss.nn, name)(alpha=0.5)(x, y, weight=weight)
    assert torch.equal(got, getattr(sqloss, FUSED[name])(x, y, weight=weight, alpha=0.5))


def test_repr_of_fused_modules():
    module = sqloss.nn.SmoothL1Loss(alpha=0.8, delta=2.0, reduction="sum")
    assert repr(module) == "SmoothL1Loss(alpha=0.8, delta=2.0, reduction='sum')"
    module = sqloss.nn.CrossEntropyLoss(torch.ones(3), tail_fraction=0.1)
    assert repr(module) == "CrossEntropyLoss(tail_fraction=0.1)"


@pytest.mark.parametrize("name", FUSED)
def test_errors_come_when_a_fused_module_is_made(name):
    with pytest.raises(ValueError, match=f"{name}: alpha: expected a confidence level"):
        getattr(sqloss.nn, name)(alpha=1.0)
    with pytest.raises(TypeError, match=f"{name}: alpha, tail_fraction: expected one of them"):
        getattr(sqloss.nn, name)()


def test_modules_can_be_copied_and_pickled():
    for name in FUSED:
        module = getattr(sqloss.nn, name)(alpha=0.3)
        module.alpha = 0.6
        given = inputs(name)
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(copied(*given), module(*given))
