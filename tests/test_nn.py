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
