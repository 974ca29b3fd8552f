"""Bounded caches for what one call makes and later calls use again, from any thread."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from functools import lru_cache
from threading import Lock
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import numpy as np
import torch

from .responses import Response, holds_array

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

_MASKS = 8  # responses that hold an array, whose results are kept
TABLE_BYTES = 128 << 20  # of what the tables of one kind may take


class Cache(Generic[Key, Value]):
    """The most recently used values that together weigh at most ``capacity``, and the latest in any case.

    ``weigh`` tells a value's weight, 1 if it is not given.
    """

    def __init__(self, capacity: int, weigh: Callable[[Value], int] | None = None) -> None:
        self._capacity, self._weigh, self._lock = capacity, weigh or (lambda _: 1), Lock()
        self._recent: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self.weight = 0  #: of all values
        _ALL.add(self)

    def __len__(self) -> int:
        """The number of values."""
        return len(self._recent)

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of a key; ``make`` makes it if there is none, and what that raises is not kept."""
        with self._lock:
            entry = self._recent.get(key)
            if entry is not None:
                self._recent.move_to_end(key)
                return entry[0]
        value = make()  # outside the lock: two threads may make the same value once each
        weight = self._weigh(value)
        with self._lock:
            self.weight += weight - self._recent.pop(key, (value, 0))[1]
            self._recent[key] = value, weight
            while self.weight > self._capacity and len(self._recent) > 1:
                self.weight -= self._recent.popitem(last=False)[1][1]
        return value

    def clear(self) -> None:
        """Forget all values."""
        with self._lock:
            self._recent.clear()
            self.weight = 0


class ByResponse(Generic[Value]):
    """Keeps the latest results of a function whose first argument is a response: few where that holds a mask."""

    def __init__(self, make: Callable[..., Value], capacity: int) -> None:
        self.capacity = capacity
        self._known, self._masks = lru_cache(capacity)(make), lru_cache(_MASKS)(make)
        _ALL.add(self)

    def __call__(self, response: Response, *rest: Hashable) -> Value:
        return (self._masks if holds_array(response) else self._known)(response, *rest)

    def __len__(self) -> int:
        """The number of results kept."""
        return sum(cache.cache_info().currsize for cache in (self._known, self._masks))

    def clear(self) -> None:
        """Forget all results."""
        self._known.cache_clear()
        self._masks.cache_clear()


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


_ALL: WeakSet[Cache[Any, Any] | ByResponse[Any]] = WeakSet()


def forget_all() -> None:
    """Clear every cache of the process; for tests."""
    for cache in list(_ALL):
        cache.clear()
