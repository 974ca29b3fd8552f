"""The torch backend's pruned and full forms: real FFTs of row blocks, complex FFTs of panels of columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

from ..responses import signed_frequencies
from .plan import Plan
from .planner import compute_dtype
from .spectrum import PackedSpectrum, PrunedSpectrum, Spectrum, WholeSpectrum

_BLOCK_ELEMENTS = 1 << 17  # rows per FFT call: this many elements
_PANEL_ELEMENTS = 1 << 17  # columns per FFT call: this many elements, or
_PANEL_COLUMNS = 16  # at least so many


@dataclass(frozen=True)
class Panel:
    """Kept columns [start, stop), counted among the kept ones.

    Their gains are ``factor`` (no ``gains``), ``factor`` except where a bool ``gains`` is true (0 there), or
    ``factor`` times ``gains``, which has shape (stop - start, H).
    """

    start: int
    stop: int
    factor: float
    gains: torch.Tensor | None = None


@dataclass(frozen=True)
class Columns:
    """Which columns of the half spectrum are kept, and what happens to them."""

    runs: list[tuple[int, int]]  #: kept columns, as ranges
    panels: list[Panel]


def _ranges(indices: np.ndarray) -> list[tuple[int, int]]:
    if not indices.size:
        return []
    cuts = np.flatnonzero(np.diff(indices) > 1)
    return list(zip(indices[np.r_[0, cuts + 1]].tolist(), (indices[np.r_[cuts, -1]] + 1).tolist(), strict=True))


@lru_cache(maxsize=8)
def _columns(plan: Plan) -> Columns:
    """pruned: the columns whose gain is not the background, with gain - background. full: all columns."""
    gains = plan.response.column_gains(plan.shape)
    if plan.form == "full":
        kept, offset = np.arange(gains.size), 0.0
    else:
        kept, offset = np.flatnonzero(gains != plan.background), plan.background
    panel = max(_PANEL_COLUMNS, _PANEL_ELEMENTS // plan.matrix[0])
    panels: list[Panel] = []
    position = 0
    for start, stop in _ranges(kept):
        for first, last, varies in _constant_runs(gains[start:stop]):
            if not varies:
                panels.append(Panel(position + first, position + last, float(gains[start + first] - offset)))
                continue
            for column in range(first, last, panel):
                end = min(column + panel, last)
                factor, table = _panel_gains(plan, (start + column, start + end), offset)
                panels.append(Panel(position + column, position + end, factor, table))
        position += stop - start
    return Columns(_ranges(kept), panels)


def _constant_runs(gains: np.ndarray) -> Iterator[tuple[int, int, bool]]:
    """Maximal runs of columns that vary, or that share one constant gain: (start, stop, varies)."""
    labels = np.where(np.isnan(gains), np.inf, gains)
    cuts = np.flatnonzero(labels[1:] != labels[:-1]) + 1
    edges = [0, *cuts.tolist(), gains.size]
    for start, stop in pairwise(edges):
        yield start, stop, bool(np.isnan(gains[start]))


def _panel_gains(plan: Plan, columns: tuple[int, int], offset: float) -> tuple[float, torch.Tensor]:
    """(factor, gains) of a panel, (columns, H): one byte a bin where the gains are 0 or one other number."""
    height, _ = plan.matrix
    kx = np.arange(*columns, dtype=np.float64)[None, :]
    gains = plan.response.gain(signed_frequencies(height)[:, None], kx, plan.shape) - offset
    gains = np.ascontiguousarray(np.broadcast_to(gains, (height, kx.size)).T)
    levels = np.unique(gains)
    if levels.size == 2 and 0.0 in levels:
        return float(levels[levels != 0.0][0]), torch.tensor(gains == 0.0, device=plan.device)
    return 1.0, torch.tensor(gains, dtype=compute_dtype(plan.dtype), device=plan.device)


def run_columns(plan: Plan, matrices: Sequence[torch.Tensor], scale: float) -> None:
    (height, width), dtype = plan.matrix, compute_dtype(plan.dtype)
    columns, spectrum = _columns(plan), _spectrum(plan)
    block = _block(plan)
    rows = torch.empty(block, width, dtype=dtype, device=plan.device)
    keep = 0.0 if plan.form == "full" else plan.background * scale
    for x in matrices:
        spectrum.open(x)
        for start in range(0, height, block):
            part = x[start : start + block]
            source = part if part.dtype == dtype else rows[: part.shape[0]].copy_(part)
            torch.fft.rfft(source, out=spectrum.half(start, part.shape[0]))
            spectrum.put(start, part.shape[0])
        _filter_columns(spectrum, columns.panels, plan)
        for start in range(0, height, block):
            part = x[start : start + block]
            result = rows[: part.shape[0]]
            torch.fft.irfft(spectrum.get(start, part.shape[0]), n=width, out=result)
            if scale != 1.0:
                result.mul_(scale)
            if keep:
                result.add_(part, alpha=keep)
            part.copy_(result)


def _block(plan: Plan) -> int:
    height, width = plan.matrix
    return max(1, min(height, _BLOCK_ELEMENTS // width))


def _complex(plan: Plan) -> torch.dtype:
    return torch.complex128 if plan.dtype == torch.float64 else torch.complex64


def _spectrum(plan: Plan) -> Spectrum:
    if plan.packed:
        return PackedSpectrum(plan.matrix, _block(plan), _complex(plan), plan.device)
    if plan.form == "full":
        return WholeSpectrum(plan.matrix, _complex(plan), plan.device)
    return PrunedSpectrum(plan.matrix, _columns(plan).runs, _block(plan), _complex(plan), plan.device)


def _filter_columns(spectrum: Spectrum, panels: list[Panel], plan: Plan) -> None:
    """Apply the gains of every kept column: in place where they are constant, between two column FFTs elsewhere."""
    height = plan.matrix[0]
    widest = max((p.stop - p.start for p in panels if p.gains is not None), default=0)
    flat = torch.empty(3, height * widest, dtype=_complex(plan), device=plan.device)
    for p in panels:
        if p.gains is None:
            if p.factor != 1.0:
                spectrum.scale(p.start, p.stop, p.factor)
            continue
        size = height * (p.stop - p.start)
        panel = flat[0, :size].view(height, -1)
        lines, transform = flat[1, :size].view(-1, height), flat[2, :size].view(-1, height)
        spectrum.read(p.start, p.stop, panel)
        lines.copy_(panel.t())  # transforms of contiguous lines pay for both transpositions
        torch.fft.fft(lines, out=transform)
        if p.gains.dtype == torch.bool:
            transform.masked_fill_(p.gains, 0.0)
        else:
            transform.mul_(p.gains)
        torch.fft.ifft(transform, out=lines)
        if p.factor != 1.0:
            lines.mul_(p.factor)
        panel.copy_(lines.t())
        spectrum.write(p.start, p.stop, panel)
