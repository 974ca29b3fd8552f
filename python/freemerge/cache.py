"""Bounded caches for what one call makes and later calls use again, from any thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from threading import Lock
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import numpy as np
import torch

from .responses import holds_array

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

_MASKS = 8  # responses that hold an array, of those that a cache keeps
TABLE_BYTES = 128 << 20  # of what the tables of one kind may take


class Entry(Generic[Value]):
    """A value in a cache; None after its eviction, which comes later if a holder of the entry sets ``used``."""

    __slots__ = ("used", "value", "weight")

    def __init__(self, value: Value, weight: int) -> None:
        self.value: Value | None = value
        self.weight = weight
        self.used = False


class Cache(Generic[Key, Value]):
    """Values that together weigh at most ``capacity``, and the latest in any case.

    ``weigh`` tells the weight of a key and its value, 1 if it is not given. Eviction follows the clock algorithm, which
    spares what was used since its last round; look-ups take no lock.
    """

    def __init__(self, capacity: int, weigh: Callable[[Key, Value], int] | None = None) -> None:
        self.capacity, self._weigh, self._lock = capacity, weigh or (lambda key, value: 1), Lock()
        self._entries: dict[Key, Entry[Value]] = {}
        self.weight = 0  #: of all values
        _ALL.add(self)

    def __len__(self) -> int:
        """The number of values."""
        return len(self._entries)

    def find(self, key: Key) -> Value | None:
        """The value of a key, if there is one."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry.used = True
        return entry.value

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of a key; ``make`` makes it if there is none, and what that raises is not kept."""
        return self.entry(key, make)[1]

    def entry(self, key: Key, make: Callable[[], Value]) -> tuple[Entry[Value], Value]:
        """The same with its entry."""
        entry = self._entries.get(key)
        if entry is not None and (value := entry.value) is not None:
            entry.used = True
            return entry, value
        value = make()  # outside the lock: two threads may make the same value once each
        return self.put(key, value), value

    def put(self, key: Key, value: Value) -> Entry[Value]:
        """Keep a value; it replaces a former one."""
        entry = Entry(value, self._weigh(key, value))
        with self._lock:
            self._drop(key)
            self._entries[key] = entry
            self.weight += entry.weight
            self._shrink(entry)
        return entry

    def clear(self) -> None:
        """Forget all values."""
        with self._lock:
            for key in list(self._entries):
                self._drop(key)

    def _drop(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.weight -= entry.weight
            entry.value = None

    def _shrink(self, latest: Entry[Value]) -> None:
        while self.weight > self.capacity and len(self._entries) > 1:
            key, entry = next(iter(self._entries.items()))
            if entry.used or entry is latest:
                entry.used = False
                self._entries[key] = self._entries.pop(key)
            else:
                self._drop(key)


class ByResponse(Cache[tuple[Any, ...], Value]):
    """Values that follow from a response, the first part of their keys: few where that holds a mask."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity, lambda key, _: capacity // _MASKS if holds_array(key[0]) else 1)


def table_bytes(value: object) -> int:
    """Memory of the distinct tensors and arrays that a value is made of."""
    return sum({id(table): table.nbytes for table in _tables(value)}.values())


def _tables(value: object) -> Iterator[torch.Tensor | np.ndarray]:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        yield value
        return
    parts: Iterable[object] = value if isinstance(value, (list, tuple)) else ()
    if is_dataclass(value):
        parts = [getattr(value, field.name) for field in fields(value)]
    for part in parts:
        yield from _tables(part)


_ALL: WeakSet[Cache[Any, Any]] = WeakSet()


def forget_all() -> None:
    """Clear every cache of the process; for tests."""
    for cache in list(_ALL):
        cache.clear()


def _after_fork() -> None:
    """A thread that the new process lacks may have held a lock, and left its change half done."""
    for cache in list(_ALL):
        cache._lock = Lock()
        cache.weight = sum(entry.weight for entry in cache._entries.values())


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
