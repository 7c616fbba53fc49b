"""A user's data as batches: tensors, data sets and loaders, and what they are made of.

A *batch* is a tensor, or a tuple, list or dict of such; every tensor has a row per sample. Beside
tensors it may have lists, tuples and arrays with an item per sample, such as the samples' names.
"""

import hashlib
import itertools
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from multiprocessing import resource_tracker
from typing import Any

import torch
from torch import Tensor

from sqloss.common.errors import UserError
from sqloss.models.seeding import initialisation, stream
from sqloss.training.loop import Training

CUT = (
    "data: expected batches that can be cut, of tensors, and of lists and arrays with an item per "
    "sample"
)


def mapped(batch: Any, of_tensor: Callable[[Tensor], Tensor]) -> Any:
    """The batch with each of its tensors replaced."""
    if isinstance(batch, Tensor):
        return of_tensor(batch)
    return with_parts(batch, lambda part: mapped(part, of_tensor))


def with_parts(batch: Any, of_part: Callable[[Any], Any]) -> Any:
    """A dict, tuple or list with each of its parts replaced; anything else as it is."""
    if isinstance(batch, Mapping):
        return {name: of_part(part) for name, part in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(of_part, batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map(of_part, batch))
    return batch


def rows_of(batch: Any, rows: slice | Tensor) -> Any:
    """Some samples of a batch.

    Tensors are cut by rows. A list or tuple without tensors in it is cut where it has an item per
    sample; else it is gone into, as a dict is. A string or a number is of all samples.

    Raises:
        UserError: the batch has something that cannot be cut, or may be cut in two ways.
    """
    size = size_of(batch)
    indices = range(size)[rows] if isinstance(rows, slice) else rows.tolist()

    def cut(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part[rows]
        if part is None or isinstance(part, str | bytes | int | float | complex):
            return part
        is_list = isinstance(part, tuple | list) and not hasattr(part, "_fields")
        if is_list and not tensors_of(part):
            check_column(part, size)
            if len(part) == size:
                return type(part)(part[index] for index in indices)
        if isinstance(part, Mapping | tuple | list):
            return with_parts(part, cut)
        shape = getattr(part, "shape", None)  # an array's, or a number's of NumPy
        if shape == ():
            return part
        if isinstance(shape, tuple) and shape[0] == size:
            return part[rows if isinstance(rows, slice) else rows.numpy(force=True)]
        raise UserError(f"{CUT}, got {type(part).__name__}")

    return cut(batch)


def check_column(part: Sequence[Any], size: int) -> None:
    """Raise for a list, without tensors, that has no item per sample or that may be cut two ways.

    ``default_collate`` makes of samples with two names each a list of two lists.
    """
    nested = [len(item) for item in part if isinstance(item, tuple | list | Mapping)]
    if len(part) == size and nested == [size] * size:
        raise UserError(
            f"{CUT}, got {size} lists of {size}: either may be the samples; give a dict"
        )
    if len(part) != size and len(nested) < len(part):
        raise UserError(f"{CUT}, got a {type(part).__name__} of {len(part)} with {size} samples")


def on_device(batch: Any, device: torch.device) -> Any:
    return mapped(batch, lambda tensor: tensor.to(device))


def tensors_of(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(batch, keep)
    return found


def size_of(batch: Any, argument: str = "data") -> int:
    """How many samples a batch has."""
    sizes = {len(tensor) if tensor.ndim else 0 for tensor in tensors_of(batch)}
    if len(sizes) != 1 or 0 in sizes:
        raise UserError(
            f"{argument}: expected batches of tensors with one row per sample, got "
            + (f"rows {', '.join(map(str, sorted(sizes)))}" if sizes else "a batch without tensors")
        )
    return sizes.pop()


def labels_of(batch: Any) -> Tensor | None:
    """The classes of a batch, if it has any: its ``label`` or ``labels``, or a second part that is
    int64 [B]."""
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in ("labels", "label") if name in batch), None)
    else:
        is_pair = isinstance(batch, tuple | list) and len(batch) == 2
        found = batch[1] if is_pair else None
    is_classes = isinstance(found, Tensor) and found.dtype == torch.int64 and found.ndim == 1
    return found if is_classes else None


class Rows:
    """Data with a number of samples, each of which can be read: tensors or a map-style data set."""

    def __init__(
        self, data: Any, device: torch.device, collate: Callable[[list[Any]], Any], argument: str
    ) -> None:
        self.device = device
        self.collate = collate
        if isinstance(data, torch.utils.data.TensorDataset):
            data = data.tensors
        self.tensors = data if isinstance(data, Tensor | tuple) else None
        self.data = data
        self.size = len(data) if self.tensors is None else size_of(data, argument)

    def __len__(self) -> int:
        return self.size

    @property
    def labels(self) -> Tensor | None:
        found = None if self.tensors is None else labels_of(self.tensors)
        return None if found is None else found.cpu()

    def steps(self, batch_size: int) -> int:
        return -(-self.size // batch_size)

    def batches(self, rows: Iterable[Tensor], training: Training) -> Iterator[Any]:
        for number, batch in enumerate(rows, training.step):
            with initialisation(training.seed, "rows", training.epoch, number):
                found = self.of_rows(batch)
            yield found

    def of_rows(self, rows: Tensor) -> Any:
        if self.tensors is not None:
            return mapped(self.tensors, lambda t: t[rows.to(t.device)].to(self.device))
        samples = self.collate([self.data[row] for row in rows.tolist()])
        return on_device(samples, self.device)

    def in_order(self, batch_size: int) -> Iterator[Any]:
        """All samples, as they are."""
        for number, rows in enumerate(torch.arange(self.size).split(batch_size)):
            with initialisation(0, "rows, in order", number):
                found = self.of_rows(rows)
            yield found

    def fingerprint(self) -> str:
        """Of tensors; of a data set the number of samples alone, as its samples may be random and
        to read all may take hours."""
        return digest(self.size, [] if self.tensors is None else tensors_of(self.tensors))


class Loader:
    """Batches as they come from an iterable, such as a DataLoader, which has its own order."""

    labels: Tensor | None = None

    def __init__(self, data: Any, device: torch.device, argument: str) -> None:
        self.data = data
        self.device = device
        if getattr(data, "persistent_workers", False):
            raise UserError(
                f"{argument}: expected a loader whose workers are started and seeded in every "
                "epoch, so that a resumed run repeats what they draw, got one with "
                "persistent_workers=True"
            )
        sampler = getattr(data, "sampler", None)
        if isinstance(sampler, torch.utils.data.distributed.DistributedSampler):
            raise UserError(
                f"{argument}: expected a loader of whole batches, of which each rank takes its "
                "part, got one with a DistributedSampler"
            )
        try:
            self.size = len(data)
        except TypeError as error:
            raise UserError(
                f"{argument}: expected an iterable that knows its number of batches, by __len__, "
                f"got {type(data).__name__}"
            ) from error

    def __len__(self) -> int:
        return self.size

    def steps(self, batch_size: int) -> int:
        return self.size

    def batches(self, rows: Iterable[Tensor], training: Training) -> Iterator[Any]:
        """The batches that are left of an epoch, the same ones whenever it is taken up again.

        The iterable draws its order from torch's generator, which the epoch's number seeds.
        """
        number = -1
        for number, batch in enumerate(self._seeded(training.seed, "loader", training.epoch)):
            if number == self.size:
                return
            if number >= training.step:
                yield on_device(batch, self.device)
        if number + 1 < self.size:
            raise UserError(
                f"data: expected an iterable with as many batches as its length, "
                f"{self.size}, in every epoch, got {number + 1}"
            )

    def in_order(self, batch_size: int) -> Iterator[Any]:
        for batch in self._seeded(0, "loader, in order"):
            yield on_device(batch, self.device)

    def _seeded(self, seed: int, *purpose: str | int) -> Iterator[Any]:
        """What is iterated over, of generators that are seeded whenever it draws from them."""
        for generator in self._generators():
            generator.manual_seed(stream(seed, *purpose))
        has_workers = getattr(self.data, "num_workers", 0) > 0
        with initialisation(seed, *purpose), without_ctrl_c() if has_workers else nullcontext():
            iterator = iter(self.data)
        for number in itertools.count():
            with initialisation(seed, *purpose, number):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def _generators(self) -> list[torch.Generator]:
        """A loader's own, and its sampler's."""
        own = [getattr(self.data, "generator", None)]
        own.append(getattr(getattr(self.data, "sampler", None), "generator", None))
        return [each for each in own if isinstance(each, torch.Generator)]

    def fingerprint(self) -> str:
        """Of the number of batches alone: what an iterable has is not to be used up for this."""
        return digest(self.size, [])


@contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Within it processes are started that Ctrl-C, which a terminal sends to all, does not end.

    They inherit that it is blocked. The one that starts them gets it at the end.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # which unblocks it where spawned processes start the tracker
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def digest(size: int, tensors: Sequence[Tensor]) -> str:
    found = hashlib.sha256(str(size).encode())
    for tensor in tensors:
        found.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def as_data(
    data: Any, device: torch.device, collate: Callable[[list[Any]], Any], argument: str
) -> Rows | Loader:
    """A user's data: with rows to choose from where it has them, or else as it comes."""
    expected = (
        f"{argument}: expected a tensor, a tuple of tensors, a map-style Dataset or an iterable of "
        "batches"
    )
    if isinstance(data, Tensor | torch.utils.data.TensorDataset) or (
        isinstance(data, tuple) and all(isinstance(part, Tensor) for part in data)
    ):
        found: Rows | Loader = Rows(data, device, collate, argument)
    elif isinstance(data, torch.utils.data.DataLoader):
        found = Loader(data, device, argument)
    elif isinstance(data, Mapping):
        raise UserError(f"{expected}, got a dict; a Dataset may have dicts as samples")
    elif isinstance(data, list | tuple | torch.utils.data.IterableDataset):
        raise UserError(
            f"{expected}, got {type(data).__name__}, which may hold samples or batches: give "
            f"DataLoader({argument}, batch_size=...) of samples, or "
            f"DataLoader({argument}, batch_size=None) of batches"
        )
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        found = Rows(data, device, collate, argument)
    elif isinstance(data, Iterable):
        found = Loader(data, device, argument)
    else:
        raise UserError(f"{expected}, got {type(data).__name__}")
    if not len(found):
        raise UserError(f"{argument}: expected at least one sample, got none")
    return found
