"""Registries: what the command line and ``train`` choose from, each an object with a name.

What is registered needs no other table: flags, help, reports and sweeps ask the object itself.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

Registered = TypeVar("Registered")
Given = TypeVar("Given")


class Registry(Mapping[str, Registered]):
    """Things of one kind by their names, in the order in which they were registered."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, Registered] = {}

    def register(self, thing: Given) -> Given:
        """Add a thing by its ``name``, and return it, so that this decorates classes too.

        Raises:
            ValueError: another thing has its name.
        """
        name = cast(Any, thing).name
        if name in self._things:
            raise ValueError(f"{self.kind}: expected a name that is free, got {name!r}")
        self._things[name] = cast(Registered, thing)
        return thing

    def unregister(self, name: str) -> None:
        del self._things[name]

    def __getitem__(self, name: str) -> Registered:
        return self._things[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)
