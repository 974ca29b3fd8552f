"""The torch backend's decimated and thin forms: block-banded windows as matrix products, and a coarse FFT."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .plan import Decimation, Plan
from .planner import compute_dtype
from .windows import Piece, Window, window_transform

# Cells per product. On a CPU few cells mean less work, and enough of it if the rows are long; elsewhere a launch costs
# more than the work.
_CPU_PRODUCT = 1 << 14  # cells x row length, at least 4 cells
_SCATTER_CELLS = 12
_CELLS = 64
_SEGMENT_ELEMENTS = 1 << 18  # coarse rows per pass over the columns, at least 32 of them
_COLUMN_CELLS = 32  # cells per product along a row
_STAGE_ELEMENTS = 1 << 19  # a converted block of rows stays in cache


_cpu_products = threading.Lock()


@contextmanager
def _one_thread(device: str) -> Iterator[None]:
    """Run CPU products on one thread: the library cuts long sums by thread, so that their rounding would depend on it.

    The thread count is the process's, hence the lock. The native CPU backend has no such limit.
    """
    if torch.device(device).type != "cpu":
        yield
        return
    with _cpu_products:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Product:
    """Cells [cell0, cell1) from samples [sample0, sample1), or back, by one matrix; None for an axis left as it is."""

    cell0: int
    cell1: int
    sample0: int
    sample1: int
    weights: torch.Tensor | None
    first: bool


@dataclass(frozen=True)
class _Axis:
    n: int
    d: Decimation
    gather: list[_Product]  #: weights (cells, samples)
    scatter: list[_Product]  #: weights (samples, cells); cells are counted from -taps

    @property
    def margin(self) -> int:
        return self.d.taps


@dataclass(frozen=True)
class _Grid:
    rows: _Axis
    columns: _Axis
    gain: torch.Tensor  #: (cells, cells // 2 + 1): mask - background over phihat^2 and the transforms' lengths
    row_index: torch.Tensor | None  #: periodic extension of the coarse grid by the margins
    column_index: torch.Tensor | None


def _axis(n: int, d: Decimation, gather: int, scatter: int, dtype: torch.dtype, device: str) -> _Axis:
    if d.cells == n and not d.taps:
        whole = _Product(0, n, 0, n, None, True)
        blocks = [_Product(i, min(i + 256, n), i, min(i + 256, n), None, True) for i in range(0, n, 256)]
        return _Axis(n, d, blocks, [whole] if n <= 256 else blocks)
    window = Window(n, d)
    shared: dict[int, torch.Tensor] = {}

    def tensor(piece: Piece, transpose: bool) -> _Product:
        if id(piece.weights) not in shared:
            weights = piece.weights.T if transpose else piece.weights
            shared[id(piece.weights)] = torch.tensor(np.ascontiguousarray(weights), dtype=dtype, device=device)
        weights_on_device = shared[id(piece.weights)]
        return _Product(piece.cell0, piece.cell1, piece.sample0, piece.sample1, weights_on_device, piece.first)

    gathers = [tensor(piece, False) for piece in window.gather(gather if d.taps else d.cells)]
    shared = {}
    return _Axis(n, d, gathers, [tensor(piece, True) for piece in window.scatter(scatter)])


def _frequencies(n: int, d: Decimation, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of the first ``count`` coarse bins from the centre of the band, and the signed bins they stand for."""
    offsets = np.arange(count, dtype=np.float64)
    offsets = np.where(offsets <= d.cells // 2, offsets, offsets - d.cells)
    bins = offsets + (n // 2 if d.nyquist else 0)
    return offsets, np.where(bins > n // 2, bins - n, bins)


@lru_cache(maxsize=32)
def _grid(plan: Plan) -> _Grid:
    assert plan.rows is not None
    assert plan.columns is not None
    (height, width), dtype = plan.matrix, compute_dtype(plan.dtype)
    gather, scatter = _CELLS, _CELLS
    if torch.device(plan.device).type == "cpu":
        gather = min(_CELLS, max(4, _CPU_PRODUCT // width))
        scatter = max(gather, _SCATTER_CELLS)
    rows = _axis(height, plan.rows, gather, scatter, dtype, plan.device)
    columns = _axis(width, plan.columns, _COLUMN_CELLS, _COLUMN_CELLS, dtype, plan.device)
    gain = torch.tensor(_coarse_gain(plan, plan.rows, plan.columns), dtype=dtype, device=plan.device)
    return _Grid(rows, columns, gain, _extension(plan.rows, plan.device), _extension(plan.columns, plan.device))


def _coarse_gain(plan: Plan, rows: Decimation, columns: Decimation) -> np.ndarray:
    height, width = plan.matrix
    offset_y, bin_y = _frequencies(height, rows, rows.cells)
    offset_x, bin_x = _frequencies(width, columns, columns.cells // 2 + 1)
    gain = plan.response.gain(bin_y[:, None], bin_x[None, :], plan.shape) - plan.background
    weight_y = rows.cells / (height * window_transform(rows, offset_y) ** 2)
    weight_x = columns.cells / (width * window_transform(columns, offset_x) ** 2)
    weight_y[np.abs(offset_y) >= rows.band] = 0.0
    weight_x[np.abs(offset_x) >= columns.band] = 0.0
    result: np.ndarray = gain * weight_y[:, None] * weight_x[None, :]
    return result


def _extension(d: Decimation, device: str) -> torch.Tensor | None:
    return (torch.arange(-d.taps, d.cells + d.taps, device=device) % d.cells) if d.taps else None


def _segments(products: list[_Product], limit: int) -> list[list[_Product]]:
    """Consecutive products whose cells span at most ``limit`` (or one product)."""
    segments: list[list[_Product]] = []
    for product in products:
        # The second half of a block that wraps around stays with the first.
        if segments and (not product.first or product.cell1 - segments[-1][0].cell0 <= limit):
            segments[-1].append(product)
        else:
            segments.append([product])
    return segments


def run_decimated(plan: Plan, matrices: Sequence[torch.Tensor], scale: float) -> None:
    with _one_thread(plan.device):
        _run(plan, matrices, scale)


def _run(plan: Plan, matrices: Sequence[torch.Tensor], scale: float) -> None:
    grid, (_, width), dtype = _grid(plan), plan.matrix, compute_dtype(plan.dtype)
    rows, columns = grid.rows, grid.columns
    cells = max(32, _SEGMENT_ELEMENTS // width)
    down, up = _segments(rows.gather, cells), _segments(rows.scatter, cells)
    lines = max(max(p.cell1 for p in s) - s[0].cell0 for s in down + up)
    buffer = torch.empty(lines, width, dtype=dtype, device=plan.device)
    coarse = torch.empty(rows.d.cells, columns.d.cells, dtype=dtype, device=plan.device)
    for x in matrices:
        for segment in down:
            _gather_rows(segment, x, buffer)
            cell0, cell1 = segment[0].cell0, segment[-1].cell1
            _gather_columns(columns, buffer[: cell1 - cell0], coarse[cell0:cell1])
        spectrum = torch.fft.rfft2(coarse)
        spectrum.mul_(grid.gain)
        correction = torch.fft.irfft2(spectrum, s=coarse.shape)
        del spectrum
        if grid.row_index is not None:
            correction = correction.index_select(0, grid.row_index)
        if grid.column_index is not None:
            correction = correction.index_select(1, grid.column_index)
        for segment in up:
            cell0, cell1 = segment[0].cell0, max(p.cell1 for p in segment)
            lines_of = correction[cell0 + rows.margin : cell1 + rows.margin]
            _scatter_columns(columns, lines_of, buffer[: cell1 - cell0])
            _scatter_rows(segment, buffer, x, plan.background * scale, scale)


def _gather_rows(segment: list[_Product], x: torch.Tensor, out: torch.Tensor) -> None:
    base = segment[0].cell0
    for run in _runs(segment):
        start, stop = run[0].sample0, max(p.sample1 for p in run)
        for columns, source in _staged(x[start:stop], out.dtype):
            for p in run:
                target = out[p.cell0 - base : p.cell1 - base, columns]
                block = source[p.sample0 - start : p.sample1 - start]
                _product(target, p.weights, block, 0.0 if p.first else 1.0, 1.0)


def _runs(segment: list[_Product]) -> list[list[_Product]]:
    """The products of a segment by the range of rows they read: one that wraps around reads both ends of the axis."""
    runs: list[list[_Product]] = []
    for p in sorted(segment, key=lambda p: (not p.first, p.sample0)):
        if runs and p.first and p.sample0 <= max(q.sample1 for q in runs[-1]):
            runs[-1].append(p)
        else:
            runs.append([p])
    return runs


def _staged(rows: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows in the compute dtype: as they are, or converted a range of columns at a time, which stays in cache."""
    if rows.dtype == dtype:
        yield slice(None), rows
        return
    for columns in _column_blocks(rows):
        yield columns, rows[:, columns].to(dtype)


def _column_blocks(rows: torch.Tensor) -> Iterator[slice]:
    step = max(64, _STAGE_ELEMENTS // rows.shape[0])
    for start in range(0, rows.shape[1], step):
        yield slice(start, start + step)


def _scatter_rows(segment: list[_Product], lines: torch.Tensor, x: torch.Tensor, keep: float, scale: float) -> None:
    base = segment[0].cell0
    for p in segment:
        source, target = lines[p.cell0 - base : p.cell1 - base], x[p.sample0 : p.sample1]
        if x.dtype == lines.dtype:
            _product(target, p.weights, source, keep, scale)
            continue
        for columns in _column_blocks(target):
            staged = target[:, columns].to(lines.dtype)
            _product(staged, p.weights, source[:, columns], keep, scale)
            target[:, columns] = staged


def _gather_columns(axis: _Axis, lines: torch.Tensor, out: torch.Tensor) -> None:
    for p in axis.gather:
        target, source = out[:, p.cell0 : p.cell1], lines[:, p.sample0 : p.sample1]
        if p.weights is None:
            target.copy_(source)
        else:
            torch.addmm(target, source, p.weights.t(), beta=0.0 if p.first else 1.0, out=target)


def _scatter_columns(axis: _Axis, cells: torch.Tensor, out: torch.Tensor) -> None:
    for p in axis.scatter:
        target, source = out[:, p.sample0 : p.sample1], cells[:, p.cell0 + axis.margin : p.cell1 + axis.margin]
        if p.weights is None:
            target.copy_(source)
        else:
            torch.mm(source, p.weights.t(), out=target)


def _product(target: torch.Tensor, weights: torch.Tensor | None, source: torch.Tensor, keep: float, by: float) -> None:
    """target = keep * target + by * weights @ source; a keep of 0 ignores what target holds."""
    if weights is None:
        if keep:
            target.mul_(keep).add_(source, alpha=by)
        else:
            torch.mul(source, by, out=target)
    else:
        torch.addmm(target, weights, source, beta=keep, alpha=by, out=target)
