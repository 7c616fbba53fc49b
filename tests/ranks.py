"""Processes of torch.distributed for tests, and what these have them do."""

import contextlib
import datetime
import itertools
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms import Join
from torch.nn.parallel import DistributedDataParallel

import sqloss
from sqloss.models import VAE

CONTEXT = multiprocessing.get_context("forkserver")
LIMIT = 120  # seconds
LATE = datetime.timedelta(seconds=1)


class Ranks:
    """Processes that wait for functions to run; of so many of them there is a group each.

    Where there are to be no groups the functions make their own.
    """

    def __init__(self, size, groups):
        CONTEXT.set_forkserver_preload(["sqloss", "torch._dynamo"])  # once, not by each
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=serve, args=(theirs, rank, size, groups, self.folder.name), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, of_ranks, *arguments, **options):
        """What the function returns, or the exception it raises, on as many ranks as arguments."""
        pipes = self.pipes[: len(of_ranks)]
        for pipe, of_rank in zip(pipes, of_ranks, strict=True):
            pipe.send((function, len(pipes), of_rank, arguments, options))
        try:
            results = [received(pipe) for pipe in pipes]
        except TimeoutError:
            for process in self.processes:
                process.kill()
            raise
        for result in results:
            if isinstance(result, str):
                raise AssertionError(result)
        return results

    def close(self):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join()
        self.folder.cleanup()


def received(pipe):
    if not pipe.poll(LIMIT):
        raise TimeoutError(f"expected all ranks to be done within {LIMIT} s")
    try:
        return pipe.recv()
    except EOFError as error:  # the process is gone
        return error


GROUPS = {}


def serve(pipe, rank, size, groups, folder):
    torch.set_num_threads(1)
    if groups:
        join(rank, size, groups, folder)
    while True:
        try:
            function, count, of_rank, arguments, options = pipe.recv()
        except EOFError:  # the tests are done
            os._exit(0)
        try:
            result = function(GROUPS.get(count), of_rank, *arguments, **options)
        except AssertionError:
            result = traceback.format_exc()
        except Exception as error:
            result = error
        pipe.send(result)


def join(rank, size, groups, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{Path(folder, 'store')}", rank=rank, world_size=size
    )
    for count in groups:
        GROUPS[count] = dist.new_group(range(count))
    GROUPS["late"] = dist.new_group(range(2), timeout=LATE)


def tails(group, shards, calls):
    """(value, gradient, indices, weights) of each shard, each with its alpha and options."""
    results = []
    for losses, (alpha, options) in zip(shards, calls, strict=True):
        losses, of_rank = losses
        leaf = losses.clone().requires_grad_()
        options = {**of_rank, **options, "group": group}
        value = sqloss.distributed.cvar(leaf, alpha, **options)
        (gradient,) = torch.autograd.grad(value, leaf)
        indices, weights = sqloss.distributed.tail_indices(losses, alpha, **options)
        results.append((value.detach(), gradient, indices, weights))
    return results


def raises(group, of_rank):
    function, losses, options = of_rank
    return getattr(sqloss.distributed, function)(losses, **options, group=group)


def not_in_the_group(group, is_in):
    others = dist.new_group([0])
    if not is_in:
        sqloss.distributed.cvar(torch.randn(3), 0.5, group=others)


def late(group, comes):
    if comes:
        sqloss.distributed.cvar(torch.randn(3), 0.5, group=GROUPS["late"])


def leaves(group, how, function):
    """In the middle of the function: between the first of its collectives and the second."""
    all_reduce, rounds = dist.all_reduce, []

    def leave(tensor, **options):
        rounds.append(tensor)
        if how == "killed" and len(rounds) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "late" and len(rounds) == 2:
            time.sleep(1.5 * LATE.total_seconds())
        all_reduce(tensor, **options)

    with mock.patch.object(dist, "all_reduce", leave):
        if function == "cvar":
            sqloss.distributed.cvar(torch.randn(9), 0.5, group=GROUPS["late"])
        else:
            x = torch.randn(9, requires_grad=True)
            sqloss.distributed.tail_loss(torch.square, x, alpha=0.5, group=GROUPS["late"])


def regression():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def losses_of(model, x, y):
    return (model(x) - y).square().sum(1)


def gradients(group, batch, way, alpha, reduction, **of_ddp):
    """(value, gradients) of a model in DistributedDataParallel, or that are added up by hand."""
    x, y, mask = batch
    model = regression()
    run = model
    if reduction == "mean":
        run = DistributedDataParallel(model, process_group=group, **of_ddp)
    options = {"alpha": alpha, "mask": mask, "group": group, "grad_reduction": reduction}
    fn = partial(losses_of, run)
    if way == "all rows":
        value = sqloss.distributed.cvar(fn(x, y), **options)
        value.backward()
    elif way == "tail_indices":
        with torch.no_grad():
            losses = losses_of(model, x, y)
        indices, weights = sqloss.distributed.tail_indices(losses, **options)
        (weights * fn(x[indices], y[indices])).sum().backward()
        value = sqloss.distributed.cvar(losses, **options)
    elif way == "tail_loss":
        value = sqloss.distributed.tail_loss(fn, x, y, **options)
        value.backward()
    else:
        options["chunk_size"] = 5
        if way == "tail_backward, no_sync" and reduction == "mean":
            options["no_sync"] = run.no_sync
        value = sqloss.distributed.tail_backward(fn, x, y, **options)
    for parameter in model.parameters():
        if reduction == "sum":
            dist.all_reduce(parameter.grad, group=group)
    return value.detach(), [parameter.grad for parameter in model.parameters()]


def of_uneven_batches(group, batches):
    """Gradients of each step, of as many as the rank with the most batches takes."""
    model = DistributedDataParallel(regression(), process_group=group)
    steps = torch.tensor([len(batches)])
    dist.all_reduce(steps, dist.ReduceOp.MAX, group=group)
    no_rows = torch.empty(0, 4).double(), torch.empty(0, 2).double()
    gradients = []
    for x, y in itertools.islice(itertools.chain(batches, itertools.repeat(no_rows)), int(steps)):
        model.zero_grad()
        sqloss.distributed.cvar(losses_of(model, x, y), 0.8, group=group).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    return gradients


def in_join(group, batches):
    """Until the first rank is at its end."""
    model = DistributedDataParallel(regression(), process_group=group)
    with Join([model], throw_on_early_termination=True):
        for x, y in batches:
            sqloss.distributed.cvar(losses_of(model, x, y), 0.8, group=group).backward()
    return [parameter.grad for parameter in model.parameters()]


def named(group, x, name, way="tail_loss"):
    """The tail of a function of this file, with modules in DistributedDataParallel."""
    fn = globals()[name]()
    if isinstance(fn, nn.Module):
        fn = DistributedDataParallel(fn, process_group=group)
    options = {"alpha": 0.8, "group": group}
    if way == "tail_backward":
        options["chunk_size"] = 6
    return getattr(sqloss.distributed, way)(lambda x: fn(x).sum(1), x, **options).detach()


class Normalised(nn.Sequential):
    def __init__(self, norm):
        super().__init__(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), norm))


def batch_norm():
    return Normalised(nn.BatchNorm1d(4))


def sync_batch_norm():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(batch_norm())
    return lambda x: model(x)  # on the CPU DistributedDataParallel takes none


def dropout():
    return Normalised(nn.Dropout(0.3))


def random_numbers():
    return lambda x: x + torch.rand_like(x)


def by_position():
    """Losses that change with the rows of the batch."""
    return lambda x: x.requires_grad_() + torch.arange(len(x))[:, None]


def rounding_alone():
    """Losses that other numbers of rows round in another way."""
    return lambda x: (x.requires_grad_() + len(x) * 1e4 - len(x) * 1e4) - x


def fails_on_large_losses():
    return lambda x: x * (1 // (x.sum().item() < 100))


def sharded_gradients(group, batch, way, losses="vae_losses"):
    """(value, gradients) of a VAE whose parameters FSDP shards over the ranks."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model = vae()
    mesh = DeviceMesh.from_group(group, "cpu")
    for part in (model.encoder, model.decoder, model):
        fully_shard(part, mesh=mesh)
    register_fsdp_forward_method(model, "losses")
    options = {"alpha": 0.8, "group": group}
    fn = partial(globals()[losses], model)
    if way == "all rows":
        value = sqloss.distributed.cvar(fn(*batch), **options)
        value.backward()
    elif way == "tail_loss":
        value = sqloss.distributed.tail_loss(fn, *batch, **options)
        value.backward()
    else:

        @contextlib.contextmanager
        def no_sync():
            model.set_requires_gradient_sync(False)
            yield
            model.set_requires_gradient_sync(True)

        options["chunk_size"] = 3
        if way == "tail_backward, no_sync":
            options["no_sync"] = no_sync
        value = sqloss.distributed.tail_backward(fn, *batch, **options)
    local = sum(parameter.to_local().numel() for parameter in model.parameters())
    assert local < sum(parameter.numel() for parameter in model.parameters())
    return value.detach(), [parameter.grad.full_tensor() for parameter in model.parameters()]


def vae():
    torch.manual_seed(0)
    return VAE((1, 6, 6), hidden=(12,), latent=4).double()


def vae_losses(model, x, rows):
    losses = model.losses(x, torch.tensor(7), rows=rows)
    return losses["reconstruction"] + losses["kl"]


def rounded(model, x, rows):
    """Of other numbers of rows in another way."""
    number = 1e15 + 1e13 * len(x)
    return vae_losses(model, x, rows) + number - number


def coupled(model, x, rows):
    return vae_losses(model, x, rows) + len(x)


def in_threads(count, function):
    """function(rank, all_reduce) on as many threads, whose tensors all_reduce adds up."""
    barrier, payloads, results = threading.Barrier(count), [None] * count, [None] * count

    def run(rank):
        def all_reduce(payload):
            payloads[rank] = payload.clone()
            barrier.wait()
            payload.copy_(sum(payloads))
            barrier.wait()

        try:
            results[rank] = function(rank, all_reduce)
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException) and not isinstance(
            result, threading.BrokenBarrierError
        ):
            raise result
    return results
