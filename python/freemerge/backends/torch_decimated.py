"""The torch backend's decimated form: block-banded windows as matrix products, and the FFT of a coarse grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..cache import table_bytes
from ..dense import without_autocast
from ..planner.forms import compute_dtype
from ..planner.plan import Decimation, Plan
from ..planner.windows import Window, half_bin, window_transform
from .base import Executable
from .memory import matrices, sample

_CELLS = 64  # of one product, so that a launch costs less than its work
_GAIN_ROWS = 64  # of the coarse gain that are computed at a time, in float64


class Decimated(Executable):
    """Spread rows, spread columns, FFT, gains, inverse FFT, interpolate columns, interpolate rows."""

    def __init__(self, plan: Plan) -> None:
        (height, width), (rows, columns) = plan.matrix, _axes(plan)
        self._dtype, self._device, self._background = compute_dtype(plan.dtype), plan.device, plan.background
        self._rows = _Axis(height, rows, self._dtype, plan.device)
        self._columns = _Axis(width, columns, self._dtype, plan.device)
        self._gain = _coarse_gain(plan)
        self._turns = _turns(plan)
        zero = np.zeros((1, 1))
        self._centers, self._at_zero = plan.centers, float(plan.response.gain(zero, zero, plan.shape)[0, 0])
        self.nbytes = self._rows.nbytes + self._columns.nbytes + table_bytes([self._gain, self._turns])

    def run(self, batches: Sequence[torch.Tensor], scale: float) -> None:
        with without_autocast(self._device):
            for x in matrices(batches):
                if not self._centers:
                    self._filter(x, scale)
                    continue
                mean = dominant_means(x)
                self._filter(x.sub_(mean), scale)
                x.add_(mean, alpha=self._at_zero * scale)

    def _filter(self, x: torch.Tensor, scale: float) -> None:
        lines = torch.empty(self._rows.cells, x.shape[1], dtype=self._dtype, device=x.device)
        self._rows.spread_rows(x, lines)
        grid = self._columns.spread_columns(lines)
        spectrum = torch.fft.rfft(grid)[:, : self._gain.shape[1]]
        if self._turns is not None:
            spectrum = spectrum * self._turns
        spectrum = torch.fft.ifft(torch.fft.fft(spectrum, dim=0).mul_(self._gain), dim=0)
        if self._turns is not None:
            spectrum *= self._turns.conj()
        self._columns.interpolate_columns(torch.fft.irfft(spectrum, n=self._columns.cells), lines)
        self._rows.interpolate_rows(lines, x, self._background * scale, scale)


class _Axis:
    """The window of one axis, or none where the axis is whole."""

    def __init__(self, n: int, d: Decimation, dtype: torch.dtype, device: str) -> None:
        self.cells, self._margin = d.cells, d.taps
        window = Window(n, d, dtype, device)
        self._spread = window.spread(_CELLS) if d.taps else []
        self._interpolate = window.interpolate(_CELLS) if d.taps else []
        self._extended = torch.arange(-d.taps, d.cells + d.taps, device=device) % d.cells  # the grid is periodic
        self.nbytes = table_bytes([self._spread, self._interpolate, self._extended])

    def spread_rows(self, x: torch.Tensor, lines: torch.Tensor) -> None:
        for p in self._spread:
            target, source = lines[p.cell0 : p.cell1], x[p.sample0 : p.sample1].to(lines.dtype)
            torch.addmm(target, p.weights, source, beta=0.0 if p.first else 1.0, out=target)

    def spread_columns(self, lines: torch.Tensor) -> torch.Tensor:
        if not self._spread:
            return lines
        grid = torch.empty(lines.shape[0], self.cells, dtype=lines.dtype, device=lines.device)
        for p in self._spread:
            target, source = grid[:, p.cell0 : p.cell1], lines[:, p.sample0 : p.sample1]
            torch.addmm(target, source, p.weights.t(), beta=0.0 if p.first else 1.0, out=target)
        return grid

    def interpolate_columns(self, grid: torch.Tensor, lines: torch.Tensor) -> None:
        if not self._interpolate:
            lines.copy_(grid)
            return
        grid = grid.index_select(1, self._extended)
        for p in self._interpolate:
            source = grid[:, p.cell0 + self._margin : p.cell1 + self._margin]
            torch.mm(source, p.weights.t(), out=lines[:, p.sample0 : p.sample1])

    def interpolate_rows(self, lines: torch.Tensor, x: torch.Tensor, keep: float, scale: float) -> None:
        """x = keep * x + scale * lines; a keep of 0 ignores what x holds."""
        lines = lines.index_select(0, self._extended)
        for p in self._interpolate:
            target, source = x[p.sample0 : p.sample1], lines[p.cell0 + self._margin : p.cell1 + self._margin]
            if x.dtype == lines.dtype:
                torch.addmm(target, p.weights, source, beta=keep, alpha=scale, out=target)
            else:
                target.copy_(torch.addmm(target.to(lines.dtype), p.weights, source, beta=keep, alpha=scale))


def dominant_means(x: torch.Tensor) -> torch.Tensor:
    """(..., 1, 1): of each matrix its mean, by a sample, where it exceeds the sample's deviation, else 0."""
    deviation, mean = torch.std_mean(sample(x), dim=(-2, -1), correction=0, keepdim=True)
    return torch.where(mean.abs() > deviation, mean, 0.0)  # where a value is not finite, deviation is NaN


def decimated_bytes(plan: Plan) -> int:
    """Workspace: the coarse rows twice, and the coarse grid and its spectrum."""
    rows, columns = _axes(plan)
    lines, grid = (rows.cells + rows.taps) * plan.matrix[1], rows.cells * columns.cells
    return compute_dtype(plan.dtype).itemsize * (2 * lines + 4 * grid)


def _axes(plan: Plan) -> tuple[Decimation, Decimation]:
    assert plan.rows is not None
    assert plan.columns is not None
    return plan.rows, plan.columns


def _frequencies(n: int, d: Decimation, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the first ``count`` coarse bins, the distances from the centre of the band, and the signed bins they are."""
    offsets = np.arange(count, dtype=np.float64)
    offsets = np.where(offsets <= d.cells // 2, offsets, offsets - d.cells)
    bins = offsets + ((n + 1) // 2 if d.nyquist else 0)
    return offsets + half_bin(n, d), np.where(bins > n // 2, bins - n, bins)


def _turns(plan: Plan) -> torch.Tensor | None:
    """(cells, 1): what turns coarse rows so that transforms down them are at half bins; None where bins are whole."""
    (height, _), (rows, _) = plan.matrix, _axes(plan)
    shift = half_bin(height, rows)
    if not shift:
        return None
    turns = np.exp(-2j * np.pi * shift * np.arange(rows.cells) / rows.cells)[:, None]
    return torch.tensor(turns, dtype=compute_dtype(plan.dtype).to_complex(), device=plan.device)


def _coarse_gain(plan: Plan) -> torch.Tensor:
    """(cells, columns with a gain): mask - background over phihat^2 and the transforms' lengths."""
    (height, width), (rows, columns) = plan.matrix, _axes(plan)
    offset_y, bin_y = _frequencies(height, rows, rows.cells)
    offset_x, bin_x = _frequencies(width, columns, min(columns.band, columns.cells // 2 + 1))
    weight_y = rows.cells / (height * window_transform(rows, offset_y) ** 2)
    weight_x = columns.cells / (width * window_transform(columns, offset_x) ** 2)
    weight_y[np.abs(offset_y) >= rows.band] = 0.0
    result = torch.empty(rows.cells, weight_x.size, dtype=compute_dtype(plan.dtype), device="cpu")
    for start in range(0, rows.cells, _GAIN_ROWS):
        block = slice(start, start + _GAIN_ROWS)
        gain = plan.response.gain(bin_y[block, None], bin_x[None, :], plan.shape) - plan.background
        result[block] = torch.from_numpy(gain * weight_y[block, None] * weight_x[None, :])
    return result.to(plan.device)
