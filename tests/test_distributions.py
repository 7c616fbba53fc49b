"""sqloss.distributions in the place of torch.distributions, and in the hands of its code."""

import copy
import math
import pickle

import pytest
import torch
from scipy import stats
from torch import distributions
from torch.distributions import Independent, TransformedDistribution, kl_divergence

import sqloss
from sqloss.distributions import StudentT


def parameters(*shape, dtype=torch.float64):
    df, loc, scale = torch.rand(3, *shape, dtype=dtype)
    return [t.requires_grad_() for t in (2 + 5 * df, 4 * loc - 2, scale + 0.2)]


def test_all_but_the_samples_is_torchs():
    given = parameters(4, 3)
    ours, of_torch = StudentT(*given), distributions.StudentT(*given)
    value = torch.randn(5, 4, 3, dtype=torch.float64)
    assert isinstance(ours, distributions.StudentT) and ours.has_rsample
    for name in ("batch_shape", "event_shape", "mean", "variance", "mode", "stddev"):
        a, b = getattr(ours, name), getattr(of_torch, name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert torch.equal(ours.log_prob(value), of_torch.log_prob(value))
    assert torch.equal(ours.entropy(), of_torch.entropy())
    assert str(ours) == str(of_torch)


@pytest.mark.parametrize("sample_shape", [(), (7,), (2, 3), (0,), (2, 0, 3), torch.Size([5])])
@pytest.mark.parametrize("batch_shape", [(), (3,), (4, 3), (0,), (2, 1, 3)])
def test_shapes_of_samples(sample_shape, batch_shape):
    given = parameters(*batch_shape)
    p = StudentT(*given)
    z = p.rsample(sample_shape)
    assert z.shape == (*sample_shape, *batch_shape) and z.dtype == torch.float64
    gradients = torch.autograd.grad(z.sum(), given, allow_unused=True, materialize_grads=True)
    assert all(g.isfinite().all() for g in gradients)
    sample = p.sample(sample_shape)
    assert sample.shape == z.shape and not sample.requires_grad
    assert len(z.unique()) == z.numel()


def test_samples_are_those_of_the_function():
    given = parameters(4, 3)
    torch.manual_seed(1)
    z = StudentT(*given).rsample((2, 5))
    torch.manual_seed(1)
    expected = sqloss.student_t_rsample(*given, num_samples=10)
    assert torch.equal(z, expected.view(2, 5, 4, 3))
    weight = torch.randn_like(z)
    got = torch.autograd.grad((z * weight).sum(), given)
    expected = torch.autograd.grad((expected * weight.view(10, 4, 3)).sum(), given)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("df", [0.7, 5.0, math.inf])
def test_samples_are_of_the_distribution(df):
    z = StudentT(df, 1.0, 2.0).sample((20_000,))
    assert stats.kstest(z.numpy(), stats.t(df, 1.0, 2.0).cdf).pvalue > 1e-4


def test_expand_copy_and_pickle():
    p = StudentT(3.0, torch.zeros(3, 1), 2.0)
    wide = p.expand((5, 3, 4))
    assert type(wide) is StudentT and wide.sample((2,)).shape == (2, 5, 3, 4)
    assert wide.loc.stride()[0] == 0
    p.kl_num_samples = 7
    wide = p.expand((2, 3, 2)).expand((4, 2, 3, 2))
    assert wide.kl_num_samples == 7 and StudentT.kl_num_samples == 128
    assert wide.log_prob(wide.rsample()).shape == (4, 2, 3, 2)
    for again in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        torch.manual_seed(0)
        expected = p.sample()
        torch.manual_seed(0)
        assert torch.equal(again.sample(), expected)


def test_arguments_are_validated_as_torchs_are():
    for wrong in ((0.0,), (-1.0,), (1.0, 0.0, -1.0), (1.0, math.nan)):
        with pytest.raises(ValueError, match="Expected parameter"):
            StudentT(*wrong, validate_args=True)
    p = StudentT(3.0, validate_args=True)
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(torch.tensor(math.nan))


def test_wrapped_distributions():
    df, loc, scale = parameters(4, 3)
    posterior = Independent(StudentT(df, loc, scale), 1)
    z = posterior.rsample((6,))
    assert z.shape == (6, 4, 3) and posterior.log_prob(z).shape == (6, 4)
    positive = TransformedDistribution(StudentT(df, loc, scale), distributions.ExpTransform())
    samples = positive.rsample((6,))
    assert (samples > 0).all() and positive.log_prob(samples).shape == (6, 4, 3)
    (gradient,) = torch.autograd.grad(samples.log().sum(), loc)
    torch.testing.assert_close(gradient, torch.full_like(loc, 6.0))
    weights = distributions.Categorical(torch.ones(4, 3))
    mixture = distributions.MixtureSameFamily(weights, StudentT(df, loc, scale))
    assert mixture.sample((5,)).shape == (5, 4)


def test_vmap():
    loc = torch.zeros(5, 3)

    def samples(loc):
        return StudentT(5.0, loc, 1.0, validate_args=False).rsample((2,))

    z = torch.func.vmap(samples, randomness="different")(loc)
    assert z.shape == (5, 2, 3) and len(z.unique()) == z.numel()

    def divergence(loc):
        p = StudentT(5.0, loc, 1.0, validate_args=False)
        return kl_divergence(p, StudentT(5.0, validate_args=False)).sum()

    got = torch.func.vmap(torch.func.grad(divergence), randomness="same")(loc + 1)
    assert got.shape == (5, 3) and (got > 0).all()


# --- kl_divergence --------------------------------------------------------------------------------


def estimate(p, q):
    """log p(z) - log q(z) of many samples: mean and standard error."""
    z = p.sample((200_000,))
    ratio = p.log_prob(z) - q.log_prob(z)
    return ratio.mean(0), ratio.std(0) / len(z) ** 0.5


@pytest.mark.parametrize("class_of_q", [StudentT, distributions.StudentT])
def test_divergence_from_any_location_and_scale(class_of_q):
    p = StudentT(*(t.detach() for t in parameters(4, 3)))
    q = class_of_q(*(t.detach() for t in parameters(4, 3)))
    p.kl_num_samples = 100_000
    divergence = kl_divergence(p, q)
    expected, error = estimate(p, q)
    assert divergence.shape == (4, 3) and divergence.dtype == torch.float64
    assert ((divergence - expected).abs() < 6 * error).all()
    assert (divergence > -1e-3).all()


def test_divergence_broadcasts_and_differentiates_in_all_parameters():
    of_p, of_q = parameters(3), parameters(4, 1)
    p, q = StudentT(*of_p), StudentT(*of_q)
    leaves = [*of_p, *of_q]
    torch.manual_seed(1)
    divergence = kl_divergence(p, q)
    assert divergence.shape == (4, 3)
    got = torch.autograd.grad(divergence.sum(), leaves)

    torch.manual_seed(1)
    shape = (4, 3, 1)
    df, loc, scale = (t.detach().expand(4, 3).reshape(shape).requires_grad_() for t in of_p)
    z = sqloss.student_t_rsample(
        df,
        (loc - of_q[1].unsqueeze(-1)) / of_q[2].unsqueeze(-1),
        scale / of_q[2].unsqueeze(-1),
        128,
    )
    at = of_q[1].unsqueeze(-1) + of_q[2].unsqueeze(-1) * z
    ratio = distributions.StudentT(df, loc, scale).log_prob(at)
    ratio = ratio - distributions.StudentT(*(t.unsqueeze(-1) for t in of_q)).log_prob(at)
    torch.testing.assert_close(divergence, ratio.mean(0).squeeze(-1))
    expected = torch.autograd.grad(ratio.mean(0).sum(), [df, loc, scale, *of_q])
    for a, b, leaf in zip(got, expected, leaves, strict=True):
        torch.testing.assert_close(a, b.reshape(-1, *leaf.shape).sum(0))


def test_divergence_of_equals_vanishes_and_of_independents_is_the_sum():
    p = StudentT(*parameters(4, 3))
    torch.testing.assert_close(kl_divergence(p, p), torch.zeros(4, 3, dtype=torch.float64))
    q = StudentT(*parameters(4, 3))
    torch.manual_seed(0)
    expected = kl_divergence(p, q).sum(1)
    torch.manual_seed(0)
    torch.testing.assert_close(kl_divergence(Independent(p, 1), Independent(q, 1)), expected)


def test_the_number_of_samples_of_a_divergence():
    p, q = StudentT(3.0, torch.ones(50, 50), 0.5), StudentT(3.0)
    spread = kl_divergence(p, q).std()
    p.kl_num_samples = 4 * StudentT.kl_num_samples
    assert 0.4 * spread < kl_divergence(p, q).std() < 0.6 * spread


def test_other_divergences_stay_unknown():
    with pytest.raises(NotImplementedError):
        kl_divergence(distributions.StudentT(3.0), StudentT(3.0))
