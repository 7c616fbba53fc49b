"""Student-t and normal samples, reparameterised, with the KL divergence from a standard prior.

Sources: the sampling is R. W. Bailey's polar transform, "Polar generation of random variates with
the t-distribution", Mathematics of Computation 62(206), 1994; its random bits are Philox4x32-10 of
J. K. Salmon, M. A. Moraes, R. O. Dror & D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011; the normal posterior with its closed-form KL is that of D. P. Kingma & M. Welling,
"Auto-encoding variational Bayes", ICLR 2014.
"""

import functools
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from sqloss._checks import check_floating, check_tensor, number
from sqloss._ops import student_t as _op

ESTIMATORS = ("mc", "analytic_entropy")
NORMAL_ESTIMATORS = ("closed_form", "mc")
REDUCTIONS = ("mean", "none")


def draw_seed(
    *, generator: torch.Generator | None = None, device: torch.device | str | int | None = None
) -> Tensor:
    """64 random bits, for the ``seed`` of the functions below.

    A call with a seed is a pure function of it and its other arguments: it draws the same again,
    in part or whole (see ``rows`` of :func:`student_t_rsample_kl`).

    Args:
        generator: where the bits come from; ``None``: torch's own of the device, which
            ``torch.manual_seed`` sets.
        device: that of the samples; ``None``: the generator's, or the CPU. A number is that of a
            CUDA device, as in torch.

    Returns:
        Tensor: int64, without dimensions, on the device.

    Raises:
        RuntimeError: torch's own, for a generator of another device.

    Example::

        >>> import torch, sqloss
        >>> seed = sqloss.draw_seed(generator=torch.Generator().manual_seed(0))
        >>> loc, scale = torch.zeros(3), torch.ones(3)
        >>> first = sqloss.student_t_rsample(5.0, loc, scale, seed=seed)
        >>> torch.equal(first, sqloss.student_t_rsample(5.0, loc, scale, seed=seed))
        True
    """
    if device is None:
        device = "cpu" if generator is None else generator.device
    return _op.draw_seed(generator, torch.device(device))


def student_t_rsample(
    df: float | Tensor,
    loc: Tensor,
    scale: float | Tensor | None = None,
    num_samples: int | None = None,
    *,
    log_scale: Tensor | None = None,
    logvar: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    r"""Reparameterised samples of Student-t distributions.

    With :math:`u, v` uniform in (0, 1] (Bailey's transform, exact for every ``df`` > 0):

    .. math::
        z = \mathrm{loc} + \mathrm{scale} \cdot t, \qquad
        t = \sqrt{\mathrm{df}\,(u^{-2 / \mathrm{df}} - 1)}\; \cos(2 \pi v).

    For ``df=inf`` this is the normal sample of Box and Muller. Gradients in ``df``, ``loc`` and
    ``scale`` are those of this formula at the same :math:`u, v`.

    Args:
        df: degrees of freedom, above 0: a number or a tensor, also ``inf``. A tensor's values are
            not checked: where one is not above 0, z is NaN.
        loc, scale: location and scale. They broadcast with each other and ``df``; float16,
            bfloat16 (both computed in float32), float32 or float64. ``scale`` may be a number.
        num_samples: how many of each, in a dimension in front; ``None``: one, without it.
        log_scale, logvar: instead of ``scale``, its logarithm, or twice that.
        generator, seed, rows: as in :func:`student_t_rsample_kl`; the row is all but the last
            dimension of the broadcast shape.

    Returns:
        Tensor: of the broadcast shape, after ``num_samples`` if given, and of the dtype to which
        torch promotes ``loc``, ``scale`` and ``df`` (tensors without dimensions, like numbers, do
        not promote others).

    Raises:
        TypeError, ValueError: as :func:`student_t_rsample_kl`.

    Example::

        >>> import torch, sqloss
        >>> loc = torch.zeros(2, 3, requires_grad=True)
        >>> z = sqloss.student_t_rsample(5.0, loc, torch.ones(3), num_samples=4)
        >>> z.shape
        torch.Size([4, 2, 3])
        >>> z.sum().backward()
        >>> loc.grad
        tensor([[4., 4., 4.],
                [4., 4., 4.]])
    """
    name = "student_t_rsample"
    _check_df(name, df)
    args = _prepared(name, df, loc, scale, log_scale, logvar, None)
    if num_samples is not None:
        _check_num_samples(name, num_samples)
    seed = _seed(name, args.loc, generator, seed, rows)
    scalar = args.loc.dim() == 0
    if scalar:
        assert args.df is not None
        args = args._replace(
            df=args.df.reshape(1), loc=args.loc.reshape(1), scale=args.scale.reshape(1)
        )
    z, _ = _op.student_t_rsample_kl(
        args.df,
        args.loc,
        args.scale,
        None,
        seed,
        rows,
        num_samples,
        args.parameterization,
        "none",
        False,
        True,
    )
    assert z is not None
    return z.squeeze(-1) if scalar else z


@overload
def student_t_rsample_kl(
    df: float | Tensor,
    loc: Tensor,
    scale: float | Tensor | None = ...,
    *,
    log_scale: Tensor | None = ...,
    logvar: Tensor | None = ...,
    prior_df: float | Tensor | None = ...,
    num_samples: int = ...,
    estimator: str = ...,
    reduction: str = ...,
    return_z: Literal[True] = ...,
    generator: torch.Generator | None = ...,
    seed: Tensor | None = ...,
    rows: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def student_t_rsample_kl(
    df: float | Tensor,
    loc: Tensor,
    scale: float | Tensor | None = ...,
    *,
    log_scale: Tensor | None = ...,
    logvar: Tensor | None = ...,
    prior_df: float | Tensor | None = ...,
    num_samples: int = ...,
    estimator: str = ...,
    reduction: str = ...,
    return_z: Literal[False],
    generator: torch.Generator | None = ...,
    seed: Tensor | None = ...,
    rows: Tensor | None = ...,
) -> Tensor: ...
def student_t_rsample_kl(
    df: float | Tensor,
    loc: Tensor,
    scale: float | Tensor | None = None,
    *,
    log_scale: Tensor | None = None,
    logvar: Tensor | None = None,
    prior_df: float | Tensor | None = None,
    num_samples: int = 1,
    estimator: str = "mc",
    reduction: str = "mean",
    return_z: bool = True,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor] | Tensor:
    r"""Samples of Student-t posteriors and the Monte Carlo KL from a Student-t prior, in one pass.

    With :math:`q = t(\mathrm{df}, \mathrm{loc}, \mathrm{scale})` independent in each of the ``m``
    coordinates of the last dimension, :math:`p = t(\mathrm{prior\_df}, 0, 1)`, and samples
    :math:`z^{(s)} \sim q` as of :func:`student_t_rsample`:

    .. math::
        \mathrm{kl} = \frac{1}{S} \sum_{s = 1}^{S} \sum_{j = 1}^{m}
            \log q_j(z_j^{(s)}) - \log p(z_j^{(s)}),

    an unbiased estimate of :math:`\mathrm{KL}(q \| p)`, which has no closed form, and whose
    gradients are unbiased too. ``estimator="analytic_entropy"`` takes the first term's expectation,
    the negative entropy of q, exactly, and samples the second alone: the same mean, and usually
    less variance.

    Only the inputs are saved for backward, which draws the samples again: with ``return_z=False``
    the memory needed does not grow with ``num_samples``.

    Args:
        df: degrees of freedom of the posterior, above 0: a number or a tensor of any shape that
            broadcasts (scalar, ``[m]``, per element), also ``inf``. A tensor's values are not
            checked: where one is not above 0 the results are NaN.
        loc, scale: ``[..., m]``, location and scale; they broadcast with each other, ``df`` and
            ``prior_df``. float16, bfloat16 (both computed in float32), float32 or float64.
            ``scale`` may be a number. A tensor's values are not checked: where one is 0 the KL is
            infinite, below 0 it is NaN.
        log_scale, logvar: instead of ``scale``, its logarithm, or twice that (what a Gaussian
            encoder calls the log-variance; a Student-t's variance is larger than scale squared).
        prior_df: degrees of freedom of the prior, like ``df``; ``None``: those of the posterior,
            which then get the gradient of both.
        num_samples: S, 1 to 2^31 - 1.
        estimator: ``"mc"`` or ``"analytic_entropy"``.
        reduction: over the samples: ``"mean"``, or ``"none"`` for the KL of each (with the
            estimator ``"mc"`` that is :math:`\log q(z) - \log p(z)`, as an importance weight
            needs it).
        return_z: whether the samples are returned, or the KL alone.
        generator: draws the seed of this call; ``None``: torch's own of the device.
        seed: int64, the seed itself, from :func:`draw_seed`, instead; may have a value for each row
            (a shape that broadcasts to the leading dimensions).
        rows: int64 of the shape of the leading dimensions: the rows of a larger draw that these
            are. ``None``: 0, 1, 2, ... in order.

    Returns:
        (Tensor, Tensor): z, ``[..., m]`` for one sample, else ``[S, ..., m]``, of the dtype to
        which torch promotes ``loc``, ``scale``, ``df`` and ``prior_df`` (tensors without
        dimensions, like numbers, do not promote others); kl ``[...]`` (``reduction="none"`` with
        several samples: ``[S, ...]``), float64 if z is, else float32. Both are differentiable. With
        ``return_z=False``: kl alone.

    Random bits are a function of (seed, sample, row, column): the same for any number of threads,
    and of rows drawn together. So a part of a batch is drawn again exactly as it was by its
    ``seed`` and its ``rows``. (float64 takes more bits: close to the samples of float32, not the
    same.) ``torch.compile`` draws what eager mode draws, from torch's own generator or a ``seed``
    (a ``generator`` breaks its graph), and activation checkpointing the same twice. ``vmap`` takes
    its ``randomness`` into account, and gives a batch the same noise for one given seed. Values are
    repeatable bit for bit, also on another CPU with AVX2.

    For ``df`` from 0.5 to 1e6 and at ``inf``, errors are below 2e-6 of the largest term that is
    added up in float32, and 1e-14 in float64, beside the rounding of z to its dtype. ``inf`` is
    computed as 2^100, in float64 2^800: for z up to 1e11, or 1e112, that is the normal distribution
    to all digits. Where ``df`` is below 0.27, the rarest samples overflow float32.

    Raises:
        TypeError: arguments of other types or dtypes; not exactly one of ``scale``, ``log_scale``
            and ``logvar``; both of ``generator`` and ``seed``.
        ValueError: ``df``, ``prior_df`` or ``scale`` numbers that are not above 0, ``num_samples``
            below 1, unknown ``estimator`` or ``reduction``, shapes that do not broadcast, a ``loc``
            without dimensions, tensors on different devices.

    Example::

        >>> import torch, sqloss
        >>> loc, logvar = torch.zeros(128, 20), torch.full((128, 20), -1.0)
        >>> z, kl = sqloss.student_t_rsample_kl(5.0, loc, logvar=logvar)
        >>> z.shape, kl.shape
        (torch.Size([128, 20]), torch.Size([128]))
        >>> seed, rows = sqloss.draw_seed(), torch.tensor([3, 100])
        >>> z, kl = sqloss.student_t_rsample_kl(5.0, loc, logvar=logvar, seed=seed)
        >>> again, _ = sqloss.student_t_rsample_kl(
        ...     5.0, loc[rows], logvar=logvar[rows], seed=seed, rows=rows
        ... )
        >>> torch.equal(again, z[rows])
        True
    """
    name = "student_t_rsample_kl"
    _check_choice(name, "estimator", estimator, ESTIMATORS)
    _check_df(name, df)
    args = _prepared(name, df, loc, scale, log_scale, logvar, prior_df)
    return _rsample_kl(
        name, args, num_samples, estimator, reduction, return_z, generator, seed, rows
    )


@overload
def normal_rsample_kl(
    loc: Tensor,
    scale: float | Tensor | None = ...,
    *,
    log_scale: Tensor | None = ...,
    logvar: Tensor | None = ...,
    num_samples: int = ...,
    estimator: str = ...,
    reduction: str = ...,
    return_z: Literal[True] = ...,
    generator: torch.Generator | None = ...,
    seed: Tensor | None = ...,
    rows: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def normal_rsample_kl(
    loc: Tensor,
    scale: float | Tensor | None = ...,
    *,
    log_scale: Tensor | None = ...,
    logvar: Tensor | None = ...,
    num_samples: int = ...,
    estimator: str = ...,
    reduction: str = ...,
    return_z: Literal[False],
    generator: torch.Generator | None = ...,
    seed: Tensor | None = ...,
    rows: Tensor | None = ...,
) -> Tensor: ...
def normal_rsample_kl(
    loc: Tensor,
    scale: float | Tensor | None = None,
    *,
    log_scale: Tensor | None = None,
    logvar: Tensor | None = None,
    num_samples: int = 1,
    estimator: str = "closed_form",
    reduction: str = "mean",
    return_z: bool = True,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor] | Tensor:
    r"""Samples of normal posteriors and their KL from the standard normal prior, in one pass.

    The counterpart of :func:`student_t_rsample_kl`, with the same arguments but those of the
    degrees of freedom, and the same random bits: it draws what that draws for ``df=inf``.

    .. math::
        z = \mathrm{loc} + \mathrm{scale} \cdot \varepsilon, \qquad
        \mathrm{kl} = \sum_{j = 1}^{m} \tfrac12 (\mathrm{loc}_j^2 + \mathrm{scale}_j^2 - 1)
            - \log \mathrm{scale}_j.

    Args:
        loc, scale, log_scale, logvar, num_samples, return_z, generator, seed, rows: as in
            :func:`student_t_rsample_kl`.
        estimator: ``"closed_form"``, which does not depend on the samples, or ``"mc"``, the mean
            over samples of :math:`\log q(z) - \log p(z)`.
        reduction: over the samples: ``"mean"``, or ``"none"`` for the KL of each.

    Returns:
        (Tensor, Tensor): z and kl, or kl alone, as of :func:`student_t_rsample_kl`.

    Raises:
        TypeError, ValueError: as :func:`student_t_rsample_kl`.

    Example::

        >>> import torch, sqloss
        >>> z, kl = sqloss.normal_rsample_kl(torch.ones(2, 3), logvar=torch.zeros(2, 3))
        >>> kl
        tensor([1.5000, 1.5000])
    """
    name = "normal_rsample_kl"
    _check_choice(name, "estimator", estimator, NORMAL_ESTIMATORS)
    args = _prepared(name, None, loc, scale, log_scale, logvar, None)
    return _rsample_kl(
        name, args, num_samples, estimator, reduction, return_z, generator, seed, rows
    )


class _Prepared(NamedTuple):
    """The parameters as the operator takes them: tensors of one shape."""

    df: Tensor | None
    loc: Tensor
    scale: Tensor
    prior_df: Tensor | None
    parameterization: str


def _rsample_kl(
    function: str,
    args: _Prepared,
    num_samples: int,
    estimator: str,
    reduction: str,
    return_z: bool,
    generator: torch.Generator | None,
    seed: Tensor | None,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor] | Tensor:
    _check_num_samples(function, num_samples)
    _check_choice(function, "reduction", reduction, REDUCTIONS)
    if args.loc.dim() == 0:
        raise ValueError(
            f"{function}: loc: expected the coordinates of a sample in a last dimension, got a "
            "tensor without dimensions"
        )
    seed = _seed(function, args.loc, generator, seed, rows)
    samples = None if num_samples == 1 else num_samples
    df, loc, scale, prior_df, parameterization = args
    mean = reduction == "mean"
    z, kl = _op.student_t_rsample_kl(
        df, loc, scale, prior_df, seed, rows, samples, parameterization, estimator, mean, return_z
    )
    assert kl is not None
    if not return_z:
        return kl
    assert z is not None
    return z, kl


def _prepared(
    function: str,
    df: float | Tensor | None,
    loc: Tensor,
    scale: float | Tensor | None,
    log_scale: Tensor | None,
    logvar: Tensor | None,
    prior_df: float | Tensor | None,
) -> _Prepared:
    check_floating(function, "loc", loc)
    if (scale is not None) + (log_scale is not None) + (logvar is not None) != 1:
        given = {"scale": scale, "log_scale": log_scale, "logvar": logvar}
        names = [name for name, value in given.items() if value is not None]
        raise TypeError(
            f"{function}: scale, log_scale, logvar: expected exactly one of them, got "
            f"{' and '.join(names) or 'none'}"
        )
    if scale is not None:
        parameterization = "scale"
        parameter = _as_tensor(function, "scale", scale, loc)
    elif log_scale is not None:
        parameterization = "log_scale"
        check_floating(function, "log_scale", log_scale)
        parameter = log_scale
    else:
        assert logvar is not None
        parameterization = "logvar"
        check_floating(function, "logvar", logvar)
        parameter = logvar
    of_df = None if df is None else _as_tensor(function, "df", df, loc)
    of_prior = None if prior_df is None else _as_tensor(function, "prior_df", prior_df, loc)

    others = ((parameterization, parameter), ("df", of_df), ("prior_df", of_prior))
    device, shape, dtype = loc.device, loc.shape, loc.dtype
    usual = True
    for name, tensor in others:
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(
                f"{function}: {name}: expected the device of loc, {device}, got {tensor.device}"
            )
        usual = usual and (tensor.dim() == 0 or tensor.shape in (shape, shape[-1:]))
    if not usual:
        shape = _broadcast_shape(function, shape, others)
    for argument in (scale, log_scale, logvar, df, prior_df):
        if isinstance(argument, Tensor) and argument.dtype != dtype:
            dtype = _result_type(loc, scale, log_scale, logvar, df, prior_df)
            loc = loc.to(dtype)
            if parameter.dtype == torch.float64:  # would be taken for the dtype of the computation
                parameter = parameter.to(dtype)
            break
    return _Prepared(
        _expanded_df(of_df, shape),
        _expanded(loc, shape),
        _expanded(parameter, shape),
        _expanded_df(of_prior, shape),
        parameterization,
    )


def _expanded(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Without the cost of a view where none is needed."""
    return tensor if tensor.shape == shape else tensor.expand(shape)


def _expanded_df(df: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The operator takes scalars, and those of columns, as they are."""
    if df is None or df.dim() == 0 or df.shape == shape[-1:]:
        return df
    return _expanded(df, shape)


def _result_type(*given: float | Tensor | None) -> torch.dtype:
    """torch.result_type of the floating tensors of these, which torch.compile does not trace."""
    tensors = [tensor for tensor in given if isinstance(tensor, Tensor)]
    dtypes = [tensor.dtype for tensor in tensors if tensor.dim() > 0]
    return functools.reduce(torch.promote_types, dtypes or [tensor.dtype for tensor in tensors])


def _as_tensor(function: str, argument: str, given: float | Tensor, loc: Tensor) -> Tensor:
    """Numbers as tensors, checked; in float32 where halves could not hold them."""
    if isinstance(given, Tensor):
        check_floating(function, argument, given)
        return given
    if not isinstance(given, float):
        given = number(function, argument, given)
    if not given > 0:
        raise ValueError(f"{function}: {argument}: expected a number above 0, got {given}")
    dtype = torch.float64 if loc.dtype == torch.float64 else torch.float32
    return torch.scalar_tensor(given, dtype=dtype, device=loc.device)


def _broadcast_shape(
    function: str, shape: torch.Size, others: tuple[tuple[str, Tensor | None], ...]
) -> torch.Size:
    for name, tensor in others:
        if tensor is None:
            continue
        try:
            shape = torch.broadcast_shapes(shape, tensor.shape)
        except RuntimeError:
            raise ValueError(
                f"{function}: {name}: expected a shape that broadcasts with {tuple(shape)}, got "
                f"{tuple(tensor.shape)}"
            ) from None
    return shape


def _seed(
    function: str,
    loc: Tensor,
    generator: torch.Generator | None,
    seed: Tensor | None,
    rows: Tensor | None,
) -> Tensor:
    """That of this call."""
    leading = loc.shape[:-1]
    if rows is not None:
        _check_int64(function, "rows", rows, loc)
        if rows.shape != leading:
            raise ValueError(
                f"{function}: rows: expected the leading shape {tuple(leading)}, got "
                f"{tuple(rows.shape)}"
            )
    if seed is None:
        if generator is not None and generator.device.type != loc.device.type:
            raise ValueError(
                f"{function}: generator: expected one of the device of loc, {loc.device}, got one "
                f"of {generator.device}"
            )
        return _op.draw_seed(generator, loc.device)
    if generator is not None:
        raise TypeError(f"{function}: generator, seed: expected one of them at most, got both")
    _check_int64(function, "seed", seed, loc)
    if seed.dim() > 0 and not _broadcasts_to(seed.shape, leading):
        raise ValueError(
            f"{function}: seed: expected a shape that broadcasts to the leading shape "
            f"{tuple(leading)}, got {tuple(seed.shape)}"
        )
    return seed


def _broadcasts_to(shape: torch.Size, target: torch.Size) -> bool:
    missing = len(target) - len(shape)
    return missing >= 0 and all(
        size in (1, wanted) for size, wanted in zip(shape, target[missing:], strict=True)
    )


def _check_int64(function: str, argument: str, given: object, loc: Tensor) -> None:
    check_tensor(function, argument, given)
    assert isinstance(given, Tensor)
    if given.dtype != torch.int64:
        raise TypeError(f"{function}: {argument}: expected int64, got {given.dtype}")
    if given.device != loc.device:
        raise ValueError(
            f"{function}: {argument}: expected the device of loc, {loc.device}, got {given.device}"
        )


def _check_df(function: str, df: float | Tensor | None) -> None:
    if df is None:
        raise TypeError(f"{function}: df: expected a number or a tensor, got None")


def _check_num_samples(function: str, num_samples: int) -> None:
    if isinstance(num_samples, bool) or not isinstance(num_samples, int | torch.SymInt):
        raise TypeError(
            f"{function}: num_samples: expected an int, got {type(num_samples).__name__}"
        )
    if not 1 <= num_samples < 2**31:
        raise ValueError(f"{function}: num_samples: expected 1 to 2^31 - 1, got {num_samples}")


def _check_choice(function: str, argument: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise ValueError(
            f"{function}: {argument}: expected one of {', '.join(choices)}, got {given!r}"
        )
