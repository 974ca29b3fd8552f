"""Where the time of a merge goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One kind of work: seconds that it took, and bytes that it moved. Stages run beside each other.

    "read": reading base and models, summing and measuring them; "merge": what the method does with that, its filter
    above all, in bytes of the arithmetic's dtype; "round": adding the base and rounding; "write", "hash" (inputs and
    output) and "flush": in the background; "wait": until these were done.
    """

    name: str
    seconds: float
    nbytes: int

    def __str__(self) -> str:
        rate = f"{self.nbytes / self.seconds / 1e9:8.2f} GB/s" if self.nbytes and self.seconds else ""
        return f"{self.name:6} {self.seconds:8.2f} s {self.nbytes / 1e9:9.3f} GB {rate}".rstrip()


def together(stages: Sequence[Stage]) -> Stage:
    """The same stage of several workers: seconds and bytes of all of them."""
    return Stage(stages[0].name, sum(stage.seconds for stage in stages), sum(stage.nbytes for stage in stages))


class Stopwatch:
    """Adds up the time of the stages that run one after the other on the thread that merges."""

    def __init__(self) -> None:
        self._seconds = {"read": 0.0, "merge": 0.0, "round": 0.0}
        self._nbytes = dict.fromkeys(self._seconds, 0)
        self._reading: float | None = None

    def reads(self) -> None:
        """Reading begins, if it is not under way; :meth:`has_read` ends it."""
        if self._reading is None:
            self._reading = time.perf_counter()

    def has_read(self, nbytes: int) -> None:
        """So many bytes were read since."""
        self._nbytes["read"] += nbytes
        if self._reading is not None:
            self._seconds["read"] += time.perf_counter() - self._reading
            self._reading = None

    @contextmanager
    def stage(self, name: str, nbytes: int) -> Iterator[None]:
        """Work of a stage, without what it reads."""
        begin, read = time.perf_counter(), self._seconds["read"]
        yield
        self._seconds[name] += time.perf_counter() - begin - (self._seconds["read"] - read)
        self._nbytes[name] += nbytes

    def stages(self) -> list[Stage]:
        """What was added up."""
        return [Stage(name, seconds, self._nbytes[name]) for name, seconds in self._seconds.items()]
