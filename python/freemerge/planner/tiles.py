"""How the full form in three kernels divides a matrix among the blocks of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from .lengths import prime_factors

_RESERVED = 1 << 10  # bytes that the device takes of a multiprocessor's shared memory for each block
_COMPLEX = 8
_SMALL_PRIMES = (2, 3, 5, 7, 11, 13)  # that have kernels, in any power
_LARGE_PRIME = 43  # of 11008, once
_UNCOMMON_PRIMES = (11, 13, _LARGE_PRIME)
_PARTS = (1, 2, 4, 8)
_COLUMNS = (8, 4)  # of a block: 64 or 32 bytes of a row
_LEAST_THREADS = 64  # of a block
_ROW_THREADS = 256  # at most
_ALONE = 384  # of a block of rows that has a multiprocessor to itself
_COLUMN_THREADS = 160
_UNCOMMON_THREADS = 192  # of a block of rows with one of the primes 11, 13 and 43, which take many registers


@dataclass(frozen=True)
class Tiles:
    """One block of the row kernels takes ``parts`` rows, H / parts apart, so that columns are that much shorter.

    One block of the column kernel takes ``columns`` such columns, a power of two. Threads are those of a block.
    """

    parts: int
    columns: int
    row_threads: int
    column_threads: int

    def __str__(self) -> str:
        rows = f"{self.parts} row{'s' * (self.parts > 1)} ({self.row_threads} threads)"
        return f"{rows}, {self.columns} columns ({self.column_threads} threads) of a block"


def row_bytes(width: int, parts: int) -> int:
    """Shared memory of a block of the row kernels: two rows are one complex line, padded."""
    last = width - 1
    return _COMPLEX * max(1, parts // 2) * (last + (last >> 4) + (last >> 8) + 1)


def column_bytes(length: int, columns: int) -> int:
    """Shared memory of a block of the column kernel."""
    return _COMPLEX * columns * (length + length // 16 + 1)


def blocks(shared: int, block_bytes: int) -> int:
    """How many blocks share a multiprocessor whose blocks may have ``block_bytes`` at most."""
    return (block_bytes + _RESERVED) // (shared + _RESERVED)


@lru_cache(maxsize=1024)
def tiles(height: int, width: int, block_bytes: int) -> Tiles | None:
    """The tiles of a matrix on a device whose blocks may have ``block_bytes`` of shared memory; None if none fit.

    Two blocks of the column kernel share a multiprocessor at least, three if that can be had, and rows of 64 bytes are
    better than those of 32: the order of an estimate, which no GPU has confirmed yet.
    """
    if not (_has_kernels(height) and _has_kernels(width)):
        return None
    found = {_preference(height, width, parts, columns, block_bytes): (parts, columns)
             for parts, columns in _candidates(height, width, block_bytes)}  # fmt: skip
    if not found:
        return None
    parts, columns = found[min(found)]
    uncommon = any(prime in _UNCOMMON_PRIMES for prime in prime_factors(width))
    alone = blocks(row_bytes(width, parts), block_bytes) < 2
    most = _UNCOMMON_THREADS if uncommon else _ALONE if alone else _ROW_THREADS
    return Tiles(
        parts,
        columns,
        _threads(max(1, parts // 2) * width, most),
        _threads(height // parts * columns, _COLUMN_THREADS),
    )


def _candidates(height: int, width: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    for parts in _PARTS:
        if height % parts == 0 and blocks(row_bytes(width, parts), block_bytes) >= 1:
            for columns in _COLUMNS:
                if blocks(column_bytes(height // parts, columns), block_bytes) >= 2:
                    yield parts, columns


def _preference(height: int, width: int, parts: int, columns: int, block_bytes: int) -> tuple[object, ...]:
    row_blocks = blocks(row_bytes(width, parts), block_bytes)
    column_blocks = blocks(column_bytes(height // parts, columns), block_bytes)
    return row_blocks < 2, columns < _COLUMNS[0], column_blocks < 3, parts, columns


def _threads(entries: int, most: int) -> int:
    """One for each butterfly of a pass of radix 16, within limits; whole warps."""
    return min(max(entries // 16 // 32 * 32, _LEAST_THREADS), most)


def _has_kernels(length: int) -> bool:
    primes = prime_factors(length)
    return primes.count(_LARGE_PRIME) <= 1 and all(prime in (*_SMALL_PRIMES, _LARGE_PRIME) for prime in primes)
