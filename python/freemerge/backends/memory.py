"""Tensors as the backends see them: dtype codes, addresses, strides, and memory for results."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import NamedTuple

import torch

from .. import _core
from ..dense import address
from ..errors import ArgumentError

_SAMPLE = (16, 64)  # rows and columns that estimate a matrix's mean
_LEAST_PIECE = 1 << 20  # bytes; the C library finds smaller ones in its own heap
_ALIGNMENT = 64  # bytes, as torch aligns memory

DTYPE_CODES: dict[torch.dtype, int] = {getattr(torch, name): code for name, code in _core.DTYPES.items()}


def dtype_code(tensor: torch.Tensor, name: str) -> int:
    """The native code of a tensor's dtype; :class:`ArgumentError` naming the argument when there is none."""
    try:
        return DTYPE_CODES[tensor.dtype]
    except KeyError:
        raise ArgumentError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}") from None


def compute_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """The arithmetic of an operation on vectors: float64 if any of them is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


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
        self.lock = Lock()
        self.users = 0
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


def without_autocast(device: torch.device | str) -> AbstractContextManager[object]:
    """In the block products are computed in the dtype of their factors, whatever autocast says."""
    kind = torch.device(device).type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def matrices(batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Each matrix of the batches."""
    for x in batches:
        if x.ndim == 2:
            yield x
        else:
            yield from x.unbind(0)


def sample(x: torch.Tensor) -> torch.Tensor:
    """The entries of each matrix that estimate its mean."""
    rows, columns = (max(1, n // count) for n, count in zip(x.shape[-2:], _SAMPLE, strict=True))
    return x[..., ::rows, ::columns]


def pointer(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a tensor begins, and the code of its dtype, as the compiled modules take them."""
    return address(tensor), DTYPE_CODES[tensor.dtype]


def addresses(batches: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
    """The address of each matrix of the batches, and its row stride in elements."""
    pointers: list[int] = []
    strides: list[int] = []
    for x in batches:
        (height, width), first = x.shape[-2:], address(x)
        stride = x.stride(-2) if height > 1 else width
        if x.ndim == 2:
            pointers.append(first)
            strides.append(stride)
        else:
            count, step = x.shape[0], x.stride(0) * x.element_size()
            pointers.extend(first + i * step for i in range(count))
            strides.extend([stride] * count)
    return pointers, strides


def multiply_(batches: Sequence[torch.Tensor], factor: float) -> None:
    """Multiply in place; a factor of 0 clears even what is not finite."""
    if factor != 1.0:
        for x in batches:
            x.mul_(factor) if factor else x.zero_()
