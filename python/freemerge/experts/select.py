"""The entries of largest magnitude of a task vector, exactly.

Magnitudes are those of v = theta_i - theta_0 in float32. Equal ones are taken by index, lowest first, and zeros never,
so a selection of k holds min(k, number of non-zero entries) entries and is the same on every device and thread count.
A selection holds flat indices (ascending, int64) and the values of v there (float32).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .. import _core
from ..backends.memory import dtype_code
from ..backends.registry import pick
from ..errors import ArgumentError


@dataclass(frozen=True, eq=False)
class Selection:
    """Entries of a flattened tensor: ``indices`` (int64, ascending, on the CPU) and ``values`` (float32)."""

    indices: torch.Tensor
    values: torch.Tensor

    def without(self, other: Selection) -> Selection:
        """The entries that ``other`` does not hold."""
        keep = torch.isin(self.indices, other.indices, assume_unique=True, invert=True)
        return Selection(self.indices[keep], self.values[keep])


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """(number of rows, entries per row): a row is everything under one index of the first axis; a vector is one row."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape) // max(1, rows)


def select_largest(
    model: torch.Tensor, base: torch.Tensor, k: int, *, by_row: bool = False, backend: str = "auto"
) -> Selection:
    """The k entries of largest magnitude of ``model - base``, of the tensor or of each row (see :func:`rows_of`)."""
    if k < 0:
        raise ArgumentError(f"k must not be negative, got {k}")
    rows, width = rows_of(model.shape) if by_row else (1, model.numel())
    model, base = _checked(model, base)
    return Selection(*pick(backend, (model, base)).select_largest(model, base, rows, width, k))


class ModelSelector:
    """The k largest entries over all tensors of a model, seen twice, one tensor at a time.

    First :meth:`count` every tensor; then :meth:`collect` every tensor in the same order; then :meth:`finish`. Memory
    holds the selection and a histogram, never the model. Ties go to the tensor collected first.
    """

    def __init__(self) -> None:
        self._bins = torch.zeros(1 << _core.LEADING_BITS, dtype=torch.int64, device="cpu")
        self._candidates: list[Selection] = []

    def count(self, model: torch.Tensor, base: torch.Tensor) -> None:
        """Count the magnitudes of ``model - base``."""
        model, base = _checked(model, base)
        pick("auto", (model, base)).count_magnitudes(model, base, self._bins, 31 - _core.LEADING_BITS, 0)

    def collect(self, model: torch.Tensor, base: torch.Tensor, k: int) -> None:
        """Keep what may be among the k largest; the same k each time."""
        from_top = self._bins.flip(0).cumsum(0)
        bins_from_top = int((from_top < k).sum()) + 1
        lowest = max(0, self._bins.numel() - bins_from_top)
        model, base = _checked(model, base)
        self._candidates.append(Selection(*pick("auto", (model, base)).select_from_bin(model, base, lowest)))

    def finish(self, k: int) -> list[Selection]:
        """The selection of each tensor, in the order of collection; k may be smaller than at collection."""
        magnitudes = [selection.values.abs().numpy() for selection in self._candidates]
        everything = np.concatenate(magnitudes) if magnitudes else np.empty(0, np.float32)
        if k >= everything.size:
            return self._candidates
        if k == 0:
            return [Selection(s.indices[:0], s.values[:0]) for s in self._candidates]
        kth = np.partition(_orderable(everything), everything.size - k)[everything.size - k]
        room = k - int((_orderable(everything) > kth).sum())
        selected = []
        for selection, magnitude in zip(self._candidates, magnitudes, strict=True):
            ordered = _orderable(magnitude)
            ties = ordered == kth
            keep = torch.from_numpy((ordered > kth) | (ties & (np.cumsum(ties) <= room)))
            room = max(0, room - int(ties.sum()))
            selected.append(Selection(selection.indices[keep], selection.values[keep]))
        return selected


def _orderable(magnitudes: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """The bits of non-negative floats, which order as the floats do, with NaN above infinity."""
    return magnitudes.view(np.int32)


def _checked(model: torch.Tensor, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous tensors of one shape, device and a dtype that kernels take."""
    dtype_code(model, "model")
    dtype_code(base, "base")
    if model.shape != base.shape or model.device != base.device:
        raise ArgumentError(
            f"model has shape {tuple(model.shape)} on {model.device} but base {tuple(base.shape)} on {base.device}"
        )
    return model.contiguous(), base.contiguous()
