"""The coding of positions in numpy, as docs/expert-format.md describes it."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from freemerge.experts.positions import BYTE_GAPS, RICE, CodedPositions

_MAX_PARAMETER = 40


def encode_positions(positions: npt.NDArray[np.int64]) -> CodedPositions:
    """What :func:`freemerge.experts.positions.encode_positions` writes."""
    gaps = np.diff(positions, prepend=-1) - 1
    if gaps.size and gaps.min() < 0:
        raise ValueError("positions must be strictly ascending and not negative")
    pack = functools.partial(np.packbits, bitorder="little")
    rice_bits = [int((gaps >> b).sum()) + gaps.size * (b + 1) for b in range(_MAX_PARAMETER + 1)]
    parameter = int(np.argmin(rice_bits))
    quotients = gaps >> parameter
    remainders = gaps[:, None] >> np.arange(parameter) & 1
    unary = np.zeros(int(quotients.sum()) + gaps.size, dtype=np.uint8)
    unary[np.cumsum(quotients + 1) - 1] = 1
    rice = np.concatenate([pack(remainders.reshape(-1).astype(np.uint8)), pack(unary)])
    groups = [gaps >> (7 * group) for group in range(9)]
    byte_gaps = np.stack([group & 127 for group in groups], axis=1)
    more = np.stack([group >= 128 for group in groups], axis=1)
    used = np.concatenate([np.ones((gaps.size, 1), bool), more[:, :-1]], axis=1)
    byte_coded = (byte_gaps | more << 7).astype(np.uint8)[used]
    if byte_coded.size < rice.size:
        return CodedPositions(BYTE_GAPS, 0, byte_coded)
    return CodedPositions(RICE, parameter, rice)


def decode_positions(coded: CodedPositions, count: int) -> npt.NDArray[np.int64]:
    """The inverse, for well-formed bytes."""
    if coded.coding == BYTE_GAPS:
        last = coded.data < 128
        which: npt.NDArray[np.int64] = np.cumsum(last) - last  # the gap each byte belongs to
        starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
        shifts = 7 * (np.arange(coded.data.size) - starts[which])
        gaps = np.zeros(count, dtype=np.int64)
        np.add.at(gaps, which, (coded.data & 127).astype(np.int64) << shifts)
        return np.cumsum(gaps + 1) - 1
    remainder_bits = count * coded.parameter
    split = (remainder_bits + 7) // 8
    bits = np.unpackbits(coded.data[:split], bitorder="little", count=remainder_bits).reshape(count, coded.parameter)
    remainders = bits @ (1 << np.arange(coded.parameter, dtype=np.int64))
    ones = np.flatnonzero(np.unpackbits(coded.data[split:], bitorder="little"))
    quotient_sums = ones - np.arange(count)
    positions: npt.NDArray[np.int64] = (quotient_sums << coded.parameter) + np.cumsum(remainders + 1) - 1
    return positions
