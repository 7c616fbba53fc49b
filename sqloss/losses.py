r"""Fused losses: the losses of torch.nn.functional, one per sample, and the mean of their worst.

``sqloss.cvar_mse_loss(input, target, alpha=0.8)``, say, is::

    losses = F.mse_loss(input, target, reduction="none").flatten(1).mean(1)
    sqloss.cvar(losses, alpha=0.8)

in one read of input and target and without a tensor of the elements' losses. Its backward pass
reads the samples of the tail alone (of small samples, the groups with any of them): the others'
gradient is zero, whatever is in them. The functions called ``cvar_...`` here are public as
``sqloss.cvar_...``; the others give the losses themselves, for a risk of your own.

They share their rules. A sample is an index into the first ``sample_dims`` dimensions of input, and
its loss is the mean, or with ``reduction="sum"`` the sum, of the losses of its elements; so
``alpha=0`` with one sample dimension and ``"mean"`` is what torch.nn.functional returns. Where that
broadcasts tensors of other shapes to input, or input to them, it happens here too, without copies:
dimensions are then those of the broadcast shape. Tensors are float16, bfloat16, float32 or
float64, of any strides, and may differ in dtype; all arithmetic is at least in float32, and the
result float64 if one of the tensors is, else float32. Gradients have the dtypes of their tensors.
The result is the same bit for bit for any number of threads, any repetition and any x86 CPU with
AVX2; those without fused multiply-add differ in the last places.
Every function works in eager mode, forward mode and double backward, under torch.compile,
torch.func and autocast.
"""

import math
import operator
import warnings
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling

from sqloss._checks import (
    DTYPES,
    check_broadcasts,
    check_device,
    check_floating,
    check_no_gradient,
    check_tensor,
    number,
    resolve_tail_fraction,
)
from sqloss._ops import losses as _op

# With return_losses a pair; not a union, which would make every caller tell the two apart.
_ValueOrPair = Tensor | Any


def cvar_binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    alpha: float | None = None,
    tail_fraction: float | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
    extra: Tensor | None = None,
    sample_dims: int = 1,
    return_losses: bool = False,
) -> _ValueOrPair:
    r"""The mean of the worst binary cross-entropies of logits: :func:`sqloss.cvar` of
    :func:`torch.nn.functional.binary_cross_entropy_with_logits` by samples.

    The loss of an element, with logit :math:`x`, target :math:`y`, weight :math:`w` and
    pos_weight :math:`p` (both 1 if not given), is

    .. math::
        -w \left( p\, y \log \sigma(x) + (1 - y) \log (1 - \sigma(x)) \right).

    Args:
        input: logits, ``[N, ...]``.
        target: of the shape of ``input``, usually in [0, 1].
        weight: of each element's loss, broadcastable to ``input``. Takes no gradient.
        alpha: the confidence level in [0, 1): the tail is the worst ``1 - alpha`` of the samples.
            May change from step to step without compiling again. Give this or ``tail_fraction``.
        tail_fraction: the size of the tail, in (0, 1], instead of ``alpha``.
        pos_weight: of the positive part, broadcastable to ``input``. Takes no gradient.
        reduction: ``"mean"`` or ``"sum"``: what a sample's loss is of those of its elements.
        extra: added to the samples' losses before the worst are taken, as the KL of a VAE;
            of their shape. Takes its gradient.
        sample_dims: how many of the first dimensions of ``input`` number the samples.
        return_losses: whether to return ``(value, losses)``: with the loss of each sample,
            ``extra`` included, without gradient.

    Returns:
        Tensor: a scalar; dtypes, strides and determinism are described in :mod:`sqloss.losses`.

    Raises:
        TypeError: a tensor that is none, or of a dtype other than the above; both or neither of
            ``alpha`` and ``tail_fraction``; a ``sample_dims`` that is no int.
        ValueError: shapes that differ or do not broadcast, another device, a number out of its
            range, another reduction, no samples, ``weight`` or ``pos_weight`` that require
            gradients.

    Example::

        >>> import torch, sqloss
        >>> logits = torch.tensor([[0., 0.], [4., -4.], [-2., 2.]], requires_grad=True)
        >>> target = torch.tensor([[0., 1.], [1., 0.], [1., 0.]])
        >>> loss = sqloss.cvar_binary_cross_entropy_with_logits(logits, target, tail_fraction=1/3)
        >>> loss.backward()
        >>> loss.detach(), logits.grad[2]
        (tensor(2.1269), tensor([-0.4404,  0.4404]))
        >>> logits.grad[:2].any()
        tensor(False)
    """
    name = "cvar_binary_cross_entropy_with_logits"
    arguments = _binary_cross_entropy_with_logits(
        name, input, target, weight, pos_weight, reduction, sample_dims
    )
    return _cvar_pointwise(name, alpha, tail_fraction, extra, return_losses, arguments)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
    sample_dims: int = 1,
) -> Tensor:
    """The losses of :func:`cvar_binary_cross_entropy_with_logits`, of shape
    ``input.shape[:sample_dims]``; arguments and errors are those of that function.

    Samples whose loss has the gradient 0 get the gradient 0, whatever their elements are.

    Example::

        >>> import torch, sqloss
        >>> logits, target = torch.zeros(2, 5), torch.ones(2, 5)
        >>> sqloss.losses.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        tensor([3.4657, 3.4657])
    """
    return _op.pointwise_losses(
        *_binary_cross_entropy_with_logits(
            "binary_cross_entropy_with_logits",
            input,
            target,
            weight,
            pos_weight,
            reduction,
            sample_dims,
        )
    )


def cvar_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    alpha: float | None = None,
    tail_fraction: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    extra: Tensor | None = None,
    return_losses: bool = False,
) -> _ValueOrPair:
    r"""The mean of the worst cross-entropies: :func:`sqloss.cvar` of
    :func:`torch.nn.functional.cross_entropy` with ``reduction="none"``.

    The loss of a target :math:`y`, with logits :math:`x_c`, class weights :math:`w_c` (1 if not
    given) and label smoothing :math:`\varepsilon` over :math:`C` classes, is

    .. math::
        -\sum_c w_c \Big( (1 - \varepsilon)\, [c = y] + \frac{\varepsilon}{C} \Big) \log p_c,
        \qquad p = \operatorname{softmax}(x),

    and with probabilities as target, :math:`y_c` stands for :math:`[c = y]`. One sample is one
    element of the target, so a pixel in segmentation. Targets equal to ``ignore_index`` are no
    samples: they do not count in the size of the tail. A class weight rescales the loss as with
    ``reduction="none"``: for ``alpha=0`` the value is the mean of those losses, and is not divided
    by the sum of the weights as with torch's ``reduction="mean"``.

    Args:
        input: logits, ``[C]``, ``[N, C]`` or ``[N, C, d1, ...]``.
        target: classes in [0, C), of the shape of ``input`` without its class dimension and of an
            integer dtype, or probabilities of the shape of ``input``, which take their gradient.
        weight: of each class, ``[C]``. Takes no gradient.
        alpha: the confidence level in [0, 1): the tail is the worst ``1 - alpha`` of the samples.
            May change from step to step without compiling again. Give this or ``tail_fraction``.
        tail_fraction: the size of the tail, in (0, 1], instead of ``alpha``.
        ignore_index: the class that marks a target to be ignored. Not with probabilities.
        label_smoothing: the share of the target that is spread evenly over the classes, in [0, 1].
        extra: added to the losses before the worst are taken; of their shape. Takes its gradient.
        return_losses: whether to return ``(value, losses)``: with the loss of each target, of the
            shape ``[N, d1, ...]``, ``extra`` included, without gradient; an ignored target's is 0.

    Returns:
        Tensor: a scalar; dtypes, strides and determinism are described in :mod:`sqloss.losses`.

    Raises:
        TypeError: a tensor that is none, or of a dtype other than the above; both or neither of
            ``alpha`` and ``tail_fraction``.
        ValueError: shapes that do not fit, another device, a number out of its range, no samples
            (none at all, or all of them ignored), a ``weight`` that requires gradients.
        IndexError: a class out of its range (on a device other than the CPU an assertion there).

    Example::

        >>> import torch, sqloss
        >>> logits = torch.tensor([[2., 0., 0.], [0., 2., 0.], [0., 0., 2.], [9., 9., 9.]])
        >>> target = torch.tensor([0, 1, 0, -100])
        >>> sqloss.cvar_cross_entropy(logits, target, tail_fraction=2/3)
        tensor(1.2395)
        >>> sqloss.cvar_cross_entropy(logits, target, alpha=0.8, return_losses=True)
        (tensor(2.2395), tensor([0.2395, 0.2395, 2.2395, 0.0000]))
    """
    name = "cvar_cross_entropy"
    fraction = resolve_tail_fraction(name, alpha, tail_fraction)
    arguments = _cross_entropy(name, input, target, weight, ignore_index, label_smoothing)
    shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
    extra = _extra(name, extra, input, shape)
    if extra is not None and input.dim() == 1:
        extra = extra.unsqueeze(0)
    value, losses = _op.cvar_cross_entropy(fraction, extra, *arguments, return_losses, name)
    return value if losses is None else (value, losses.reshape(shape))


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The losses of :func:`cvar_cross_entropy`, one per target, 0 where it is ignored; arguments
    and errors are those of that function.

    This is :func:`torch.nn.functional.cross_entropy` with ``reduction="none"``, but that backward
    skips the targets whose loss has the gradient 0.

    Example::

        >>> import torch, sqloss
        >>> sqloss.losses.cross_entropy(torch.zeros(3, 10), torch.tensor([4, 0, -100]))
        tensor([2.3026, 2.3026, 0.0000])
    """
    name = "cross_entropy"
    arguments = _cross_entropy(name, input, target, weight, ignore_index, label_smoothing)
    losses = _op.cross_entropy_losses(*arguments, name)
    return losses.squeeze(0) if input.dim() == 1 else losses


def cvar_mse_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    alpha: float | None = None,
    tail_fraction: float | None = None,
    reduction: str = "mean",
    extra: Tensor | None = None,
    sample_dims: int = 1,
    return_losses: bool = False,
) -> _ValueOrPair:
    r"""The mean of the worst squared errors: :func:`sqloss.cvar` of
    :func:`torch.nn.functional.mse_loss` by samples.

    The loss of an element is :math:`w (x - y)^2`; a sample's mean is over its elements and not
    divided by their weights. Input and target take gradients. All arguments, the result and the
    errors are those of :func:`cvar_binary_cross_entropy_with_logits`, except that a target of
    another shape that broadcasts with that of input is broadcast, with a warning, as in torch
    (without one under torch.compile).

    Example::

        >>> import torch, sqloss
        >>> predicted, seen = torch.tensor([[1., 1.], [2., 2.], [3., 3.]]), torch.ones(3, 2)
        >>> sqloss.cvar_mse_loss(predicted, seen, alpha=0.5)  # of the losses 0, 1, 4
        tensor(3.)
    """
    name = "cvar_mse_loss"
    arguments = _mse(name, input, target, weight, reduction, sample_dims)
    return _cvar_pointwise(name, alpha, tail_fraction, extra, return_losses, arguments)


def mse_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    sample_dims: int = 1,
) -> Tensor:
    """The losses of :func:`cvar_mse_loss`, of shape ``input.shape[:sample_dims]``.

    Example::

        >>> import torch, sqloss
        >>> sqloss.losses.mse_loss(torch.tensor([[1., 2.], [3., 4.]]), torch.ones(2, 2))
        tensor([0.5000, 6.5000])
    """
    return _op.pointwise_losses(*_mse("mse_loss", input, target, weight, reduction, sample_dims))


def cvar_smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float | None = None,
    tail_fraction: float | None = None,
    beta: float = 1.0,
    delta: float | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    extra: Tensor | None = None,
    sample_dims: int = 1,
    return_losses: bool = False,
) -> _ValueOrPair:
    r"""The mean of the worst absolute errors, smoothed near 0: :func:`sqloss.cvar` of
    :func:`torch.nn.functional.smooth_l1_loss`, or of
    :func:`torch.nn.functional.huber_loss`, by samples.

    The loss of an element, with the error :math:`d = x - y` and weight :math:`w` (1 if not given),
    is

    .. math::
        w \begin{cases} d^2 / (2 \beta) & |d| < \beta \\ |d| - \beta / 2 & \text{else} \end{cases}
        \qquad \text{or, if delta is given,} \qquad
        w \begin{cases} d^2 / 2 & |d| \le \delta \\ \delta (|d| - \delta / 2) & \text{else.}
        \end{cases}

    ``beta=0`` is :func:`torch.nn.functional.l1_loss`.

    Args:
        beta: where smooth L1 turns from a parabola to a line, >= 0.
        delta: where the Huber loss does, > 0; given instead of ``beta``.

    Input and target take gradients. All other arguments, the result and the errors are those of
    :func:`cvar_binary_cross_entropy_with_logits`, except that a target of another shape that
    broadcasts with that of input is broadcast, with a warning, as in torch (without one under
    torch.compile).

    Example::

        >>> import torch, sqloss
        >>> predicted, seen = torch.tensor([[1.], [1.5], [5.]]), torch.ones(3, 1)
        >>> sqloss.cvar_smooth_l1_loss(predicted, seen, tail_fraction=1/3)
        tensor(3.5000)
        >>> sqloss.cvar_smooth_l1_loss(predicted, seen, tail_fraction=1/3, beta=0)
        tensor(4.)
        >>> sqloss.cvar_smooth_l1_loss(predicted, seen, tail_fraction=1/3, delta=2)
        tensor(6.)
    """
    name = "cvar_smooth_l1_loss"
    arguments = _smooth_l1(name, input, target, beta, delta, weight, reduction, sample_dims)
    return _cvar_pointwise(name, alpha, tail_fraction, extra, return_losses, arguments)


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    *,
    beta: float = 1.0,
    delta: float | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    sample_dims: int = 1,
) -> Tensor:
    """The losses of :func:`cvar_smooth_l1_loss`, of shape ``input.shape[:sample_dims]``.

    Example::

        >>> import torch, sqloss
        >>> sqloss.losses.smooth_l1_loss(torch.tensor([[1.], [1.5], [5.]]), torch.ones(3, 1))
        tensor([0.0000, 0.1250, 3.5000])
    """
    return _op.pointwise_losses(
        *_smooth_l1("smooth_l1_loss", input, target, beta, delta, weight, reduction, sample_dims)
    )


def cvar_gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    *,
    alpha: float | None = None,
    tail_fraction: float | None = None,
    reduction: str = "mean",
    extra: Tensor | None = None,
    sample_dims: int = 1,
    return_losses: bool = False,
) -> _ValueOrPair:
    r"""The mean of the worst Gaussian negative log-likelihoods: :func:`sqloss.cvar` of
    :func:`torch.nn.functional.gaussian_nll_loss` by samples.

    The loss of an element, with the mean :math:`x`, the observation :math:`y` and the variance
    :math:`v`, is

    .. math::
        \frac{1}{2} \Big( \log v + \frac{(x - y)^2}{v} \Big), \qquad
        v = \max(\mathrm{var}, \mathrm{eps}),

    plus :math:`\tfrac{1}{2} \log 2 \pi` if ``full``. The gradient in ``var`` is taken as if it were
    not clamped, as torch does.

    Args:
        target: of a shape that broadcasts with that of ``input``.
        var: a number; or of the shape of ``input``, or of that with one dimension of size 1 or
            without the last one. A negative number is refused; the elements of a tensor are not
            looked at and count as ``eps`` if below it.
        full: whether to add the constant.
        eps: what ``var`` is clamped to, > 0.

    Input, target and var take gradients. All other arguments, the result and the errors are those
    of :func:`cvar_binary_cross_entropy_with_logits`.

    Example::

        >>> import torch, sqloss
        >>> mean, seen = torch.tensor([[0.], [0.], [0.]]), torch.tensor([[0.], [1.], [2.]])
        >>> sqloss.cvar_gaussian_nll_loss(mean, seen, var=1.0, tail_fraction=1/3)
        tensor(2.)
    """
    name = "cvar_gaussian_nll_loss"
    arguments = _gaussian_nll(name, input, target, var, full, eps, reduction, sample_dims)
    return _cvar_pointwise(name, alpha, tail_fraction, extra, return_losses, arguments)


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    *,
    reduction: str = "mean",
    sample_dims: int = 1,
) -> Tensor:
    """The losses of :func:`cvar_gaussian_nll_loss`, of shape ``input.shape[:sample_dims]``.

    Example::

        >>> import torch, sqloss
        >>> mean, seen = torch.tensor([[0.], [0.], [0.]]), torch.tensor([[0.], [1.], [2.]])
        >>> sqloss.losses.gaussian_nll_loss(mean, seen, var=1.0)
        tensor([0.0000, 0.5000, 2.0000])
    """
    return _op.pointwise_losses(
        *_gaussian_nll("gaussian_nll_loss", input, target, var, full, eps, reduction, sample_dims)
    )


# --- checked arguments, as the operators take them ------------------------------------------------

# loss, input, target, weight, other, parameter, full, sample_dims, mean
_Pointwise = tuple[str, Tensor, Tensor, Tensor | None, Tensor | None, float, bool, int, bool]


def _pointwise(
    function: str,
    loss: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    other: Tensor | None,
    parameter: float,
    full: bool,
    reduction: str,
    sample_dims: int,
) -> _Pointwise:
    check_floating(function, "input", input)
    check_floating(function, "target", target)
    check_device(function, "target", target, "input", input)
    if target.shape != input.shape:
        if loss == "binary_cross_entropy_with_logits":
            _raise_other_shape(function, target, input)
        shapes = f"expected the shape of input, {tuple(input.shape)}, got {tuple(target.shape)}"
        input, target = _broadcast(function, input, target)
        if not is_compiling():  # which traces no warnings
            warnings.warn(
                f"{function}: target: {shapes}: both are broadcast, as in torch, which is likely "
                f"not meant",
                stacklevel=4,
            )
    if weight is not None:
        weight = _weight(function, "weight", weight, input)
    if type(sample_dims) is not int or not 1 <= sample_dims <= input.dim():
        sample_dims = _sample_dims(function, sample_dims, input)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{function}: reduction: expected 'mean' or 'sum', got {reduction!r}")
    mean = reduction == "mean"
    return loss, input, target, weight, other, parameter, full, sample_dims, mean


def _binary_cross_entropy_with_logits(
    function: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    sample_dims: int,
) -> _Pointwise:
    check_floating(function, "input", input)
    if pos_weight is not None:
        pos_weight = _weight(function, "pos_weight", pos_weight, input)
    return _pointwise(
        function,
        "binary_cross_entropy_with_logits",
        input,
        target,
        weight,
        pos_weight,
        0.0,
        False,
        reduction,
        sample_dims,
    )


def _mse(
    function: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    sample_dims: int,
) -> _Pointwise:
    return _pointwise(
        function, "mse", input, target, weight, None, 0.0, False, reduction, sample_dims
    )


def _smooth_l1(
    function: str,
    input: Tensor,
    target: Tensor,
    beta: float,
    delta: float | None,
    weight: Tensor | None,
    reduction: str,
    sample_dims: int,
) -> _Pointwise:
    loss, parameter = "smooth_l1", number(function, "beta", beta)
    if not 0 <= parameter < math.inf:
        raise ValueError(f"{function}: beta: expected a finite number >= 0, got {beta}")
    if delta is not None:
        if parameter != 1:
            raise ValueError(
                f"{function}: beta, delta: expected one of them, got beta={beta}, delta={delta}"
            )
        loss, parameter = "huber", _positive(function, "delta", delta)
    return _pointwise(
        function, loss, input, target, weight, None, parameter, False, reduction, sample_dims
    )


def _gaussian_nll(
    function: str,
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool,
    eps: float,
    reduction: str,
    sample_dims: int,
) -> _Pointwise:
    check_floating(function, "input", input)
    var = _var(function, var, input)
    check_floating(function, "target", target)
    if not target.shape == input.shape == var.shape:
        check_device(function, "target", target, "input", input)
        input, target, var = _broadcast(function, input, target, var)
    return _pointwise(
        function,
        "gaussian_nll",
        input,
        target,
        None,
        var,
        _positive(function, "eps", eps),
        bool(full),
        reduction,
        sample_dims,
    )


def _var(function: str, var: Tensor | float, input: Tensor) -> Tensor:
    """The variance in a shape that broadcasts to that of input, by the rules of torch."""
    if not isinstance(var, Tensor):
        var = number(function, "var", var)
        if not 0 <= var < math.inf:
            raise ValueError(f"{function}: var: expected a finite number >= 0, got {var}")
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        return torch.full((), var, dtype=dtype, device=input.device)
    check_floating(function, "var", var)
    check_device(function, "var", var, "input", input)
    if var.shape == input.shape:
        return var
    if var.shape == input.shape[:-1]:
        return var.unsqueeze(-1)
    sizes = zip(var.shape, input.shape, strict=True) if var.dim() == input.dim() else ()
    others = [pair for pair in sizes if pair[0] != pair[1]]
    if sum(size for size, _ in others) != 1 or not all(1 in pair for pair in others):
        raise ValueError(
            f"{function}: var: expected a number or the shape of input, {tuple(input.shape)}, that "
            f"with one size 1, or that without the last dimension, got {tuple(var.shape)}"
        )
    return var


def _broadcast(function: str, input: Tensor, target: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Input, target and tensors that broadcast with input, in one shape."""
    tensors = (input, target, *others)
    try:
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    except RuntimeError:
        raise ValueError(
            f"{function}: target: expected a shape that broadcasts with that of input, "
            f"{tuple(input.shape)}, got {tuple(target.shape)}"
        ) from None

    def expanded(tensor: Tensor) -> Tensor:
        # The gradient is a sum, whose parts half precision may not hold
        if tensor.shape != shape and tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()
        return tensor.expand(shape)

    return tuple(map(expanded, tensors))


def _cross_entropy(
    function: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor | None, int, float]:
    """input [N, C, ...], target, weight, ignore_index, label_smoothing."""
    check_floating(function, "input", input)
    check_tensor(function, "target", target)
    check_device(function, "target", target, "input", input)
    if input.dim() == 0:
        raise ValueError(f"{function}: input: expected [C] or [N, C, ...], got a scalar")
    try:
        ignore_index = operator.index(ignore_index)
    except TypeError:
        raise TypeError(
            f"{function}: ignore_index: expected an int, got {type(ignore_index).__name__}"
        ) from None
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{function}: ignore_index: expected an int64, got {ignore_index}")
    if target.dtype in DTYPES:
        if target.shape != input.shape:
            _raise_other_shape(function, target, input)
        if ignore_index >= 0:
            raise ValueError(
                f"{function}: ignore_index: expected none with probabilities as target, got "
                f"{ignore_index}"
            )
    elif target.dtype in _CLASS_DTYPES:
        shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
        if target.shape != shape:
            raise ValueError(
                f"{function}: target: expected classes of shape {tuple(shape)} or probabilities of "
                f"shape {tuple(input.shape)}, got classes of shape {tuple(target.shape)}"
            )
        target = target.long()
    else:
        raise TypeError(
            f"{function}: target: expected classes of an integer dtype or probabilities of a "
            f"floating-point one, got {target.dtype}"
        )
    if weight is not None:
        check_floating(function, "weight", weight)
        check_device(function, "weight", weight, "input", input)
        classes = input.shape[1 if input.dim() > 1 else 0]
        if weight.shape != (classes,):
            raise ValueError(
                f"{function}: weight: expected one weight per class, of shape ({classes},), got "
                f"{tuple(weight.shape)}"
            )
        check_no_gradient(function, "weight", weight)
    label_smoothing = number(function, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"{function}: label_smoothing: expected a number in [0, 1], got {label_smoothing}"
        )
    if input.dim() == 1:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
    return input, target, weight, ignore_index, label_smoothing


_CLASS_DTYPES = (torch.int64, torch.int32, torch.uint8, torch.int16, torch.int8)


def _cvar_pointwise(
    function: str,
    alpha: float | None,
    tail_fraction: float | None,
    extra: Tensor | None,
    return_losses: bool,
    arguments: _Pointwise,
) -> _ValueOrPair:
    fraction = resolve_tail_fraction(function, alpha, tail_fraction)
    _, input, *_, sample_dims, _ = arguments
    extra = _extra(function, extra, input, input.shape[:sample_dims])
    value, losses = _op.cvar_pointwise(fraction, extra, *arguments, return_losses, function)
    return value if losses is None else (value, losses)


def _extra(function: str, extra: Tensor | None, input: Tensor, shape: torch.Size) -> Tensor | None:
    """The addend to losses of this shape, of which there must be one."""
    if 0 in shape:
        raise ValueError(
            f"{function}: input: expected at least one sample, got shape {tuple(input.shape)}"
        )
    if extra is not None:
        check_floating(function, "extra", extra)
        check_device(function, "extra", extra, "input", input)
        if extra.shape != shape:
            raise ValueError(
                f"{function}: extra: expected the shape of the losses, {tuple(shape)}, got "
                f"{tuple(extra.shape)}"
            )
    return extra


def _raise_other_shape(function: str, target: Tensor, input: Tensor) -> NoReturn:
    raise ValueError(
        f"{function}: target: expected the shape of input, {tuple(input.shape)}, got "
        f"{tuple(target.shape)}"
    )


def _weight(function: str, argument: str, weight: Tensor, input: Tensor) -> Tensor:
    check_floating(function, argument, weight)
    check_device(function, argument, weight, "input", input)
    check_broadcasts(function, argument, weight, "input", input)
    check_no_gradient(function, argument, weight)
    return weight.expand_as(input)


def _sample_dims(function: str, sample_dims: int, input: Tensor) -> int:
    try:
        dims = operator.index(sample_dims)
    except TypeError:
        dims = None
    if dims is None or isinstance(sample_dims, bool):
        raise TypeError(
            f"{function}: sample_dims: expected an int, got {type(sample_dims).__name__}"
        )
    if input.dim() == 0:
        raise ValueError(f"{function}: input: expected at least one dimension, got a scalar")
    if not 1 <= dims <= input.dim():
        raise ValueError(
            f"{function}: sample_dims: expected to be in [1, {input.dim()}] for an input of shape "
            f"{tuple(input.shape)}, got {dims}"
        )
    return dims


def _positive(function: str, argument: str, given: object) -> float:
    value = number(function, argument, given)
    if not 0 < value < math.inf:
        raise ValueError(f"{function}: {argument}: expected a finite number > 0, got {value}")
    return value
