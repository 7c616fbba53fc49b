from types import SimpleNamespace

import pytest
import torch

import sqloss
from sqloss.common.errors import UserError
from sqloss.training.risks import RISKS, CVaR, Mean, TopK


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


def test_top_k_falls_to_its_share_of_the_least_losses():
    risk = TopK(topk_share=0.25, topk_decay=0.5)
    losses = torch.tensor([5.0, 1.0, 8.0, 2.0, 3.0, 7.0, 4.0, 6.0], requires_grad=True)
    assert risk(losses).item() == 1.5 and risk.words == "mean of the least 0.25"
    running = risk.of_model()
    for epoch, least in enumerate((8, 4, 2, 2)):  # of 8: halved twice, and no further
        running.start_epoch(None, None, SimpleNamespace(epoch=epoch))
        assert running(losses).item() == sum(range(1, least + 1)) / least
        weights = running.weights(losses)
        assert torch.equal(weights, (losses <= least).float() / least)
    running.risk = TopK(topk_share=0.3125)  # a half of the third counts too
    running.start_epoch(None, None, SimpleNamespace(epoch=1000))
    torch.testing.assert_close(running(losses).item(), (1 + 2 + 3 / 2) / 2.5)
    assert TopK(topk_share=1.0)(losses).item() == losses.mean().item()


@pytest.mark.parametrize("setting", ["topk_share", "topk_decay"])
@pytest.mark.parametrize("value", [0.0, 1.5, float("nan")])
def test_a_top_k_out_of_range(setting, value):
    error = rf"--{setting.replace('_', '-')}: expected a number in \(0, 1\], got"
    with pytest.raises(UserError, match=error):
        TopK(**{setting: value})
