"""Tensors on their way to a GPU: copied ahead of their turn to pinned memory, which it reads at the bus's speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from torch import Tensor

from ..checkpoint import Checkpoint
from ..checkpoint.mapped import fetched

LEAST_BYTES = 1 << 20  # of a copy: a block of pinned memory is not made for less
_THREADS = 4  # one copies at a fraction of what the bus takes


def read(source: Checkpoint, name: str) -> Tensor:
    """A tensor of a checkpoint, its pages in memory."""
    return fetched(source.read(name), source, name)


class PinnedCopies:
    """Copies of tensors that are read soon, by name and source."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._copies: dict[str, dict[Checkpoint, Future[Tensor]]] = {}

    @contextmanager
    def threads(self) -> Iterator[None]:
        """In the block, :meth:`put` may be called."""
        former, copies = self._pool, self._copies
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="freemerge-pin") as pool:
            self._pool, self._copies = pool, {}
            try:
                yield
            finally:
                self._pool, self._copies = former, copies
                pool.shutdown(cancel_futures=True)

    def put(self, source: Checkpoint, names: Sequence[str]) -> None:
        """Begin to copy tensors, small ones excepted."""
        assert self._pool is not None
        for name in names:
            copies = self._copies.setdefault(name, {})
            if source.specs[name].nbytes >= LEAST_BYTES and source not in copies:
                copies[source] = self._pool.submit(_pinned_copy, source, name)

    def drop(self, names: Sequence[str]) -> None:
        """Let go of the copies of tensors."""
        for name in names:
            self._copies.pop(name, None)

    def read(self, source: Checkpoint, name: str) -> Tensor:
        """:func:`read`, of the copy if there is one; what failed when that was made fails here."""
        copy = self._copies.get(name, {}).get(source)
        return read(source, name) if copy is None else copy.result()


def _pinned_copy(source: Checkpoint, name: str) -> Tensor:
    tensor = read(source, name)
    try:
        return tensor.pin_memory()
    except RuntimeError:  # the system gives no more of it: the copy to the GPU takes longer
        return tensor
