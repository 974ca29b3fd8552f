"""The entries of largest magnitude of a task vector, exactly.

Magnitudes are those of v = theta_i - theta_0 in float32. Equal ones are taken by index, lowest first, and zeros never,
so a selection of k holds min(k, number of non-zero entries) entries and is the same on every device and thread count.
A selection holds flat indices (ascending, int64) and the values of v there (float32).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .. import _core
from ..backends import cuda_runtime
from ..backends.accumulate import task_vector_sum
from ..backends.native import dtype_code, runs_native
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
    size = 1
    for n in shape:
        size *= n
    rows = shape[0] if len(shape) > 1 else 1
    return rows, size // max(1, rows)


def select_largest(
    model: torch.Tensor, base: torch.Tensor, k: int, *, by_row: bool = False, backend: str = "auto"
) -> Selection:
    """The k entries of largest magnitude of ``model - base``, of the tensor or of each row (see :func:`rows_of`)."""
    if k < 0:
        raise ArgumentError(f"k must not be negative, got {k}")
    rows, width = rows_of(model.shape) if by_row else (1, model.numel())
    if k > 0 and width > 0 and cuda_runtime.RUNTIME.runs(backend, (model, base)):
        return _on_device(model.contiguous(), base.contiguous(), rows, width, min(k, width))
    if runs_native(backend, (model, base)):
        return _native(model, base, _core.select_largest, rows, width, k)
    v = _difference(model, base).reshape(rows, width)
    magnitudes = v.abs().view(torch.int32)  # ordered as the floats are, NaN on top
    kept = min(k, width)
    if kept == 0:
        return _at(v, torch.zeros_like(v, dtype=torch.bool))
    kth = magnitudes.topk(kept, dim=1).values[:, -1:]
    above = magnitudes > kth
    ties = (magnitudes == kth) & (magnitudes != 0)
    room = kept - above.sum(dim=1, keepdim=True)
    return _at(v, above | (ties & (ties.cumsum(dim=1) <= room)))


class ModelSelector:
    """The k largest entries over all tensors of a model, seen twice, one tensor at a time.

    First :meth:`count` every tensor; then :meth:`collect` every tensor in the same order; then :meth:`finish`. Memory
    holds the selection and a histogram, never the model. Ties go to the tensor collected first.
    """

    def __init__(self) -> None:
        self._bins = torch.zeros(_core.MAGNITUDE_BINS, dtype=torch.int64)
        self._candidates: list[Selection] = []

    def count(self, model: torch.Tensor, base: torch.Tensor) -> None:
        """Count the magnitudes of ``model - base``."""
        model, base = model.cpu().contiguous(), base.cpu().contiguous()
        _core.count_magnitudes(*_pointers(model, base), model.numel(), self._bins.data_ptr(), torch.get_num_threads())

    def collect(self, model: torch.Tensor, base: torch.Tensor, k: int) -> None:
        """Keep what may be among the k largest; the same k each time."""
        from_top = self._bins.flip(0).cumsum(0)
        bins_from_top = int((from_top < k).sum()) + 1
        lowest = max(0, _core.MAGNITUDE_BINS - bins_from_top)
        self._candidates.append(_native(model.cpu(), base.cpu(), _core.select_from_bin, model.numel(), lowest))

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


_Kernel = Callable[..., tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]


def _native(model: torch.Tensor, base: torch.Tensor, kernel: _Kernel, *options: int) -> Selection:
    model, base = model.contiguous(), base.contiguous()
    indices, values = kernel(*_pointers(model, base), *options, torch.get_num_threads())
    return Selection(torch.from_numpy(indices), torch.from_numpy(values))


def _on_device(model: torch.Tensor, base: torch.Tensor, rows: int, width: int, k: int) -> Selection:
    module, device, stream = cuda_runtime.RUNTIME.module, model.device, cuda_runtime.RUNTIME.stream(model.device)
    indices = torch.empty(rows, k, dtype=torch.int64, device=device)
    values = torch.empty(rows, k, dtype=torch.float32, device=device)
    counts = torch.empty(rows, 1, dtype=torch.int64, device=device)
    scratch = torch.empty(module.select_scratch(rows, width), dtype=torch.uint8, device=device)
    module.select(
        *_pointers(model, base), rows, width, k, indices.data_ptr(), values.data_ptr(), counts.data_ptr(),
        scratch.data_ptr(), stream.device, stream.handle,
    )  # fmt: skip
    kept = torch.arange(k, device=device) < counts
    return Selection(indices[kept].cpu(), values[kept].cpu())


def _pointers(model: torch.Tensor, base: torch.Tensor) -> tuple[int, int, int, int]:
    return model.data_ptr(), dtype_code(model, "model"), base.data_ptr(), dtype_code(base, "base")


def _difference(model: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    return task_vector_sum(base, [model], [1.0])[0].float()


def _at(v: torch.Tensor, mask: torch.Tensor) -> Selection:
    indices = mask.reshape(-1).nonzero().squeeze(1)
    return Selection(indices.cpu(), v.reshape(-1)[indices].cpu())
