"""Positions of an expert's entries, coded without loss: the gaps between them, in Rice code or as byte groups.

The shorter of the two is taken. The codec is ``csrc/cpu/rice.cpp``; docs/expert-format.md describes the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import _core
from ..dense import address
from .payload import Bytes

BYTE_GAPS, RICE = 0, 1

_INT32_LIMIT = 1 << 31


@dataclass(frozen=True, eq=False)
class CodedPositions:
    """The gaps between ascending positions: ``coding`` BYTE_GAPS or RICE, its parameter (remainder bits), the bytes."""

    coding: int
    parameter: int
    data: Bytes


def index_dtype(numel: int) -> torch.dtype:
    """The narrower of int32 and int64 that can index ``numel`` entries."""
    return torch.int32 if numel <= _INT32_LIMIT else torch.int64


def encode_positions(positions: torch.Tensor) -> CodedPositions:
    """Code strictly ascending positions (int32 or int64, contiguous, on the CPU)."""
    wide = positions.dtype == torch.int64
    return CodedPositions(*_core.encode_positions(address(positions), wide, positions.numel()))


def decode_positions(coded: CodedPositions, count: int, numel: int) -> torch.Tensor:
    """The ``count`` positions below ``numel``; ValueError for bytes that no encoder writes."""
    if max(coded.coding, coded.parameter) >= _INT32_LIMIT:
        raise ValueError("its positions have an unknown coding")
    out = torch.empty(count, dtype=index_dtype(numel), device="cpu")
    _core.decode_positions(
        coded.coding, coded.parameter, coded.data.ctypes.data, coded.data.size, count, numel, address(out),
        out.dtype == torch.int64,
    )  # fmt: skip
    return out
