"""The *ranks*, processes that ``torchrun`` starts: which of them this is, what they do together.

All ranks hold the same data and draw the same batches and the same noise; each computes its part of
a batch, and what they add up has the same bits on all of them. So every rank has the whole state of
the training, which knows nothing of ranks, and the first of them alone reads and writes it.

With one process everything here does nothing.
"""

import atexit
import contextlib
import datetime
import io
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sqloss.common.errors import UserError
from sqloss.common.streams import tell

if TYPE_CHECKING:  # some builds of torch lack torch.distributed
    from torch.distributed.distributed_c10d import Store

Result = TypeVar("Result")

GIVEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets these
DOWNLOAD = datetime.timedelta(days=1)  # so long the others wait for one that fetches the data
# An error waits so long for the first rank, which reports it if it has met it too.
PATIENCE = 5.0  # seconds
REPORTED, TURN = "sqloss: why all end", "sqloss: done by rank"  # in the store of the ranks


def count() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if is_joined() else 1


def number() -> int:
    """Which of them this is, from 0 up."""
    return dist.get_rank() if is_joined() else 0


def is_first() -> bool:
    """Whether this is the rank that writes files and messages."""
    return number() == 0


def is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


# beginning and end


class _UnreportedEnd:
    """The errors of this rank, to be reported at its end unless the first rank has reported any."""

    def __init__(self, store: "Store") -> None:
        self.store = store
        self.lines: list[str] = []

    def is_reported(self) -> bool:
        until = time.monotonic() + PATIENCE
        try:
            # Not store.wait, which writes a warning of its own where the time is over.
            while not self.store.check([REPORTED]):
                if time.monotonic() > until:
                    return False
                time.sleep(0.05)
        except RuntimeError:  # the first rank kept the store, and has left
            return True
        return True

    def report(self) -> None:
        for line in self.lines:
            tell(f"rank {number()}: {line}")

    def mark_reported(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.store.set(REPORTED, "")


_unreported_end: _UnreportedEnd | None = None


@contextlib.contextmanager
def joined(ends: bool = True) -> Iterator[None]:
    """Join the other ranks where torchrun has started several, and leave them at the end.

    The first leaves first: torchrun ends all others as soon as one has failed.
    """
    global _unreported_end
    started = all(name in os.environ for name in GIVEN) and int(os.environ["WORLD_SIZE"]) > 1
    if not started or is_joined():  # by whoever calls this
        yield
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    # torchrun's store outlives this: a later joining has keys of its own
    joining = store.add(f"sqloss: joinings of rank {rank}", 1)
    store = PrefixStore(f"sqloss: joining {joining}", store)
    with_gpu = torch.cuda.is_available() and dist.is_nccl_available()
    if with_gpu and local() < torch.cuda.device_count():
        torch.cuda.set_device(local())  # what the device "cuda" is
    backend = "cpu:gloo,cuda:nccl" if with_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    any_of(False)  # nobody leaves while another is still joining
    _unreported_end = _UnreportedEnd(store)
    try:
        yield
    finally:
        if is_joined():
            if not is_first() and not _unreported_end.is_reported():
                _unreported_end.report()
            if ends:
                # From now on torchrun may end this rank because others have ended: it does so.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            _unreported_end.mark_reported()
            dist.destroy_process_group()
        _unreported_end = None


def local() -> int:
    """Which of the ranks on this machine this is."""
    return int(os.environ["LOCAL_RANK"])


def disband() -> bool:
    """Let the first rank go on alone; False on the others, which have nothing more to do."""
    was_first = is_first()
    if is_joined():
        any_of(False)  # nobody still waits for anyone
        dist.destroy_process_group()
    if not was_first:
        # DistributedDataParallel's threads may abort Python at its shutdown, and torchrun would
        # then end the first rank: leave at once.
        atexit.register(os._exit, 0)
    return was_first


def say(line: str) -> None:
    """Print a line on stderr: once, whatever the number of ranks."""
    if is_first():
        tell(line)


def tell_error(line: str) -> None:
    """Print an error on stderr: at once on the first rank, on others at the end if it has not."""
    if _unreported_end is None or is_first():
        tell(line)
    else:
        _unreported_end.lines.append(line)


def another_has_failed() -> bool:
    """Whether a rank that has left has reported an error, to which other failures are due."""
    return _unreported_end is not None and is_joined() and _unreported_end.is_reported()


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
    if is_first():
        yield
        return
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as unprinted,
    ):
        try:
            yield
        finally:
            if unprinted.getvalue():  # a wrong flag, maybe of this rank alone
                tell_error(unprinted.getvalue().rstrip())


# what ranks agree upon


def of_first(function: Callable[[], Result]) -> Result:
    """What a function returns on the first rank, or the UserError that it raises there, on all."""
    if count() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = function()
        except UserError as refusal:
            outcome[1] = refusal
    dist.broadcast_object_list(outcome, device=torch.device("cpu"))
    result: Result
    result, error = outcome
    if error is not None:
        raise error
    return result


def in_turns(function: Callable[[], Result]) -> Result:
    """What a function returns, on one rank after the other."""
    if _unreported_end is not None and number() > 0:
        _unreported_end.store.wait([f"{TURN} {number() - 1}"], DOWNLOAD)
    result = function()
    if _unreported_end is not None:
        _unreported_end.store.set(f"{TURN} {number()}", "")
    return result


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    if count() == 1:
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def check_same_on_ranks(given: Mapping[str, Any]) -> None:
    """Raise for a flag that is not the same on all ranks, which torchrun starts on each machine."""
    if count() == 1:
        return
    of_ranks: list[Any] = [None] * count()
    dist.all_gather_object(of_ranks, dict(given))
    for name, value in of_ranks[0].items():
        for rank, other in enumerate(of_ranks):
            if other[name] != value:
                raise UserError(
                    f"{name}: expected the same on all ranks, got {value} on rank 0 and "
                    f"{other[name]} on rank {rank}"
                )


# parts of a batch


def part(size: int) -> slice:
    """The part of so many things that is this rank's, as torch.tensor_split cuts them."""
    each, rest = divmod(size, count())
    start = number() * each + min(number(), rest)
    return slice(start, start + each + (number() < rest))


def whole(values: Tensor, size: int) -> Tensor:
    """The values, [..., size], of which each rank has its part; without a gradient."""
    if count() == 1:
        return values
    all_values = values.new_zeros(*values.shape[:-1], size)
    all_values[..., part(size)] = values
    dist.all_reduce(all_values)
    return all_values


def gathered(values: Tensor) -> Tensor:
    """The values of all ranks, [sum of N], from those of each, [N]; the same on all ranks.

    The gradient carries a factor of the number of ranks, as ``parallel`` takes means.
    """
    if count() == 1:
        return values
    sizes = torch.zeros(count(), dtype=torch.int64)
    sizes[number()] = len(values)
    dist.all_reduce(sizes)
    start, size = int(sizes[: number()].sum()), int(sizes.sum())
    gathered_values: Tensor = _Gathered.apply(values, start, size)
    return gathered_values


class _Gathered(torch.autograd.Function):
    """Each rank puts its values where they belong among zeros, and the sum has all of them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, start: int, size: int) -> Tensor:
        ctx.rows = slice(start, start + len(values))
        all_values = values.new_zeros(size)
        all_values[ctx.rows] = values
        dist.all_reduce(all_values)
        return all_values

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        return summed(slopes[0])[ctx.rows], None, None


def summed(values: Tensor) -> Tensor:
    """The sum over the ranks; without a gradient."""
    if count() == 1:
        return values
    total = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def parallel(module: nn.Module, find_unused: bool = False) -> nn.Module:
    """The module, whose gradients become the means of those of all ranks.

    ``find_unused``: look in every step for parameters that it does not use.
    """
    if count() == 1:
        return module
    with warnings.catch_warnings():
        # From torch 2.14 on it has another name, which torch 2.11 does not know.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            module, broadcast_buffers=False, find_unused_parameters=find_unused
        )


def no_sync(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A context whose gradients of ``parallel`` modules wait for the next backward's reduction."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()
