"""Memory for results, of which a merge makes many and keeps none: it is used again."""

from __future__ import annotations

import math
import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple

import torch

from .. import _core
from ..dense import address

_LEAST_PIECE = 1 << 20  # bytes; the C library finds smaller ones in its own heap
_ALIGNMENT = 64  # bytes, as torch aligns memory


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.empty`` for a result that is about to be written as a whole: on a CPU in huge pages where there are any,
    because touching 4 KB at a time for the first time takes longer than computing most of what we write. Within
    :func:`reusing` large results get memory that earlier ones have let go, which takes no touching at all."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type == "cpu" and nbytes >= _LEAST_PIECE and _pieces.users:
        return torch.frombuffer(_pieces.take(nbytes), dtype=dtype, count=math.prod(shape)).view(tuple(shape))
    result = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        _core.prefer_huge_pages(address(result), result.nbytes)
    return result


@contextmanager
def reusing() -> Iterator[None]:
    """In the block, memory of large results is used again. For work whose results do not outlive it: one may lie in a
    block of memory that was made for a larger one."""
    with _pieces.lock:
        _pieces.users += 1
    try:
        yield
    finally:
        with _pieces.lock:
            _pieces.users -= 1
            if not _pieces.users:
                _pieces.forget()


class _Piece(NamedTuple):
    block: torch.Tensor
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class _Pieces:
    """Blocks of memory, and the pieces of them that nobody uses. A block that is free as a whole is only kept while all
    of them are no more than was in use at some time."""

    def __init__(self) -> None:
        self.users = 0
        self.renew()

    def renew(self) -> None:
        """Begin again, as a forked process must: a thread that it lacks may have held the lock."""
        self.lock = Lock()
        self.forget()

    def forget(self) -> None:
        self._free: list[_Piece] = []  # the one that waits longest comes first; no two of them touch
        self._used = self._held = self._most = 0
        self._taken: dict[object, weakref.ref[memoryview]] = {}
        self._returned: deque[_Piece] = deque()  # since the last look

    def take(self, nbytes: int) -> memoryview:
        """So many bytes, uninitialised; they come back when the view and what is made of it are gone."""
        size = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        with self.lock:
            self._collect()
            self._used += size
            self._most = max(self._most, self._used)
            fitting = [piece for piece in self._free if size <= piece.nbytes]
            if fitting:
                found = min(fitting, key=lambda piece: piece.nbytes)
                self._free = [piece for piece in self._free if piece is not found]
            else:
                self._make_room(size)
                found = _Piece(torch.empty(size, dtype=torch.uint8, device="cpu"), 0, size)
                _core.prefer_huge_pages(address(found.block), size)
                self._held += size
            piece, rest = found._replace(end=found.begin + size), found._replace(begin=found.begin + size)
            if rest.nbytes:
                self._free.append(rest)
            taken, key = self._taken, object()
            view = piece.block[piece.begin : piece.begin + nbytes].numpy().data
            taken[key] = weakref.ref(view, lambda _: self._give(key, piece, taken))
            return view

    def _give(self, key: object, piece: _Piece, taken: dict[object, weakref.ref[memoryview]]) -> None:
        """A tensor has died, at any allocation of Python's, and so perhaps in the middle of :meth:`take`."""
        del taken[key]
        if taken is self._taken:  # not within an earlier reusing()
            self._returned.append(piece)

    def _collect(self) -> None:
        """Put what was returned among what is free."""
        while self._returned:
            piece = self._returned.popleft()
            self._used -= piece.nbytes
            beside = [x for x in self._free if x.block is piece.block and piece.begin <= x.end and x.begin <= piece.end]
            self._free = [x for x in self._free if all(x is not other for other in beside)]
            whole = [piece, *beside]
            self._free.append(_Piece(piece.block, min(x.begin for x in whole), max(x.end for x in whole)))
            self._make_room(0)

    def _make_room(self, nbytes: int) -> None:
        """Let go of blocks that are free as a whole, so that so many bytes more are not more than was ever in use."""
        for piece in [piece for piece in self._free if piece.nbytes == piece.block.nbytes]:
            if self._held + nbytes <= self._most:
                return
            self._free = [other for other in self._free if other is not piece]
            self._held -= piece.nbytes


_pieces = _Pieces()

if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_pieces.renew)
