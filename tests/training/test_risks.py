import pytest
import torch

import sqloss
from sqloss.common.errors import UserError
from sqloss.training.risks import RISKS, CVaR, Mean


@pytest.mark.parametrize("risk", [CVaR(0.0), Mean()])
def test_alpha_0_is_literally_the_mean(risk):
    losses = torch.rand(1001)
    assert torch.equal(risk(losses), losses.mean())
    assert risk.is_mean and risk.tail_alpha is None and risk.words == "mean"
    torch.testing.assert_close(risk.weights(losses), torch.full((1001,), 1 / 1001))


def test_other_alphas_are_the_superquantile():
    losses = torch.arange(10.0) ** 2
    risk = CVaR(0.75)
    torch.testing.assert_close(risk(losses), torch.tensor(67.8))
    torch.testing.assert_close(risk(losses), sqloss.cvar(losses, 0.75))
    torch.testing.assert_close(risk.weights(losses)[-3:], torch.tensor([0.2, 0.4, 0.4]))
    assert (risk.words, risk.flags, risk.tail_alpha) == ("CVaR 0.75", "--alpha 0.75", 0.75)


@pytest.mark.parametrize("alpha", [-0.1, 1.0, float("nan")])
def test_an_alpha_out_of_range(alpha):
    with pytest.raises(UserError, match=r"--alpha: expected a number in \[0, 1\), got"):
        CVaR(alpha)


def test_every_risk_has_its_name_and_weighs_losses_as_its_gradient_does():
    losses = torch.rand(100, dtype=torch.float64)
    for name, kind in RISKS.items():
        risk = kind().of_model()
        assert risk.name == name and risk.words and risk.flags == kind().flags
        moved = losses.clone()
        moved[7] += 1e-6
        slope = (risk(moved) - risk(losses)) / 1e-6
        torch.testing.assert_close(risk.weights(losses)[7], slope, atol=1e-6, rtol=1e-4)
