"""Every operator forward and backward over edge sizes and dtypes, quickly, for compute-sanitizer:
``python tests/sanitizer_cases.py cuda``. What they compute is for the tests to say.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import sqloss

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Draw = Callable[..., Tensor]
Call = Callable[[], Any]


def superquantile(draw: Draw) -> Iterator[Call]:
    # around a warp, a block, and what shared memory and one block's share of a long row hold
    lengths = (1, 2, 31, 32, 33, 255, 257, 1023, 1024, 1025, 4097, 2**14 + 1, 49_153, 2**16 + 1)
    for n in lengths:
        yield lambda n=n: sqloss.cvar(draw(n), 0.8)
    for rows, n in itertools.product((1, 5, 33), (1, 3, 32, 257, 1025, 2049)):
        yield lambda rows=rows, n=n: sqloss.cvar(draw(rows, n), 0.8, dim=1)
        yield lambda rows=rows, n=n: sqloss.cvar(draw(n, rows), 0.8, dim=0)
    for n in (1, 33, 1025, 2**16 + 1):
        weight, mask = draw(n).detach().abs() + 1, draw(n) < 2
        yield lambda n=n, w=weight: sqloss.cvar(draw(n), 0.5, weight=w)
        yield lambda n=n, w=weight, m=mask: sqloss.value_at_risk(draw(n), 0.5, weight=w, mask=m)
        yield lambda n=n: sqloss.cvar(draw(n).round(), 0.9)  # ties
    yield lambda: sqloss.cvar(draw(0, 5), 0.5, dim=1)
    yield lambda: sqloss.cvar(draw(2**20 + 1), 0.99)
    if draw(0).dtype == torch.float32:  # the longest rows are sampled before they are read
        yield lambda: sqloss.cvar(draw(2**23 + 1), 0.8)


def pointwise_losses(draw: Draw) -> Iterator[Call]:
    for shape in ((1, 1), (3, 5), (33, 32), (2, 1025), (5, 784), (1, 4097), (1025, 3), (2, 0)):
        x, y = draw(*shape), draw(*shape).detach()
        positive = y.abs() + 0.1
        for function in (
            lambda x=x, y=y: sqloss.cvar_binary_cross_entropy_with_logits(x, y, alpha=0.5),
            lambda x=x, y=y, p=positive: sqloss.cvar_binary_cross_entropy_with_logits(
                x, y, alpha=0.5, weight=p, pos_weight=p, reduction="sum"
            ),
            lambda x=x, y=y: sqloss.cvar_mse_loss(x, y, alpha=0.8, sample_dims=2),
            lambda x=x, y=y, p=positive: sqloss.cvar_smooth_l1_loss(x, y, alpha=0.8, weight=p),
            lambda x=x, y=y, p=positive: sqloss.cvar_gaussian_nll_loss(
                x, y, p.requires_grad_(), alpha=0.8
            ),
        ):
            if x.numel() > 0:
                yield function
        yield lambda x=x, y=y: sqloss.losses.mse_loss(x, y, sample_dims=1)


def cross_entropy_losses(draw: Draw) -> Iterator[Call]:
    for n, classes, *pixels in (
        *((1, 1), (3, 2), (4, 33), (33, 32), (2, 1025), (1, 5003), (257, 10)),
        *((2, 7, 5, 3), (1, 3, 33, 32), (2, 2, 1)),
    ):
        x = draw(n, classes, *pixels)
        target = torch.arange(n * x[0, 0].numel()).remainder(classes).view(n, *pixels).to(x.device)
        weight = draw(classes).detach().abs() + 0.1
        probabilities = draw(n, classes, *pixels).detach().softmax(1)
        yield lambda x=x, t=target: sqloss.cvar_cross_entropy(x, t, alpha=0.5)
        yield lambda x=x, t=target, w=weight: sqloss.losses.cross_entropy(
            x, t, weight=w, ignore_index=0, label_smoothing=0.1
        )
        yield lambda x=x, p=probabilities, w=weight: sqloss.cvar_cross_entropy(
            x, p, alpha=0.5, weight=w
        )


def student_t(draw: Draw) -> Iterator[Call]:
    for rows, columns in ((1, 1), (3, 2), (5, 17), (33, 33), (2, 257), (1, 5003), (1025, 20)):
        loc, logvar = draw(rows, columns), draw(rows, columns)
        df = draw(columns).detach().abs().add(1).requires_grad_()
        of_rows = torch.arange(rows).flip(0).to(loc.device)
        for samples in (1, 3):
            options = {"logvar": logvar, "num_samples": samples}
            yield lambda x=loc, o=options: sqloss.normal_rsample_kl(x, **o)
            yield lambda x=loc, o=options: sqloss.student_t_rsample_kl(5.0, x, **o)
            yield lambda x=loc, o=options, df=df, rows=of_rows: sqloss.student_t_rsample_kl(
                df,
                x,
                prior_df=4.0,
                rows=rows,
                reduction="none",
                **o,
                seed=sqloss.draw_seed(device=x.device),
            )
            yield lambda x=loc, o=options, df=df: sqloss.student_t_rsample_kl(
                df, x, estimator="analytic_entropy", return_z=False, **o
            )
        yield lambda x=loc, df=df: sqloss.student_t_rsample(df, x, 1.0)
        seed = sqloss.draw_seed(device=loc.device)
        yield lambda x=loc, seed=seed: torch.ops.sqloss.student_t_noise(x, seed, None, 2)


def gradients(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Of all that was drawn for them."""
    wanted = [t for t in outputs if t.requires_grad]
    if not wanted:
        return ()
    nodes = {t.grad_fn for t in wanted}
    unseen = list(nodes)
    while unseen:
        above = {node for node, _ in unseen.pop().next_functions if node} - nodes
        nodes |= above
        unseen.extend(above)
    leaves = [node.variable for node in nodes if hasattr(node, "variable")]
    return torch.autograd.grad(wanted, leaves, [torch.ones_like(t) for t in wanted])


def run(device: torch.device) -> int:
    """How many calls there were."""
    generator, calls = torch.Generator().manual_seed(0), 0
    for dtype in DTYPES:

        def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            """Made on the CPU: no other kernels than those that are looked at."""
            made = torch.rand(shape, generator=generator).to(dtype)
            return made.to(device).requires_grad_()

        for cases in (superquantile, pointwise_losses, cross_entropy_losses, student_t):
            for call in cases(draw):
                outputs = call()
                outputs = [outputs] if isinstance(outputs, Tensor) else outputs
                for t in (*outputs, *gradients(outputs)):
                    t.cpu()  # that something was written everywhere
                calls += 1
    return calls


if __name__ == "__main__":
    print(f"{run(torch.device(sys.argv[1]))} calls")
