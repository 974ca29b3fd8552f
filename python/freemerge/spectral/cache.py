"""A bounded cache for what one call makes and later calls use again, from any thread."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Cache(Generic[Key, Value]):
    """The most recently used values that together weigh at most ``capacity``, and the latest in any case.

    ``weigh`` tells a value's weight, 1 if it is not given. A pinned value is kept for ever.
    """

    def __init__(self, capacity: int, weigh: Callable[[Value], int] | None = None) -> None:
        self._capacity, self._weigh, self._lock = capacity, weigh or (lambda _: 1), Lock()
        self._recent: OrderedDict[Key, Value] = OrderedDict()
        self._pinned: dict[Key, Value] = {}
        self._weight = 0

    def __len__(self) -> int:
        """The number of values, those that are only pinned left out."""
        return len(self._recent)

    def get(self, key: Key, make: Callable[[], Value], *, pin: bool = False) -> Value:
        """The value of a key; ``make`` makes it if there is none, and what that raises is not kept."""
        with self._lock:
            value = self._recent.get(key)
            if value is not None and not pin:
                self._recent.move_to_end(key)
                return value
            value = self._pinned.get(key, value)
        if value is None:
            value = make()  # outside the lock: two threads may make the same value once each
        with self._lock:
            if pin:
                self._pinned[key] = value
            self._keep(key, value)
        return value

    def clear(self) -> None:
        """Forget everything but what is pinned."""
        with self._lock:
            self._recent.clear()
            self._weight = 0

    def _keep(self, key: Key, value: Value) -> None:
        replaced = self._recent.pop(key, None)
        if replaced is not None:
            self._weight -= self._weigh(replaced)
        self._recent[key] = value
        self._weight += self._weigh(value)
        while self._weight > self._capacity and len(self._recent) > 1:
            self._weight -= self._weigh(self._recent.popitem(last=False)[1])
