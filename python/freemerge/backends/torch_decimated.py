"""The torch backend's decimated form: block-banded windows as matrix products, and a coarse FFT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..planner.forms import compute_dtype
from ..planner.plan import Decimation, Plan
from ..planner.windows import Piece, Window, window_transform
from .memory import matrices
from .torch_products import faithful_products

# Cells per product. On a CPU few cells mean less work, and enough of it if the rows are long; elsewhere a launch costs
# more than the work.
_CPU_PRODUCT = 1 << 14  # cells x row length, at least 4 cells
_SCATTER_CELLS = 12
_CELLS = 64
_SEGMENT_ELEMENTS = 1 << 18  # coarse rows per pass over the columns, at least 32 of them
_COLUMN_CELLS = 32  # cells per product along a row
_STAGE_ELEMENTS = 1 << 19  # a converted block of rows stays in cache


@dataclass(frozen=True)
class _Axis:
    n: int
    d: Decimation
    gather: list[Piece]
    scatter: list[Piece]

    @property
    def margin(self) -> int:
        return self.d.taps


@dataclass(frozen=True)
class _Grid:
    rows: _Axis
    columns: _Axis
    gain: torch.Tensor  #: (cells, columns with a gain): mask - background over phihat^2 and the transforms' lengths
    row_index: torch.Tensor | None  #: periodic extension of the coarse grid by the margins
    column_index: torch.Tensor | None


def _axis(n: int, d: Decimation, gather: int, scatter: int, dtype: torch.dtype, device: str) -> _Axis:
    if d.cells == n and not d.taps:
        whole = Piece(0, n, 0, n, None)
        blocks = [Piece(i, min(i + 256, n), i, min(i + 256, n), None) for i in range(0, n, 256)]
        return _Axis(n, d, blocks, [whole] if n <= 256 else blocks)
    window = Window(n, d, dtype, device)
    return _Axis(n, d, window.gather(gather if d.taps else d.cells), window.scatter(scatter))


def _frequencies(n: int, d: Decimation, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of the first ``count`` coarse bins from the centre of the band, and the signed bins they stand for."""
    offsets = np.arange(count, dtype=np.float64)
    offsets = np.where(offsets <= d.cells // 2, offsets, offsets - d.cells)
    bins = offsets + (n // 2 if d.nyquist else 0)
    return offsets, np.where(bins > n // 2, bins - n, bins)


def decimated_tables(plan: Plan) -> _Grid:
    assert plan.rows is not None
    assert plan.columns is not None
    (height, width), dtype = plan.matrix, compute_dtype(plan.dtype)
    gather, scatter = _CELLS, _CELLS
    if torch.device(plan.device).type == "cpu":
        gather = min(_CELLS, max(4, _CPU_PRODUCT // width))
        scatter = max(gather, _SCATTER_CELLS)
    rows = _axis(height, plan.rows, gather, scatter, dtype, plan.device)
    columns = _axis(width, plan.columns, _COLUMN_CELLS, _COLUMN_CELLS, dtype, plan.device)
    gain = _coarse_gain(plan, plan.rows, plan.columns)
    return _Grid(rows, columns, gain, _extension(plan.rows, plan.device), _extension(plan.columns, plan.device))


def _coarse_gain(plan: Plan, rows: Decimation, columns: Decimation) -> torch.Tensor:
    height, width = plan.matrix
    offset_y, bin_y = _frequencies(height, rows, rows.cells)
    offset_x, bin_x = _frequencies(width, columns, min(columns.band, columns.cells // 2 + 1))
    weight_y = rows.cells / (height * window_transform(rows, offset_y) ** 2)
    weight_x = columns.cells / (width * window_transform(columns, offset_x) ** 2)
    weight_y[np.abs(offset_y) >= rows.band] = 0.0
    result = torch.empty(rows.cells, weight_x.size, dtype=compute_dtype(plan.dtype), device=plan.device)
    for start in range(0, rows.cells, _CELLS):  # the arithmetic is float64: a block at a time
        block = slice(start, start + _CELLS)
        gain = plan.response.gain(bin_y[block, None], bin_x[None, :], plan.shape) - plan.background
        result[block] = torch.from_numpy(gain * weight_y[block, None] * weight_x[None, :])
    return result


def _extension(d: Decimation, device: str) -> torch.Tensor | None:
    return (torch.arange(-d.taps, d.cells + d.taps, device=device) % d.cells) if d.taps else None


def _segments(products: list[Piece], limit: int) -> list[list[Piece]]:
    """Consecutive products whose cells span at most ``limit`` (or one product)."""
    segments: list[list[Piece]] = []
    for product in products:
        # The second half of a block that wraps around stays with the first.
        if segments and (not product.first or product.cell1 - segments[-1][0].cell0 <= limit):
            segments[-1].append(product)
        else:
            segments.append([product])
    return segments


@faithful_products
def run_decimated(plan: Plan, grid: _Grid, batches: Sequence[torch.Tensor], scale: float) -> None:
    (_, width), dtype = plan.matrix, compute_dtype(plan.dtype)
    rows, columns = grid.rows, grid.columns
    cells = max(32, _SEGMENT_ELEMENTS // width)
    down, up = _segments(rows.gather, cells), _segments(rows.scatter, cells)
    lines = max(max(p.cell1 for p in s) - s[0].cell0 for s in down + up)
    buffer = torch.empty(lines, width, dtype=dtype, device=plan.device)
    coarse = torch.empty(lines, columns.d.cells, dtype=dtype, device=plan.device)
    spectrum = torch.empty(rows.d.cells, grid.gain.shape[1], dtype=dtype.to_complex(), device=plan.device)
    for x in matrices(batches):
        for segment in down:
            _gather_rows(segment, x, buffer)
            cell0, cell1 = segment[0].cell0, segment[-1].cell1
            _gather_columns(columns, buffer[: cell1 - cell0], coarse[: cell1 - cell0])
            spectrum[cell0:cell1] = torch.fft.rfft(coarse[: cell1 - cell0])[:, : spectrum.shape[1]]
        for start in range(0, spectrum.shape[1], _CELLS):
            panel = slice(start, start + _CELLS)
            transform = torch.fft.fft(spectrum[:, panel], dim=0)
            transform.mul_(grid.gain[:, panel])
            spectrum[:, panel] = torch.fft.ifft(transform, dim=0)
        for segment in up:
            cell0, cell1 = segment[0].cell0, max(p.cell1 for p in segment)
            lines_of = _rows_of(spectrum, cell0 + rows.margin, cell1 + rows.margin, grid.row_index)
            correction = torch.fft.irfft(lines_of, n=columns.d.cells)
            if grid.column_index is not None:
                correction = correction.index_select(1, grid.column_index)
            _scatter_columns(columns, correction, buffer[: cell1 - cell0])
            _scatter_rows(segment, buffer, x, plan.background * scale, scale)


def _rows_of(grid: torch.Tensor, start: int, stop: int, index: torch.Tensor | None) -> torch.Tensor:
    """Rows [start, stop) of the periodically extended grid."""
    return grid[start:stop] if index is None else grid.index_select(0, index[start:stop])


def _gather_rows(segment: list[Piece], x: torch.Tensor, out: torch.Tensor) -> None:
    base = segment[0].cell0
    for run in _runs(segment):
        start, stop = run[0].sample0, max(p.sample1 for p in run)
        for columns, source in _staged(x[start:stop], out.dtype):
            for p in run:
                target = out[p.cell0 - base : p.cell1 - base, columns]
                block = source[p.sample0 - start : p.sample1 - start]
                _product(target, p.weights, block, 0.0 if p.first else 1.0, 1.0)


def _runs(segment: list[Piece]) -> list[list[Piece]]:
    """The products of a segment by the range of rows they read: one that wraps around reads both ends of the axis."""
    runs: list[list[Piece]] = []
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


def _scatter_rows(segment: list[Piece], lines: torch.Tensor, x: torch.Tensor, keep: float, scale: float) -> None:
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
