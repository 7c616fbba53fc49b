"""What ranks do in tests: processes that stay for all tests of a file, and join for each run."""

import contextlib
import io
import os
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import ranks as processes

import sqloss.training
from sqloss import cli
from sqloss.common import ranks
from sqloss.common.errors import UserError
from sqloss.common.flags import configure
from sqloss.models import GAN, classifier
from sqloss.models.augment import draw_augmentation
from sqloss.training import checkpoint, figures
from sqloss.training.batch_norm import over_ranks
from sqloss.training.gan.config import GANConfig
from sqloss.training.gan.generation import draw_noise
from sqloss.training.gan.loop import Contender, own_part
from sqloss.training.progress import Progress, Silence
from sqloss.training.run import Run, check_ranks_agree
from sqloss.training.trainers import TRAINERS
from sqloss.training.vae.config import VAEConfig

# Looking up the name of a machine takes 5 s where nobody knows it.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}


class Torchrun:
    """Starts functions as torchrun does, on any number of ranks up to a size."""

    def __init__(self, size):
        self.processes = processes.Ranks(size, groups=())

    def run(self, count, function, *arguments):
        """What the function returns, or the exception that it raises, on each rank."""
        with tempfile.TemporaryDirectory() as folder:
            of_ranks = [(rank, count, Path(folder, "store")) for rank in range(count)]
            return self.processes.run(as_rank, of_ranks, function, *arguments)

    def close(self):
        self.processes.close()


def as_rank(_group, of_rank, function, *arguments):
    rank, count, file = of_rank
    os.environ |= dict.fromkeys(ranks.GIVEN, str(rank)) | {"WORLD_SIZE": str(count)}
    os.environ |= LOOPBACK
    rendezvous = sys.modules["torch.distributed.rendezvous"]
    rendezvous.rendezvous = lambda _: iter([(dist.FileStore(str(file), count), rank, count)])
    try:
        return function(*arguments)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which a rank that ends ignores


def joined(function, *arguments):
    with ranks.joined():
        return function(*arguments)


# trainings


class Interrupting(Silence):
    """Sends this process a signal after so many steps."""

    def __init__(self, after):
        self.after = after

    def step(self):
        self.after -= 1
        if self.after == 0:
            signal.raise_signal(signal.SIGTERM)


def train(command, directory, given, whole, interrupted=(None, 0)):
    """Train a run, or go on with it, in a directory that the first rank alone can reach.

    Whether it came to its end, its state, and what it told. A rank may be interrupted after a
    number of steps.
    """
    kind = TRAINERS[command].config
    mine = directory if ranks.is_first() else Path("/nowhere/at/all")
    is_resumed = (directory / "config.json").exists()
    run = Run.resumed(kind, mine, given) if is_resumed else Run.new(mine, configure(kind, **given))
    with contextlib.redirect_stderr(io.StringIO()) as told:
        run.begin(TRAINERS[command], whole)
        progress = Progress(*run.steps(), run.config.epochs) if ranks.is_first() else Silence()
        rank, after = interrupted
        if rank == ranks.number():
            progress = Interrupting(after)
        finished = run.fit(progress)
    return finished, run.training.state_dict(), told.getvalue()


class Own(nn.Module):
    """A user's model, with batch norm; its second loss has parameters of its own."""

    def __init__(self, has_unused):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4, momentum=None))
        self.unused = nn.Linear(2, 1) if has_unused else None

    def losses(self, batch):
        x, names = batch
        assert list(names) == names_of(x)
        losses = {"loss": self.layers(x).square().sum(1)}
        return losses | ({"unused": self.unused(x)[:, 0]} if self.unused else {})


class Named(torch.utils.data.Dataset):
    """Samples that have a name each, of which default_collate makes tuples."""

    def __init__(self, x):
        self.samples = list(zip(x, names_of(x), strict=True))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


def names_of(x):
    return [str(number) for number in x[:, 0].tolist()]


def train_own(directory, has_unused=False, **settings):
    """``train`` on a user's model, twice, as one script may; the second one's metrics and state."""
    torch.manual_seed(0)
    model, x = Own(has_unused), torch.randn(42, 2)
    # Not Adam, which makes a step of the rounding where a gradient is 0, as before a batch norm
    settings |= {"optimizer": partial(torch.optim.SGD, lr=0.05), "no_baseline": True}
    settings |= {"epochs": 2, "batch_size": 20, "progress": False}
    for name in ("first", "second"):
        run = sqloss.training.train(model, Named(x), output_dir=directory / name, **settings)
    return run.metrics, run.model.state_dict()


def end_twice(patience):
    """Join and leave; then join again, and tell an error that the first rank has not met."""
    ranks.PATIENCE = patience
    with contextlib.redirect_stderr(io.StringIO()) as told:
        for is_first_time in (True, False):
            with ranks.joined():
                if ranks.number() == 1 and not is_first_time:
                    ranks.tell_error("only here")
                elif not is_first_time:
                    time.sleep(2 * patience)
    return [told.getvalue()]


def gan_gradients(given, batch, sides):
    """Of both players after a step of each, in float64; and the state of the model."""
    config = configure(GANConfig, **given)
    torch.manual_seed(0)
    classes = 3 if config.conditional else 0
    model = GAN(
        (1, *sides),
        3,
        2,
        classes=classes,
        codes=config.info_codes,
        batch_norm=config.loss != "wgan-gp",
    )
    contender = Contender(over_ranks(model.double()), config.risk.of_model(), config)
    draws = torch.Generator().manual_seed(1)
    real = torch.rand(batch, 1, *sides, generator=draws).double() * 2 - 1
    noise = draw_noise(batch, model.generator, draws, torch.arange(batch) % 3)
    noise = noise._replace(z=noise.z.double())
    if noise.codes is not None:
        noise = noise._replace(codes=noise.codes.double())
    shift = own_part(draw_augmentation(batch, (1, *sides), draws))
    part, noise = ranks.part(batch), own_part(noise)
    mix = torch.rand(batch, generator=draws).double()[part]
    needed = {"rows": torch.arange(batch)[part]}
    contender.discriminator_step(real[part], noise, (shift, shift), mix, batch, needed)
    contender.generator_step(real[part], noise, shift, batch)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients, model.state_dict(), contender.totals


def batch_norm(sizes, is_training, whole):
    """Of the second of two batches, of which the ranks have so many samples."""
    dtype = whole.dtype
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    norm = nn.Sequential(kind[whole[0].dim()](3)).to(dtype)
    norm[0].weight.data = torch.tensor([0.5, 1.0, -2.0], dtype=dtype)
    over_ranks(norm).train(is_training)
    weight = torch.linspace(-1, 1, whole[0].numel(), dtype=dtype).view(whole[0].shape)
    if ranks.count() > 1:
        whole = whole.split(sizes, 1)[ranks.number()]
        weight = weight.split(sizes)[ranks.number()]
    first, second = whole
    norm(first + 1)
    second = second.clone().requires_grad_()
    output = norm(second)
    (output * weight).sum().backward()
    return {
        "output": output.detach(),
        "input gradient": second.grad,
        "gradients": [ranks.summed(each.grad) for each in norm.parameters()],
        "state": norm.state_dict(),
    }


# agreement


def agreements():
    """What ranks agree upon, and the parts of which they make a whole."""
    me = ranks.number()
    values = torch.arange(14.0).view(2, 7)
    order = []
    ranks.in_turns(lambda: order.append(ranks.number()))

    def refuse():
        raise UserError(f"refused by {ranks.number()}")

    try:
        ranks.of_first(refuse)
    except UserError as error:
        refusal = str(error)
    return {
        "part": ranks.part(7),
        "whole": ranks.whole(values[:, ranks.part(7)], 7),
        "none": ranks.whole(torch.ones(1)[ranks.part(1)], 1),
        "summed": ranks.summed(torch.tensor([me + 1.0, 2.0])),
        "any of": [ranks.any_of(False), ranks.any_of(me == 1)],
        "of first": ranks.of_first(lambda: f"from {ranks.number()}"),
        "turn": order,
        "refusal": refusal,
    }


def differ(name, same, values):
    ranks.check_same_on_ranks({"--same": same, name: values[ranks.number()]})


def differ_in_device(data):
    device = torch.device(["cpu", "cuda"][ranks.number()])
    with mock.patch.object(VAEConfig, "torch_device", device):
        check_ranks_agree(VAEConfig(), data.fingerprint())


# the command line


def command(arguments, of_ranks=None, patience=60.0, fails=None):
    """The exit status of a command, and what it tells; a rank may have flags of its own."""
    rank = int(os.environ["RANK"])
    arguments = [*arguments, *(of_ranks[rank] if of_ranks else [])]
    before = ranks.PATIENCE, checkpoint.save, classifier.STEPS, figures.DPI
    ranks.PATIENCE, classifier.STEPS, figures.DPI = patience, 5, 20  # a quick report
    if fails is not None:
        checkpoint.save = fail_on(*fails)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            try:
                status = cli.main(arguments)
            except SystemExit as end:
                status = end.code
    finally:
        ranks.PATIENCE, checkpoint.save, classifier.STEPS, figures.DPI = before
    return status, out.getvalue(), err.getvalue()


def toy_command(arguments):
    """The same with the toy trainer, which is registered meanwhile."""
    import toy  # noqa: F401

    try:
        return command(arguments)
    finally:
        TRAINERS.unregister("toy")
        del sys.modules["toy"]


def fail_on(kind, message):
    def save(*_):
        raise kind(message)

    return save
