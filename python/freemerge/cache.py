"""Bounded caches for what one call makes and later calls use again, from any thread."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from functools import lru_cache, wraps
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
import torch

from .responses import Response, holds_array

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

_MASKS = 8  # responses that hold an array, whose results are kept
TABLE_BYTES = 128 << 20  # of what the tables of one kind may take


class Cache(Generic[Key, Value]):
    """The most recently used values that together weigh at most ``capacity``, and the latest in any case.

    ``weigh`` tells a value's weight, 1 if it is not given. A pinned value is kept for ever.
    """

    def __init__(self, capacity: int, weigh: Callable[[Value], int] | None = None) -> None:
        self._capacity, self._weigh, self._lock = capacity, weigh or (lambda _: 1), Lock()
        self._recent: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._pinned: dict[Key, Value] = {}
        self._latest: tuple[Key, Value] | None = None
        self.weight = 0  #: of all values, those that are only pinned left out

    def __len__(self) -> int:
        """The number of values, those that are only pinned left out."""
        return len(self._recent)

    def get(self, key: Key, make: Callable[[], Value], *, pin: bool = False) -> Value:
        """The value of a key; ``make`` makes it if there is none, and what that raises is not kept."""
        latest = self._latest  # read once: other threads may replace it
        if latest is not None and latest[0] is key and not pin:
            return latest[1]
        with self._lock:
            entry = self._recent.get(key)
            if entry is not None and not pin:
                self._recent.move_to_end(key)
                self._latest = key, entry[0]
                return entry[0]
            value = self._pinned.get(key) if entry is None else entry[0]
        if value is None:
            value = make()  # outside the lock: two threads may make the same value once each
        weight = self._weigh(value)
        with self._lock:
            if pin:
                self._pinned[key] = value
            self.weight += weight - self._recent.pop(key, (value, 0))[1]
            self._recent[key] = value, weight
            self._latest = key, value
            while self.weight > self._capacity and len(self._recent) > 1:
                self.weight -= self._recent.popitem(last=False)[1][1]
        return value


class ByResponse(Generic[Value]):
    """Keeps the latest results of a function whose first argument is a response: few where that holds a mask."""

    def __init__(self, make: Callable[..., Value], capacity: int) -> None:
        self.capacity = capacity
        self._known, self._masks = lru_cache(capacity)(make), lru_cache(_MASKS)(make)

    def __call__(self, response: Response, *rest: Hashable) -> Value:
        return (self._masks if holds_array(response) else self._known)(response, *rest)

    def __len__(self) -> int:
        """The number of results kept."""
        return sum(cache.cache_info().currsize for cache in (self._known, self._masks))

    def cache_clear(self) -> None:
        """Forget all results."""
        self._known.cache_clear()
        self._masks.cache_clear()


def cached_tables(make: Callable[[Key], Value]) -> Callable[[Key], Value]:
    """Keeps the results of a function of one argument, up to 128 MiB of the tensors and arrays in them."""
    cache: Cache[Key, Value] = Cache(TABLE_BYTES, table_bytes)

    @wraps(make)
    def get(key: Key) -> Value:
        return cache.get(key, lambda: make(key))

    return get


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
