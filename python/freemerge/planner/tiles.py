"""How the full form in three kernels divides a matrix among the blocks of a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from .lengths import prime_factors

_RESERVED = 1 << 10  # bytes that the device takes of a multiprocessor's shared memory for each block
_COMPLEX = 8
_SMALL_PRIMES = (2, 3, 5, 7, 11, 13)  # that have kernels, in any power
_LARGE_PRIME = 43  # of 11008, once
_UNCOMMON_PRIMES = (11, 13, _LARGE_PRIME)
_CHIRP_PRIMES = (2, 3, 5, 7)  # of a convolution
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

    One block of the column kernel takes ``columns`` such columns, a power of two. Threads are those of a block. A
    length with a prime factor that has no kernel is transformed by a convolution (Bluestein) of ``row_chirp`` or
    ``column_chirp`` points; they are 0 where passes of the length's own factors do it.
    """

    parts: int
    columns: int
    row_threads: int
    column_threads: int
    row_chirp: int = 0
    column_chirp: int = 0

    def __str__(self) -> str:
        rows = f"{self.parts} row{'s' * (self.parts > 1)} ({self.row_threads} threads{_by(self.row_chirp)})"
        return f"{rows}, {self.columns} columns ({self.column_threads} threads{_by(self.column_chirp)}) of a block"


def _by(chirp: int) -> str:
    return f", by a convolution of {chirp} points" if chirp else ""


@lru_cache(maxsize=4096)
def convolution(length: int) -> int:
    """Points of the convolution that transforms a length; 0 where each of its prime factors has a kernel.

    Of the lengths with small factors that are long enough, the one whose passes touch the fewest points.
    """
    if _has_kernels(length):
        return 0
    least = 2 * length - 1
    found = [1]
    for prime in _CHIRP_PRIMES:
        found = [n * prime**i for n in found for i in range(least.bit_length() + 1) if n * prime**i < 2 * least]
    return min((n for n in found if n >= least), key=lambda n: (n * _passes(n), n))


def _passes(points: int) -> int:
    """How often the kernels go over so many points: of the radices 16, 8, 4, 2, 7, 5 and 3, the largest that divide."""
    primes = prime_factors(points)
    return math.ceil(primes.count(2) / 4) + len(primes) - primes.count(2)


def row_bytes(points: int, parts: int) -> int:
    """Shared memory of a block of the row kernels: two rows are one complex line of so many points, padded."""
    last = points - 1
    return _COMPLEX * max(1, parts // 2) * (last + (last >> 4) + (last >> 8) + 1)


def column_bytes(points: int, columns: int) -> int:
    """Shared memory of a block of the column kernel."""
    return _COMPLEX * columns * (points + points // 16 + 1)


def blocks(shared: int, block_bytes: int) -> int:
    """How many blocks share a multiprocessor whose blocks may have ``block_bytes`` at most."""
    return (block_bytes + _RESERVED) // (shared + _RESERVED)


@lru_cache(maxsize=1024)
def tiles(height: int, width: int, block_bytes: int) -> Tiles | None:
    """The tiles of a matrix on a device whose blocks may have ``block_bytes`` of shared memory; None if none fit.

    Two blocks of the column kernel share a multiprocessor at least, three if that can be had, and rows of 64 bytes are
    better than those of 32: the order of an estimate, which no GPU has confirmed yet.
    """
    found = _candidates(height, width, block_bytes)
    best = min(found, key=lambda tile: _preference(height, width, block_bytes, *tile), default=None)
    if best is None:
        return None
    parts, columns = best
    alone = blocks(row_bytes(_points(width), parts), block_bytes) < 2
    most = _UNCOMMON_THREADS if is_uncommon(width) else _ALONE if alone else _ROW_THREADS
    return Tiles(
        parts,
        columns,
        _threads(max(1, parts // 2) * _points(width), most),
        _threads(_points(height // parts) * columns, _COLUMN_THREADS),
        convolution(width),
        convolution(height // parts),
    )


def _candidates(height: int, width: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    for parts in _PARTS:
        if height % parts == 0 and blocks(row_bytes(_points(width), parts), block_bytes) >= 1:
            for columns in _COLUMNS:
                if blocks(column_bytes(_points(height // parts), columns), block_bytes) >= 2:
                    yield parts, columns


def _preference(height: int, width: int, block_bytes: int, parts: int, columns: int) -> tuple[int, ...]:
    row_blocks = blocks(row_bytes(_points(width), parts), block_bytes)
    column_blocks = blocks(column_bytes(_points(height // parts), columns), block_bytes)
    return row_blocks < 2, columns < _COLUMNS[0], column_blocks < 3, parts, columns


def _threads(entries: int, most: int) -> int:
    """One for each butterfly of a pass of radix 16, within limits; whole warps."""
    return min(max(entries // 16 // 32 * 32, _LEAST_THREADS), most)


def is_uncommon(length: int) -> bool:
    """Whether the kernels that transform a length are those with more registers and fewer threads."""
    return not convolution(length) and any(prime in _UNCOMMON_PRIMES for prime in prime_factors(length))


def _points(length: int) -> int:
    """Of shared memory that the transform of a length takes."""
    return convolution(length) or length


def _has_kernels(length: int) -> bool:
    primes = prime_factors(length)
    return primes.count(_LARGE_PRIME) <= 1 and all(prime in (*_SMALL_PRIMES, _LARGE_PRIME) for prime in primes)
