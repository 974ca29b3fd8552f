"""The torch backend's pruned and full forms: real FFTs of row blocks, complex FFTs of panels of columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from ..planner.forms import compute_dtype, largest_prime
from ..planner.plan import Plan
from ..responses import signed_frequencies
from .memory import matrices
from .spectrum import PackedSpectrum, PrunedSpectrum, Spectrum, WholeSpectrum

_BLOCK_ELEMENTS = 1 << 17  # rows per FFT call: this many elements
_PANEL_ELEMENTS = 1 << 17  # columns per FFT call: this many elements, or
_PANEL_COLUMNS = 16  # at least so many
SMALL_ELEMENTS = 1 << 16  # a matrix that is filtered at once
_NUMPY_FFT = int(np.__version__.partition(".")[0]) >= 2  # transforms fp32 as such, and back into given memory
_NUMPY_PRIME = 13  # it is slow at lengths with larger factors


@dataclass(frozen=True)
class Panel:
    """Kept columns [start, stop), counted among the kept ones, and their gains over :attr:`Columns.factor`.

    ``gains`` has shape (stop - start, H); where it is bool, a gain is 0 if true and ``constant`` if not. Without it
    every gain is ``constant``.
    """

    start: int
    stop: int
    constant: float
    gains: torch.Tensor | None = None


@dataclass(frozen=True)
class Columns:
    """Which columns of the half spectrum are kept, and what happens to them."""

    runs: list[tuple[int, int]]  #: kept columns, as ranges
    panels: list[Panel]
    factor: float  #: of all gains, left to the last pass over the rows


def _ranges(indices: np.ndarray) -> list[tuple[int, int]]:
    if not indices.size:
        return []
    cuts = np.flatnonzero(np.diff(indices) > 1)
    return list(zip(indices[np.r_[0, cuts + 1]].tolist(), (indices[np.r_[cuts, -1]] + 1).tolist(), strict=True))


def kept_columns(plan: Plan) -> Columns:
    """pruned: the columns whose gain is not the background, with gain - background. full: all columns."""
    gains = plan.column_gains
    if plan.form == "full":
        kept, offset = np.arange(gains.size), 0.0
    else:
        kept, offset = np.flatnonzero(gains != plan.background), plan.background
    panel = max(_PANEL_COLUMNS, _PANEL_ELEMENTS // plan.matrix[0])
    panels: list[Panel] = []
    position = 0
    for start, stop in _ranges(kept):
        for first, last, varies in _constant_runs(gains[start:stop]):
            for column in range(first, last, panel):
                end = min(column + panel, last)
                constant, table = float(gains[start + column] - offset), None
                if varies:
                    constant, table = _panel_gains(plan, (start + column, start + end), offset)
                panels.append(Panel(position + column, position + end, constant, table))
        position += stop - start
    factors = {p.constant for p in panels if p.gains is not None}
    factor = factors.pop() if len(factors) == 1 else 1.0
    return Columns(_ranges(kept), [replace(p, constant=p.constant / factor) for p in panels], factor)


def _constant_runs(gains: np.ndarray) -> Iterator[tuple[int, int, bool]]:
    """Maximal runs of columns that vary, or that share one constant gain: (start, stop, varies)."""
    labels = np.where(np.isnan(gains), np.inf, gains)
    cuts = np.flatnonzero(labels[1:] != labels[:-1]) + 1
    edges = [0, *cuts.tolist(), gains.size]
    for start, stop in pairwise(edges):
        yield start, stop, bool(np.isnan(gains[start]))


def _panel_gains(plan: Plan, columns: tuple[int, int], offset: float) -> tuple[float, torch.Tensor]:
    """(constant, gains) of a :class:`Panel`: one byte a bin where the gains are 0 or one other number."""
    height, _ = plan.matrix
    kx = np.arange(*columns, dtype=np.float64)[None, :]
    gains = plan.response.gain(signed_frequencies(height)[:, None], kx, plan.shape) - offset
    gains = np.ascontiguousarray(np.broadcast_to(gains, (height, kx.size)).T)
    levels = np.unique(gains)
    if levels.size == 2 and 0.0 in levels:
        return float(levels[levels != 0.0][0]), torch.tensor(gains == 0.0, device=plan.device)
    return 1.0, torch.tensor(gains, dtype=compute_dtype(plan.dtype), device=plan.device)


def vector_gains(plan: Plan) -> np.ndarray | torch.Tensor:
    """Of the half spectrum: for NumPy, whose FFT costs less to set up than torch's, or else for torch."""
    dtype, gains = compute_dtype(plan.dtype), plan.response.half_mask(plan.shape)
    if _NUMPY_FFT and plan.device == "cpu" and plan.dtype == dtype and largest_prime(plan.matrix[1]) <= _NUMPY_PRIME:
        return gains.astype(np.complex128 if dtype == torch.float64 else np.complex64)
    return torch.tensor(gains, dtype=dtype.to_complex(), device=plan.device)


def run_vectors(plan: Plan, gains: np.ndarray | torch.Tensor, batches: Sequence[torch.Tensor], scale: float) -> None:
    """Rows that are matrices of their own."""
    width = plan.matrix[1]
    step = max(1, _BLOCK_ELEMENTS // width)
    for batch in batches:
        for x in (batch,) if batch.ndim == 2 or batch.shape[0] <= step else torch.split(batch, step):
            if isinstance(gains, np.ndarray):
                values = x.numpy()
                spectrum = np.fft.rfft(values)
                spectrum *= gains
                np.fft.irfft(spectrum, width, out=values)
                if scale != 1.0:
                    x.mul_(scale)
            else:
                half = torch.fft.rfft(x.to(compute_dtype(plan.dtype))).mul_(gains)
                _combine(x, 0.0, torch.fft.irfft(half, n=width), scale)


def small_gains(plan: Plan) -> torch.Tensor:
    """Gains of the half spectrum, complex, as a product of complex tensors is faster."""
    gains = plan.response.half_mask(plan.shape)
    return torch.tensor(gains, dtype=compute_dtype(plan.dtype).to_complex(), device=plan.device)


def run_small(plan: Plan, gains: torch.Tensor, batches: Sequence[torch.Tensor], scale: float) -> None:
    """Full, in as few steps as there can be, for as many matrices at a time as fit the cache."""
    step = max(1, _BLOCK_ELEMENTS // math.prod(plan.matrix))
    for batch in batches:
        for x in (batch,) if batch.ndim == 2 or batch.shape[0] <= step else torch.split(batch, step):
            z = torch.fft.fft(torch.fft.rfft(_converted(x, gains)), dim=-2).mul_(gains)
            _combine(x, 0.0, torch.fft.irfft2(z, s=plan.matrix), scale)


def _converted(x: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """``x`` in the real dtype of complex gains."""
    dtype = gains.dtype.to_real()
    return x if x.dtype == dtype else x.to(dtype)


def run_blocks(plan: Plan, columns: Columns, batches: Sequence[torch.Tensor], scale: float) -> None:
    """Real FFTs of row blocks to and from the spectrum, panels of columns in between."""
    (height, width), dtype = plan.matrix, compute_dtype(plan.dtype)
    spectrum = _spectrum(plan, columns)
    block = max(1, _BLOCK_ELEMENTS // width)
    step = height if spectrum.at_once else block
    keep, add = (0.0 if plan.form == "full" else plan.background) * scale, columns.factor * scale
    for x in matrices(batches):
        spectrum.open(x)
        for start in range(0, height, step):
            # Without out=: torch's FFTs would only copy a temporary into it.
            spectrum.put(start, torch.fft.rfft(x[start : start + step].to(dtype)))
        _filter_columns(spectrum, columns.panels)
        for start in range(0, height, block):
            part = x[start : start + block]
            result = torch.fft.irfft(spectrum.get(start, part.shape[0]), n=width)
            _combine(part, keep, result, add)


def _apply(panel: torch.Tensor, p: Panel) -> None:
    if p.gains is not None and p.gains.dtype != torch.bool:
        panel.mul_(p.gains)
        return
    if p.gains is not None:
        panel.masked_fill_(p.gains, 0.0)
    if p.constant != 1.0:
        panel.mul_(p.constant)


def _combine(x: torch.Tensor, keep: float, z: torch.Tensor, add: float) -> None:
    """x = keep * x + add * z in z's dtype, rounded once; z is overwritten."""
    if x.dtype != z.dtype:
        z.mul_(add)
        x.copy_(z.add_(x, alpha=keep) if keep else z)
    elif keep == 0.0:
        x.copy_(z) if add == 1.0 else torch.mul(z, add, out=x)
    else:
        if keep != 1.0:
            x.mul_(keep)
        x.add_(z, alpha=add)


def _spectrum(plan: Plan, columns: Columns) -> Spectrum:
    dtype = torch.complex128 if plan.dtype == torch.float64 else torch.complex64
    if plan.packed:
        return PackedSpectrum(plan.matrix, dtype)
    if plan.form == "full":
        return WholeSpectrum()
    return PrunedSpectrum(plan.matrix, columns.runs, dtype, plan.device)


def _filter_columns(spectrum: Spectrum, panels: list[Panel]) -> None:
    """Apply the gains of every kept column: in place where they are constant, between two column FFTs elsewhere."""
    for p in panels:
        if p.gains is None:
            if p.constant != 1.0:
                spectrum.scale(p.start, p.stop, p.constant)
            continue
        panel = spectrum.read(p.start, p.stop)
        panel = torch.fft.fft(panel)  # lets go of memory that the next step finds in cache
        _apply(panel, p)
        panel = torch.fft.ifft(panel)
        spectrum.write(p.start, p.stop, panel)
