"""Values as int8 multiples of one scale per row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..payload import Bytes, Reader, tensors_to_bytes
from ..select import rows_of
from .sparse import SparseTensor


@dataclass(frozen=True, eq=False)
class Int8(SparseTensor):
    """``scales`` holds max / 127 in bfloat16, rounded up, of each row that has entries, in order."""

    coding = "int8"
    data: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def rounded(cls, shape: tuple[int, ...], indices: torch.Tensor, values: torch.Tensor) -> Int8:
        row = _filled_row(shape, indices)
        rows = int(row[-1]) + 1 if row.numel() else 0
        largest = torch.zeros(rows, dtype=torch.float32, device="cpu").scatter_reduce_(0, row, values.abs(), "amax")
        scales = _round_up_to_bfloat16(largest / 127)
        divisors = torch.where(scales > 0, scales, 1).float()  # of subnormal values the scale may be zero
        data = (values / divisors[row]).round().clamp(-127, 127).to(torch.int8)
        return cls(shape, indices, data, scales)

    def values(self) -> torch.Tensor:
        return self.data.float() * self.scales.float()[_filled_row(self.shape, self.indices)]

    def values_to_bytes(self) -> Bytes:
        return tensors_to_bytes(self.scales, self.data)

    @classmethod
    def values_from_bytes(cls, shape: tuple[int, ...], indices: torch.Tensor, reader: Reader) -> Int8:
        rows = int(np.count_nonzero(_row_starts(shape, indices)))
        scales, data = reader.tensors((torch.bfloat16, rows), (torch.int8, indices.numel()))
        return cls(shape, indices, data, scales)


def _round_up_to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """The next bfloat16 not below non-negative x."""
    return ((x.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


def _row_starts(shape: tuple[int, ...], indices: torch.Tensor) -> npt.NDArray[np.bool_]:
    """Which entries are the first of their row."""
    row = indices.numpy() // max(1, rows_of(shape)[1])
    starts: npt.NDArray[np.bool_] = np.concatenate([np.ones(min(1, row.size), np.bool_), row[1:] != row[:-1]])
    return starts


def _filled_row(shape: tuple[int, ...], indices: torch.Tensor) -> torch.Tensor:
    """For each entry, the number of its row among the rows that hold entries (int64)."""
    return torch.from_numpy(np.cumsum(_row_starts(shape, indices)) - 1)
