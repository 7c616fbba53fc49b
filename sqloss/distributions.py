"""Distributions for code written for :mod:`torch.distributions`."""

import math
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions.kl import register_kl

from sqloss.student_t import student_t_rsample, student_t_rsample_kl


class StudentT(torch.distributions.StudentT):
    r"""Student's t: :class:`torch.distributions.StudentT` with the samples of
    :func:`sqloss.student_t_rsample`, and with a Kullback-Leibler divergence.

    Samples are drawn by Bailey's transform of two uniform numbers u and v,

    .. math::
        z = \mathrm{loc} + \mathrm{scale} \cdot
            \sqrt{\mathrm{df}\, \big(u^{-2 / \mathrm{df}} - 1\big)}\, \cos(2 \pi v),

    and have pathwise gradients in all three parameters, in df too. :meth:`sample`, shapes,
    ``log_prob``, ``entropy``, ``mean`` and ``variance`` are those of torch's class, of which this
    is a subclass.

    ``torch.distributions.kl_divergence(p, q)`` of such a p and of a q that is a StudentT of either
    class is estimated from ``p.kl_num_samples`` samples (128 unless that is set), by the mean of
    ``p.log_prob(z) - q.log_prob(z)``. The estimate is random, unbiased, and differentiable in the
    parameters of both. Where p and q are almost equal it may be negative.
    :func:`sqloss.student_t_rsample_kl` gives the samples as well, and a choice of estimators.

    Args:
        df: degrees of freedom, a number or tensor > 0. May be infinite (the normal distribution)
            for samples and divergences.
        loc: the mean (of df > 1) and median, a number or tensor.
        scale: a number or tensor > 0. The three broadcast to the batch shape.
        validate_args: whether to check arguments, which reads the tensors; as torch's.

    ``torch.manual_seed`` reproduces samples and divergences, bit for bit for any number of threads.

    Raises:
        ValueError: parameters out of their ranges, where arguments are validated.

    Source: R. W. Bailey, "Polar generation of random variates with the t-distribution",
    Mathematics of Computation 62, 1994.

    Example::

        >>> import torch, sqloss
        >>> from torch.distributions import Independent, kl_divergence
        >>> loc, scale = torch.zeros(128, 20), torch.full((128, 20), 0.5)
        >>> posterior = Independent(sqloss.distributions.StudentT(5.0, loc, scale), 1)
        >>> prior = Independent(sqloss.distributions.StudentT(5.0, 0 * loc, 1.0), 1)
        >>> posterior.rsample().shape, kl_divergence(posterior, prior).shape
        (torch.Size([128, 20]), torch.Size([128]))
        >>> bool((kl_divergence(posterior, prior) > 0).all())
        True
    """

    kl_num_samples: int = 128

    def expand(self, batch_shape: torch.types._size, _instance: Any = None) -> "StudentT":
        """The same distribution for a larger batch shape."""
        expanded: StudentT = super().expand(batch_shape, _instance)  # type: ignore[no-untyped-call]
        expanded.kl_num_samples = self.kl_num_samples
        return expanded

    def rsample(self, sample_shape: torch.types._size = Size()) -> Tensor:  # noqa: B008
        """Samples with gradients, ``[*sample_shape, *batch_shape]``."""
        shape = self._extended_shape(sample_shape)
        samples = math.prod(sample_shape)
        if samples == 0:
            return self.loc.expand(shape).clone()
        z = student_t_rsample(self.df, self.loc, self.scale, samples)
        return z.reshape(shape)


def _kl_student_t(p: StudentT, q: torch.distributions.StudentT) -> Tensor:
    """Standardised by q, and every element as a row of its own: those are summed."""
    loc, scale = (p.loc - q.loc) / q.scale, p.scale / q.scale
    return student_t_rsample_kl(
        *(parameter.unsqueeze(-1) for parameter in torch.broadcast_tensors(p.df, loc, scale)),
        prior_df=q.df.unsqueeze(-1),
        num_samples=p.kl_num_samples,
        return_z=False,
    )


register_kl(StudentT, torch.distributions.StudentT)(_kl_student_t)
