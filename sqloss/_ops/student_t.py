"""The operators of csrc/student_t for every way torch calls them. As in superquantile.py: eager
calls take the pybind11 binding, torch.compile traces the operators; here are the rules of vmap, the
shapes of fake tensors, and the reference for devices without a kernel.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from sqloss import _C, reference
from sqloss._ops import in_front, warn_without_kernel

_ops = torch.ops.sqloss


def draw_seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """64 random bits of the generator, or of the device's own, as int64 without dimensions."""
    if is_compiling():
        seed: Tensor = _ops.draw_seed(generator, device=device)
        return seed
    return _C.draw_seed(generator, device)


def student_t_rsample_kl(
    df: Tensor | None,
    loc: Tensor,
    scale: Tensor,
    prior_df: Tensor | None,
    seed: Tensor,
    rows: Tensor | None,
    num_samples: int | None,
    parameterization: str,
    kl: str,
    kl_mean: bool,
    return_z: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(z, kl) of csrc/student_t/student_t.h, each None where it is not wanted."""
    args = (df, loc, scale, prior_df, seed, rows, num_samples, parameterization, kl, kl_mean)
    if is_compiling():
        z, of_kl = _ops.student_t_rsample_kl(*args, return_z)
        return z if return_z else None, of_kl if kl != "none" else None
    return _C.student_t_rsample_kl(*args, return_z)


# --- torch.func.vmap ------------------------------------------------------------------------------
#
# The operators are pure: with one seed for all of a batch, all of it has the same noise, which is
# what vmap(randomness="same") means. With "different", draw_seed gives a batch of seeds.


class _Batch:
    """The arguments with vmap's dimension as one more leading dimension of rows."""

    def __init__(self, info: Any, loc: Tensor, bdim: int | None) -> None:
        self.size = info.batch_size
        self.leading = list(loc.shape)
        if bdim is not None:
            del self.leading[bdim]
        self.columns = self.leading.pop()

    def __call__(self, tensor: Tensor | None, bdim: int | None) -> Tensor | None:
        return in_front(self.size, tensor, bdim)

    def df(self, df: Tensor | None, bdim: int | None) -> Tensor | None:
        """For every element: one shape for each of the batch is one more than the operator has."""
        batched = self(df, bdim)
        if batched is None:
            return None
        missing = len(self.leading) + 2 - batched.dim()
        rows = batched.reshape(self.size, *[1] * missing, *batched.shape[1:])
        return rows.expand(self.size, *self.leading, self.columns)

    def sum_to_df(self, gradient: Tensor, df: Tensor | None, bdim: int | None) -> Tensor:
        """The gradient of what df made of its argument."""
        if df is None or gradient.numel() == 0:
            return gradient
        shape = list(df.shape)
        if bdim is not None:
            del shape[bdim]
        missing = gradient.dim() - 1 - len(shape)
        return gradient.sum(tuple(range(1, missing + 1))) if missing else gradient

    def seed(self, seed: Tensor, bdim: int | None) -> Tensor:
        """A seed per row."""
        batched = self(seed, bdim)
        assert batched is not None
        missing = len(self.leading) + 1 - batched.dim()
        return batched.reshape(self.size, *[1] * missing, *batched.shape[1:])

    def rows(self, like: Tensor, rows: Tensor | None, bdim: int | None) -> Tensor:
        """The rows of one of the batch, not of all of it."""
        if rows is None:
            count = math.prod(self.leading)
            rows, bdim = torch.arange(count, device=like.device).reshape(self.leading), None
        batched = self(rows, bdim)
        assert batched is not None
        return batched.contiguous()

    def after_samples(self, tensor: Tensor | None, bdim: int | None, samples: bool) -> Any:
        batched = self(tensor, bdim)
        return batched.movedim(0, 1) if samples and batched is not None else batched


def _student_t_rsample_kl_vmap(
    info: Any,
    in_dims: Any,
    df: Tensor | None,
    loc: Tensor,
    scale: Tensor,
    prior_df: Tensor | None,
    seed: Tensor,
    rows: Tensor | None,
    num_samples: int | None,
    parameterization: str,
    kl: str,
    kl_mean: bool,
    return_z: bool,
) -> Any:
    batch = _Batch(info, loc, in_dims[1])
    outputs = _ops.student_t_rsample_kl(
        batch.df(df, in_dims[0]),
        batch(loc, in_dims[1]),
        batch(scale, in_dims[2]),
        batch.df(prior_df, in_dims[3]),
        batch.seed(seed, in_dims[4]),
        batch.rows(loc, rows, in_dims[5]),
        num_samples,
        parameterization,
        kl,
        kl_mean,
        return_z,
    )
    sampled = num_samples is not None
    z_dim = int(sampled) if return_z else None
    kl_dim = int(sampled and not kl_mean) if kl != "none" else None
    return outputs, (z_dim, kl_dim)


def _student_t_rsample_kl_backward_vmap(
    info: Any,
    in_dims: Any,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    df: Tensor | None,
    loc: Tensor,
    scale: Tensor,
    prior_df: Tensor | None,
    seed: Tensor,
    rows: Tensor | None,
    num_samples: int | None,
    parameterization: str,
    kl: str,
    kl_mean: bool,
    output_mask: Sequence[bool],
) -> Any:
    batch = _Batch(info, loc, in_dims[3])
    sampled = num_samples is not None
    of_df, of_loc, of_scale, of_prior_df = _ops.student_t_rsample_kl_backward(
        batch.after_samples(grad_z, in_dims[0], sampled),
        batch.after_samples(grad_kl, in_dims[1], sampled and not kl_mean),
        batch.df(df, in_dims[2]),
        batch(loc, in_dims[3]),
        batch(scale, in_dims[4]),
        batch.df(prior_df, in_dims[5]),
        batch.seed(seed, in_dims[6]),
        batch.rows(loc, rows, in_dims[7]),
        num_samples,
        parameterization,
        kl,
        kl_mean,
        output_mask,
    )
    of_df = batch.sum_to_df(of_df, df, in_dims[2])
    of_prior_df = batch.sum_to_df(of_prior_df, prior_df, in_dims[5])
    gradients = (of_df, of_loc, of_scale, of_prior_df)
    tensors = (df, loc, scale, prior_df)
    wanted = [w and of is not None for w, of in zip(output_mask, tensors, strict=True)]
    return gradients, tuple(0 if w else None for w in wanted)


def _student_t_noise_vmap(
    info: Any,
    in_dims: Any,
    loc: Tensor,
    seed: Tensor,
    rows: Tensor | None,
    num_samples: int | None,
) -> Any:
    batch = _Batch(info, loc, in_dims[0])
    outputs = _ops.student_t_noise(
        batch(loc, in_dims[0]),
        batch.seed(seed, in_dims[1]),
        batch.rows(loc, rows, in_dims[2]),
        num_samples,
    )
    dim = int(num_samples is not None)
    return outputs, (dim, dim)


torch.library.register_vmap("sqloss::student_t_rsample_kl", _student_t_rsample_kl_vmap)
torch.library.register_vmap(
    "sqloss::student_t_rsample_kl_backward", _student_t_rsample_kl_backward_vmap
)
torch.library.register_vmap("sqloss::student_t_noise", _student_t_noise_vmap)


# --- fake tensors ---------------------------------------------------------------------------------


def _student_t_rsample_kl_fake(
    df: Tensor | None,
    loc: Tensor,
    scale: Tensor,
    prior_df: Tensor | None,
    seed: Tensor,
    rows: Tensor | None,
    num_samples: int | None,
    parameterization: str,
    kl: str,
    kl_mean: bool,
    return_z: bool,
) -> tuple[Tensor, Tensor]:
    samples = [] if num_samples is None else [num_samples]
    z_shape = [*samples, *loc.shape] if return_z else [0]
    kl_shape = [*([] if kl_mean else samples), *loc.shape[:-1]] if kl != "none" else [0]
    dtype = reference.losses_dtype(loc, scale)
    return loc.new_empty(z_shape), loc.new_empty(kl_shape, dtype=dtype)


def _student_t_rsample_kl_backward_fake(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    df: Tensor | None,
    loc: Tensor,
    scale: Tensor,
    prior_df: Tensor | None,
    seed: Tensor,
    rows: Tensor | None,
    num_samples: int | None,
    parameterization: str,
    kl: str,
    kl_mean: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    return tuple(
        tensor.new_empty(tensor.shape) if wanted and tensor is not None else loc.new_empty(0)
        for tensor, wanted in zip((df, loc, scale, prior_df), output_mask, strict=True)
    )


def _student_t_noise_fake(
    loc: Tensor, seed: Tensor, rows: Tensor | None, num_samples: int | None
) -> tuple[Tensor, Tensor]:
    shape = [*([] if num_samples is None else [num_samples]), *loc.shape]
    return loc.new_empty(shape), loc.new_empty(shape)


def _draw_seed_fake(generator: torch.Generator | None, *, device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


torch.library.register_fake("sqloss::student_t_rsample_kl", _student_t_rsample_kl_fake)
torch.library.register_fake(
    "sqloss::student_t_rsample_kl_backward", _student_t_rsample_kl_backward_fake
)
torch.library.register_fake("sqloss::student_t_noise", _student_t_noise_fake)
torch.library.register_fake("sqloss::draw_seed", _draw_seed_fake)

if torch.__version__ < "2.14":  # compared as versions
    # There torch.compile takes equal calls of an operator for one, whatever its tags say, unless it
    # is in this list: all samples of a graph would have one seed.
    from torch._functorch.compile_utils import rand_ops

    rand_ops.append(_ops.draw_seed)


# --- devices without a kernel ---------------------------------------------------------------------


def _reference_forward(df: Tensor | None, loc: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    warn_without_kernel("student_t_rsample_kl", loc.device)
    z, kl = reference.student_t_rsample_kl(df, loc, *args)
    return z.contiguous(), kl.contiguous()


def _reference_backward(
    grad_z: Tensor | None, grad_kl: Tensor | None, df: Tensor | None, loc: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    warn_without_kernel("student_t_rsample_kl", loc.device)
    gradients = reference.student_t_rsample_kl_backward(grad_z, grad_kl, df, loc, *args)
    return tuple(gradient.contiguous() for gradient in gradients)


def _reference_noise(loc: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    warn_without_kernel("student_t_rsample_kl", loc.device)
    energy, cosine = reference.student_t_noise(loc, *args)
    return energy.contiguous(), cosine.contiguous()


_library = torch.library.Library("sqloss", "IMPL")
_library.impl("student_t_rsample_kl", _reference_forward, "CompositeExplicitAutograd")
_library.impl("student_t_rsample_kl_backward", _reference_backward, "CompositeExplicitAutograd")
_library.impl("student_t_noise", _reference_noise, "CompositeExplicitAutograd")
