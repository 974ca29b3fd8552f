"""How an expert's positions and values are written down; docs/expert-format.md describes the bytes.

Positions are coded without loss: the gaps between them in Rice code or as byte groups, whichever is shorter. The
native codec is in csrc/cpu/rice.cpp; the functions in numpy here are its readable twin and read and write the same
bytes. Values are rounded to one of five codings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from .. import _core
from ..checkpoint.compare import all_finite
from ..errors import ArgumentError

ValueCoding = Literal["fp32", "bf16", "fp16", "int8", "sign"]
VALUE_CODINGS: tuple[ValueCoding, ...] = get_args(ValueCoding)
BYTE_GAPS, RICE = 0, 1

_FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_INT32_LIMIT = 1 << 31
_MAX_PARAMETER = 40

Bytes = npt.NDArray[np.uint8]


def value_coding(name: object) -> ValueCoding:
    """``name`` as a value coding; ArgumentError if it is none."""
    for coding in VALUE_CODINGS:
        if name == coding:
            return coding
    raise ArgumentError(f"values must be one of {', '.join(VALUE_CODINGS)}, got {name!r}")


def index_dtype(numel: int) -> torch.dtype:
    """The narrower of int32 and int64 that can index ``numel`` entries."""
    return torch.int32 if numel <= _INT32_LIMIT else torch.int64


# Positions ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CodedPositions:
    """The gaps between ascending positions: ``coding`` BYTE_GAPS or RICE, its parameter (remainder bits), the bytes."""

    coding: int
    parameter: int
    data: Bytes


def encode_positions(positions: torch.Tensor) -> CodedPositions:
    """Code strictly ascending positions (int32 or int64, contiguous, on the CPU)."""
    wide = positions.dtype == torch.int64
    return CodedPositions(*_core.encode_positions(positions.data_ptr(), wide, positions.numel()))


def decode_positions(coded: CodedPositions, count: int, numel: int) -> torch.Tensor:
    """The ``count`` positions below ``numel``; ValueError for bytes that no encoder writes."""
    out = torch.empty(count, dtype=index_dtype(numel))
    _core.decode_positions(
        coded.coding, coded.parameter, coded.data.ctypes.data, coded.data.size, count, numel, out.data_ptr(),
        out.dtype == torch.int64,
    )  # fmt: skip
    return out


def encode_positions_numpy(positions: npt.NDArray[np.int64]) -> CodedPositions:
    """:func:`encode_positions` in numpy: the same bytes."""
    gaps = np.diff(positions, prepend=-1) - 1
    if gaps.size and gaps.min() < 0:
        raise ValueError("positions must be strictly ascending and not negative")
    rice_bits = [int((gaps >> b).sum()) + gaps.size * (b + 1) for b in range(_MAX_PARAMETER + 1)]
    parameter = int(np.argmin(rice_bits))
    quotients = gaps >> parameter
    remainders = gaps[:, None] >> np.arange(parameter) & 1
    unary = np.zeros(int(quotients.sum()) + gaps.size, dtype=np.uint8)
    unary[np.cumsum(quotients + 1) - 1] = 1
    rice = np.concatenate([_pack(remainders.reshape(-1).astype(np.uint8)), _pack(unary)])
    groups = [gaps >> (7 * group) for group in range(9)]
    byte_gaps = np.stack([group & 127 for group in groups], axis=1)
    more = np.stack([group >= 128 for group in groups], axis=1)
    used = np.concatenate([np.ones((gaps.size, 1), bool), more[:, :-1]], axis=1)
    byte_coded = (byte_gaps | more << 7).astype(np.uint8)[used]
    if byte_coded.size < rice.size:
        return CodedPositions(BYTE_GAPS, 0, byte_coded)
    return CodedPositions(RICE, parameter, rice)


def decode_positions_numpy(coded: CodedPositions, count: int) -> npt.NDArray[np.int64]:
    """:func:`decode_positions` in numpy, for well-formed bytes."""
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


def _pack(bits: Bytes) -> Bytes:
    return np.packbits(bits, bitorder="little")


# Values ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CodedValues:
    """Rounded values of one tensor.

    ``data``: float32, bfloat16 or float16 values; int8 multiples of a scale; or for "sign" bool, True where negative.
    ``scales``: for "int8" one bfloat16 for each row that holds entries, for "sign" one float32, else none.
    """

    coding: ValueCoding
    data: torch.Tensor
    scales: torch.Tensor

    def decode(self, indices: torch.Tensor, width: int) -> torch.Tensor:
        """The values in float32; ``indices`` are the entries' flat positions and ``width`` the tensor's row length."""
        if self.coding == "int8":
            return self.data.float() * self.scales.float()[_filled_row(indices, width)]
        if self.coding == "sign":
            scale = self.scales.squeeze(0) if self.data.numel() else torch.zeros(())
            return torch.where(self.data, -scale, scale)
        return self.data.float()


def encode_values(values: torch.Tensor, coding: ValueCoding, indices: torch.Tensor, width: int) -> CodedValues:
    """Round float32 values: to a float format; to int8 with a scale (max / 127) per row; or to the sign with one scale.

    The scale of "sign" is the mean magnitude, which is nearest in the least-squares sense. Raises ArgumentError where
    the format cannot hold a value.
    """
    none = torch.empty(0)
    if coding == "sign":
        scale = values.abs().double().sum() / max(1, values.numel())
        return CodedValues(coding, values < 0, scale.float().reshape(1) if values.numel() else none)
    if coding == "int8":
        row = _filled_row(indices, width)
        rows = int(row[-1]) + 1 if row.numel() else 0
        largest = torch.zeros(rows).scatter_reduce_(0, row, values.abs(), "amax")
        scales = _round_up_to_bfloat16(largest / 127)
        divisors = torch.where(scales > 0, scales, 1).float()  # of subnormal values the scale may be zero
        return CodedValues(coding, (values / divisors[row]).round().clamp(-127, 127).to(torch.int8), scales)
    data = values.to(_FLOATS[coding])
    if not all_finite(data):
        raise ArgumentError(f"values: {coding} cannot hold {float(values.abs().max()):g}")
    return CodedValues(coding, data, none)


def values_to_bytes(coded: CodedValues) -> Bytes:
    """Scales, then values, little-endian; signs as bits, least significant first."""
    values = _pack(coded.data.numpy().view(np.uint8)) if coded.coding == "sign" else _raw(coded.data)
    return np.concatenate([_raw(coded.scales), values])


def values_from_bytes(coding: ValueCoding, data: Bytes, indices: torch.Tensor, width: int) -> CodedValues:
    """The inverse of :func:`values_to_bytes`; ValueError if the bytes are not exactly what these entries need."""
    count = indices.numel()
    scale_dtype = torch.bfloat16 if coding == "int8" else torch.float32
    scale_count = 0
    if count and coding in ("int8", "sign"):
        scale_count = int(np.count_nonzero(_row_starts(indices, width))) if coding == "int8" else 1
    dtype = _FLOATS.get(coding, torch.int8)
    scale_bytes = scale_count * scale_dtype.itemsize
    value_bytes = (count + 7) // 8 if coding == "sign" else count * dtype.itemsize
    if data.size != scale_bytes + value_bytes:
        raise ValueError(f"{data.size} bytes of values instead of {scale_bytes + value_bytes}")
    scales = _from_raw(data[:scale_bytes], scale_dtype)
    if coding == "sign":
        bits = np.unpackbits(data[scale_bytes:], bitorder="little")
        if bits[count:].any():
            raise ValueError("stray bits after the signs")
        values = torch.from_numpy(bits[:count].view(np.bool_))
    else:
        values = _from_raw(data[scale_bytes:], dtype)
    for numbers in (scales, values):
        if numbers.is_floating_point() and not all_finite(numbers):
            raise ValueError("non-finite values")
    return CodedValues(coding, values, scales)


def _round_up_to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """The next bfloat16 not below non-negative x."""
    return ((x.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


def _raw(tensor: torch.Tensor) -> Bytes:
    raw: Bytes = tensor.contiguous().view(torch.uint8).numpy()
    return raw


def _from_raw(data: Bytes, dtype: torch.dtype) -> torch.Tensor:
    """A copy, as the bytes may be a memory map."""
    return torch.from_numpy(data.copy()).view(dtype) if data.size else torch.empty(0, dtype=dtype)


def _row_starts(indices: torch.Tensor, width: int) -> npt.NDArray[np.bool_]:
    """Which entries are the first of their row."""
    row = indices.numpy() // max(1, width)
    starts: npt.NDArray[np.bool_] = np.concatenate([np.ones(min(1, row.size), np.bool_), row[1:] != row[:-1]])
    return starts


def _filled_row(indices: torch.Tensor, width: int) -> torch.Tensor:
    """For each entry, the number of its row among the rows that hold entries (int64)."""
    return torch.from_numpy(np.cumsum(_row_starts(indices, width)) - 1)
