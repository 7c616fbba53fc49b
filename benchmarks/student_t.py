"""Student-t latents beside Gaussian ones: z and its KL, as every step of a VAE needs them, written
in torch operations, with torch.distributions, and by sqloss from a seed, which its twin takes too.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from measure import BOTH, Case, Contender, Operation, in_graph
from torch import Tensor
from torch.distributions import StudentT

import sqloss
from sqloss import reference

DF = 5.0
SAMPLES = 64
COLUMNS = {128: 20, 65536: 128}  # by the number of rows; else
MANY_COLUMNS = 64
EXTRA_BYTES = 2**12
EXTRA_BYTES_PER_ROW = 32
TOLERANCE = 1e-5

GAUSSIAN, NORMAL = "Gaussian in torch", "sqloss, normal"
FIXED, LEARNED, LEARNED_BY_COLUMN = "sqloss", "sqloss, df learned", "sqloss, df [m] learned"
PEER, LEARNED_PEER = "torch StudentT", "torch StudentT, df [m] learned"

# What fixed degrees of freedom may cost, by the number of rows; with AVX2 as with AVX-512.
CPU_BARS = {
    128: {GAUSSIAN: 0.5, PEER: 0.15},
    1024: {GAUSSIAN: 0.75, PEER: 1 / 8},
    16384: {GAUSSIAN: 0.9, PEER: 1 / 8},
}
GPU_BARS = {65536: {GAUSSIAN: 0.5, PEER: 1 / 10}}

Outputs = Sequence[Tensor]


# --- contenders -----------------------------------------------------------------------------------


def gaussian(loc: Tensor, logvar: Tensor) -> Outputs:
    z = loc + (0.5 * logvar).exp() * torch.randn_like(loc)
    return z, 0.5 * (loc.square() + logvar.exp() - 1 - logvar).sum(-1)


def gaussian_of_samples(loc: Tensor, logvar: Tensor) -> Tensor:
    noise = torch.randn(SAMPLES, *loc.shape, dtype=loc.dtype, device=loc.device)
    z = loc + (0.5 * logvar).exp() * noise
    return 0.5 * (z.square() - noise.square() - logvar).sum(-1).mean(0)


def torch_student_t(loc: Tensor, logvar: Tensor, df: float | Tensor = DF) -> Outputs:
    q = StudentT(df, loc, (0.5 * logvar).exp(), validate_args=False)
    z = q.rsample()
    return z, (q.log_prob(z) - StudentT(df, validate_args=False).log_prob(z)).sum(-1)


def normal(loc: Tensor, logvar: Tensor, seed: Tensor) -> Outputs:
    return sqloss.normal_rsample_kl(loc, logvar=logvar, seed=seed)


def student_t(loc: Tensor, logvar: Tensor, seed: Tensor, df: float | Tensor = DF) -> Outputs:
    return sqloss.student_t_rsample_kl(df, loc, logvar=logvar, seed=seed)


def kl_of_samples(loc: Tensor, logvar: Tensor, seed: Tensor) -> Tensor:
    return sqloss.student_t_rsample_kl(
        DF, loc, logvar=logvar, num_samples=SAMPLES, return_z=False, seed=seed
    )


def twin(
    loc: Tensor,
    logvar: Tensor,
    seed: Tensor,
    df: Tensor | None = None,
    *,
    dtype: torch.dtype,
    fixed_df: float | None = DF,
    num_samples: int | None = None,
) -> list[Tensor]:
    """The values (of several samples the KL alone), and the gradients of loc, logvar and a df."""
    loc, logvar = loc.to(dtype), logvar.to(dtype)  # the dtype has its own random bits
    given = torch.full_like(loc, fixed_df) if df is None and fixed_df else df
    arguments = (
        *(given if given is None else given.expand_as(loc), loc, logvar, None),
        *(seed, None, num_samples, "logvar", "closed_form" if given is None else "mc", True),
    )
    z, kl = reference.student_t_rsample_kl(*arguments, True)
    grad_z = torch.ones_like(z) if num_samples is None else None
    of_df, *gradients, _ = reference.student_t_rsample_kl_backward(
        grad_z, torch.ones_like(kl), *arguments, [df is not None, True, True, False]
    )
    of_learned = [] if df is None else [of_df.double().sum_to_size(df.shape)]
    return [*([z] if num_samples is None else []), kl, *gradients, *of_learned]


# --- cases ----------------------------------------------------------------------------------------

LOC, LOGVAR, SEED, DF_SCALAR, DF_BY_COLUMN = range(5)


def draw(rows: int, **like: Any) -> list[Tensor]:
    columns = COLUMNS.get(rows, MANY_COLUMNS)
    return [
        torch.randn(rows, columns, **like),
        torch.randn(rows, columns, **like),
        sqloss.draw_seed(device=like["device"]),
        torch.full((), DF, **like),
        torch.full((columns,), DF, **like),
    ]


def rsample_kl(rows: int, **like: Any) -> Case:
    gpu = like["device"].type == "cuda"
    of_twin = partial(twin, dtype=like["dtype"])
    fixed = (GPU_BARS if gpu else CPU_BARS).get(rows, {})
    learned = {} if gpu else {BOTH: {FIXED: 1.3, LEARNED_PEER: 1 / 12}}
    random, seeded = [LOC, LOGVAR], [LOC, LOGVAR, SEED]
    # StudentT validates its Chi2 whatever it is told, which waits for the device
    peer = partial(Contender, exact=False, repeatable=False, capturable=False)
    return Case(
        shape=(rows, COLUMNS.get(rows, MANY_COLUMNS)),
        inputs=partial(draw, rows, **like),
        contenders=[
            Contender(GAUSSIAN, gaussian, repeatable=False, uses=random),
            Contender(NORMAL, normal, partial(of_twin, fixed_df=None), uses=seeded),
            Contender(FIXED, student_t, of_twin, bars={BOTH: fixed}, uses=seeded),
            Contender(LEARNED, student_t, of_twin, bars=learned, uses=[*seeded, DF_SCALAR]),
            Contender(
                LEARNED_BY_COLUMN, student_t, of_twin, bars=learned, uses=[*seeded, DF_BY_COLUMN]
            ),
            peer(PEER, torch_student_t, uses=random),
            peer(LEARNED_PEER, torch_student_t, uses=[*random, DF_BY_COLUMN]),
        ],
        leaves=[LOC, LOGVAR, DF_SCALAR, DF_BY_COLUMN],
        modes=[BOTH, in_graph(BOTH)] if gpu else [BOTH],
        reads=2 if gpu else 1,  # by each pass once
        tolerance=TOLERANCE,
    )


def kl_of_many_samples(rows: int, **like: Any) -> Case:
    gpu = like["device"].type == "cuda"
    return Case(
        shape=(rows, COLUMNS.get(rows, MANY_COLUMNS)),
        inputs=partial(draw, rows, **like),
        contenders=[
            Contender(GAUSSIAN, gaussian_of_samples, repeatable=False, uses=[LOC, LOGVAR]),
            Contender(
                FIXED,
                kl_of_samples,
                partial(twin, dtype=like["dtype"], num_samples=SAMPLES),
                uses=[LOC, LOGVAR, SEED],
                extra_bytes=EXTRA_BYTES + EXTRA_BYTES_PER_ROW * rows,
            ),
        ],
        leaves=[LOC, LOGVAR],
        modes=[BOTH, in_graph(BOTH)] if gpu else [BOTH],
        reads=2 if gpu else 1,
        tolerance=TOLERANCE,
    )


OPERATIONS = {
    "rsample_kl": Operation(
        "z and its KL from the prior, df = 5",
        rsample_kl,
        [128, 1024, 16384],
        quick=[128, 1024],
        gpu_sizes=[128, 16384, 65536],
    ),
    "kl_of_many_samples": Operation(
        f"the KL alone, of {SAMPLES} samples, df = 5",
        kl_of_many_samples,
        [1024],
        quick=[128],
        gpu_sizes=[16384],
    ),
}
