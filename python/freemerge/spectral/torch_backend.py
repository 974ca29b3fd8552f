"""The pure-torch backend: every form, any device, in blocks of rows and panels of columns.

It allocates one set of block buffers per call and reads or writes the matrices in place. Products and transforms write
into those buffers (``out=``), which keeps them out of autocast and of the allocator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ..responses import Response, matrix_shape, signed_frequencies, transposed
from .backend import BackendInfo, Costs, Traits
from .plan import Decimation, Form, Plan
from .planner import compute_dtype
from .windows import Piece, Window, window_transform

_GATHER_CELLS = {"cpu": 4}  # cells per product on the way down; elsewhere _SCATTER_CELLS
_SCATTER_CELLS = {"cpu": 12}
_CELLS = 64
_SEGMENT_CELLS = 64  # coarse rows per pass over the columns
_COLUMN_CELLS = 32  # cells per product along a row
_STAGE_ELEMENTS = 1 << 19  # a converted block of rows stays in cache
_BLOCK_ELEMENTS = 1 << 17  # rows per FFT call: this many elements
_PANEL = 16  # columns per FFT call

# Measured on one core of a Sapphire Rapids Xeon with MKL, ns; benchmarks/test_filter.py shows the outcome.
_CPU_COSTS = Costs(move=0.25, tap=0.04, dense=0.02, row_fft=0.18, column_fft=0.45, coarse_fft=0.2, call=6000.0)
_OTHER_COSTS = Costs(move=0.005, tap=0.0004, dense=0.0001, row_fft=0.001, column_fft=0.003, coarse_fft=0.002, call=2e4)

_FORMS: frozenset[Form] = frozenset(("identity", "scale", "decimated", "thin", "pruned", "full"))
_EXACT: frozenset[Form] = frozenset(("identity", "scale", "pruned", "full"))
_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


class TorchBackend:
    """Reference for speed on a machine without native kernels; the float64 oracle of the tests is its own reference."""

    name = "torch"

    def info(self) -> BackendInfo:
        return BackendInfo(self.name, True, details={"torch": torch.__version__})

    def traits(self, device: torch.device) -> Traits:
        # A lowered matmul precision (TF32, bf16) would break the error bound of every form made of products.
        exact = torch.get_float32_matmul_precision() == "highest"
        cpu = device.type == "cpu"
        return Traits(
            forms=_FORMS if exact else _EXACT,
            dtypes=_DTYPES,
            costs=_CPU_COSTS if cpu else _OTHER_COSTS,
            taps=tuple(range(6, 21)),
            extra_taps=8 if cpu else _CELLS,
            transposes=True,
            packs=True,
        )

    def supports(self, plan: Plan) -> str | None:
        if plan.dtype not in _DTYPES:
            return f"has no arithmetic for {plan.dtype}"
        return None

    def run(self, plan: Plan, matrices: Sequence[torch.Tensor], scale: float) -> None:
        with torch.autocast(torch.device(plan.device).type, enabled=False):
            if plan.form == "identity":
                _scale(matrices, scale)
            elif plan.form == "scale":
                _scale(matrices, scale * plan.background)
            elif plan.form in ("decimated", "thin"):
                _run_decimated(plan, matrices, scale)
            else:
                _run_columns(plan, matrices, scale)


def _scale(matrices: Iterable[torch.Tensor], factor: float) -> None:
    if factor != 1.0:
        for x in matrices:
            x.mul_(factor) if factor else x.zero_()


# --- decimated and thin -------------------------------------------------------------------------------------------


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
    assert plan.rows is not None and plan.columns is not None
    (height, width), dtype = plan.matrix, compute_dtype(plan.dtype)
    kind = torch.device(plan.device).type
    scatter = _SCATTER_CELLS.get(kind, _CELLS)
    rows = _axis(height, plan.rows, _GATHER_CELLS.get(kind, _CELLS), scatter, dtype, plan.device)
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
        if segments and product.cell1 - segments[-1][0].cell0 <= limit:
            segments[-1].append(product)
        elif segments and not product.first:  # the second half of a block that wraps around
            segments[-1].append(product)
        else:
            segments.append([product])
    return segments


def _run_decimated(plan: Plan, matrices: Sequence[torch.Tensor], scale: float) -> None:
    grid, (_, width), dtype = _grid(plan), plan.matrix, compute_dtype(plan.dtype)
    rows, columns = grid.rows, grid.columns
    down = _segments(rows.gather, _SEGMENT_CELLS)
    up = _segments(rows.scatter, _SEGMENT_CELLS)
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
    for samples, columns, source in _staged(segment, x, out.dtype):
        for p in segment:
            if samples[0] <= p.sample0 and p.sample1 <= samples[1]:
                block = source[p.sample0 - samples[0] : p.sample1 - samples[0]]
                target = out[p.cell0 - base : p.cell1 - base, columns]
                _product(target, p.weights, block, 0.0 if p.first else 1.0, 1.0)


def _staged(
    segment: list[_Product], x: torch.Tensor, dtype: torch.dtype
) -> Iterable[tuple[tuple[int, int], slice, torch.Tensor]]:
    """The rows that a segment reads, in the compute dtype: x itself, or converted blocks that stay in cache."""
    runs: list[list[int]] = []  # a segment that wraps around reads the last rows and the first ones
    for p in sorted(segment, key=lambda p: (not p.first, p.sample0)):
        if runs and runs[-1][0] <= p.sample0 <= runs[-1][1]:
            runs[-1][1] = max(runs[-1][1], p.sample1)
        else:
            runs.append([p.sample0, p.sample1])
    for start, stop in runs:
        if x.dtype == dtype:
            yield (start, stop), slice(None), x[start:stop]
            continue
        step = max(64, _STAGE_ELEMENTS // (stop - start))
        for column in range(0, x.shape[1], step):
            columns = slice(column, min(column + step, x.shape[1]))
            yield (start, stop), columns, x[start:stop, columns].to(dtype)


def _scatter_rows(segment: list[_Product], lines: torch.Tensor, x: torch.Tensor, keep: float, scale: float) -> None:
    base = segment[0].cell0
    for p in segment:
        source, target = lines[p.cell0 - base : p.cell1 - base], x[p.sample0 : p.sample1]
        if x.dtype == lines.dtype:
            _product(target, p.weights, source, keep, scale)
            continue
        step = max(64, _STAGE_ELEMENTS // (p.sample1 - p.sample0))
        for column in range(0, x.shape[1], step):
            part = target[:, column : column + step]
            staged = part.to(lines.dtype)
            _product(staged, p.weights, source[:, column : column + step], keep, scale)
            part.copy_(staged)


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


# --- pruned and full ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Panel:
    """Kept columns [start, stop), counted among the kept ones.

    Their gains are ``factor`` (no ``gains``), ``factor`` except where a bool ``gains`` is true (0 there), or
    ``factor`` times ``gains``, which has shape (H, stop - start).
    """

    start: int
    stop: int
    factor: float
    gains: torch.Tensor | None = None


@dataclass(frozen=True)
class _Columns:
    """Which columns of the half spectrum are kept, and what happens to them."""

    runs: list[tuple[int, int]]  #: kept columns, as ranges
    panels: list[_Panel]

    @property
    def count(self) -> int:
        return sum(stop - start for start, stop in self.runs)


def _ranges(indices: np.ndarray) -> list[tuple[int, int]]:
    if not indices.size:
        return []
    cuts = np.flatnonzero(np.diff(indices) > 1)
    return list(zip(indices[np.r_[0, cuts + 1]].tolist(), (indices[np.r_[cuts, -1]] + 1).tolist(), strict=True))


@lru_cache(maxsize=8)
def _columns(plan: Plan) -> _Columns:
    """pruned: the columns whose gain is not the background, with gain - background. full: all columns."""
    response, shape = _oriented(plan)
    gains = response.column_gains(shape)
    if plan.form == "full":
        kept, offset = np.arange(gains.size), 0.0
    else:
        kept, offset = np.flatnonzero(gains != plan.background), plan.background
    panels: list[_Panel] = []
    position = 0
    for start, stop in _ranges(kept):
        for first, last, varies in _constant_runs(gains[start:stop]):
            if not varies:
                panels.append(_Panel(position + first, position + last, float(gains[start + first] - offset)))
                continue
            for column in range(first, last, _PANEL):
                end = min(column + _PANEL, last)
                factor, table = _panel_gains(response, shape, (start + column, start + end), offset, plan)
                panels.append(_Panel(position + column, position + end, factor, table))
        position += stop - start
    return _Columns(_ranges(kept), panels)


def _constant_runs(gains: np.ndarray) -> Iterator[tuple[int, int, bool]]:
    """Maximal runs of columns that vary, or that share one constant gain: (start, stop, varies)."""
    labels = np.where(np.isnan(gains), np.inf, gains)
    cuts = np.flatnonzero(labels[1:] != labels[:-1]) + 1
    edges = [0, *cuts.tolist(), gains.size]
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        yield start, stop, bool(np.isnan(gains[start]))


def _panel_gains(
    response: Response, shape: tuple[int, ...], columns: tuple[int, int], offset: float, plan: Plan
) -> tuple[float, torch.Tensor]:
    """(factor, gains) of a panel: one byte a bin where the gains are 0 or one other number."""
    height, _ = matrix_shape(shape)
    kx = np.arange(*columns, dtype=np.float64)[None, :]
    gains = response.gain(signed_frequencies(height)[:, None], kx, shape) - offset
    gains = np.ascontiguousarray(np.broadcast_to(gains, (height, kx.size)))
    levels = np.unique(gains)
    if levels.size == 2 and 0.0 in levels:
        return float(levels[levels != 0.0][0]), torch.tensor(gains == 0.0, device=plan.device)
    return 1.0, torch.tensor(gains, dtype=compute_dtype(plan.dtype), device=plan.device)


def _oriented(plan: Plan) -> tuple[Response, tuple[int, ...]]:
    if plan.transposed:
        return transposed(plan.response), (plan.shape[-1], plan.shape[-2])
    return plan.response, plan.shape


def _run_columns(plan: Plan, matrices: Sequence[torch.Tensor], scale: float) -> None:
    height, width = matrix_shape(_oriented(plan)[1])
    columns, dtype = _columns(plan), compute_dtype(plan.dtype)
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    packed = plan.form == "full" and plan.dtype == dtype
    bins, block = width // 2 + 1, max(1, min(height, _BLOCK_ELEMENTS // width))
    new = {"dtype": dtype, "device": plan.device}
    rows = torch.empty(block, width, **new)
    spectrum = torch.empty(block, bins, dtype=complex_dtype, device=plan.device)
    keep = 0.0 if plan.form == "full" else plan.background * scale
    for original in matrices:
        x = original.t() if plan.transposed else original
        store: _Separate | _Packed
        if packed:
            store = _Packed(x)
        else:
            store = _Separate(spectrum.new_empty(height, columns.count), columns.runs)
        for start in range(0, height, block):
            part = x[start : start + block]
            source = part if part.dtype == dtype and not plan.transposed else rows[: part.shape[0]].copy_(part)
            half = spectrum[: part.shape[0]]
            torch.fft.rfft(source, out=half)
            store.put(start, half)
        _filter_columns(store, columns, height, spectrum)
        for start in range(0, height, block):
            part = x[start : start + block]
            half, result = spectrum[: part.shape[0]], rows[: part.shape[0]]
            store.get(start, half)
            torch.fft.irfft(half, n=width, out=result)
            if scale != 1.0:
                result.mul_(scale)
            if keep:
                result.add_(part, alpha=keep)
            part.copy_(result)


class _Separate:
    """Kept columns of the half spectrum in a (H, count) complex tensor of their own."""

    def __init__(self, kept: torch.Tensor, runs: list[tuple[int, int]]) -> None:
        self._kept, self._runs = kept, runs

    def put(self, row: int, half: torch.Tensor) -> None:
        position = 0
        for start, stop in self._runs:
            self._kept[row : row + half.shape[0], position : position + stop - start] = half[:, start:stop]
            position += stop - start

    def get(self, row: int, half: torch.Tensor) -> None:
        half.zero_()
        position = 0
        for start, stop in self._runs:
            half[:, start:stop] = self._kept[row : row + half.shape[0], position : position + stop - start]
            position += stop - start

    def read(self, start: int, stop: int, panel: torch.Tensor) -> None:
        panel.copy_(self._kept[:, start:stop])

    def write(self, start: int, stop: int, panel: torch.Tensor) -> None:
        self._kept[:, start:stop] = panel

    def scale(self, start: int, stop: int, gain: float) -> None:
        self._kept[:, start:stop] *= gain


class _Packed:
    """The half spectrum of each row in the row's own memory: [DC, (Nyquist if W is even), re 1, im 1, re 2, ...]."""

    def __init__(self, x: torch.Tensor) -> None:
        self._x = x
        self._nyquist = x.shape[1] // 2 if x.shape[1] % 2 == 0 else 0
        self._first = 2 if self._nyquist else 1  # of the interior bins
        self._interior = (x.shape[1] - 1) // 2

    def put(self, row: int, half: torch.Tensor) -> None:
        target, parts = self._x[row : row + half.shape[0]], torch.view_as_real(half)
        target[:, 0] = parts[:, 0, 0]
        if self._nyquist:
            target[:, 1] = parts[:, self._nyquist, 0]
        inner = parts[:, 1 : 1 + self._interior].reshape(half.shape[0], 2 * self._interior)
        target[:, self._first :] = inner

    def get(self, row: int, half: torch.Tensor) -> None:
        source, parts = self._x[row : row + half.shape[0]], torch.view_as_real(half)
        parts[:, 0, 0] = source[:, 0]
        parts[:, 0, 1] = 0.0
        if self._nyquist:
            parts[:, self._nyquist, 0] = source[:, 1]
            parts[:, self._nyquist, 1] = 0.0
        parts[:, 1 : 1 + self._interior].view(half.shape[0], 2 * self._interior).copy_(source[:, self._first :])

    def read(self, start: int, stop: int, panel: torch.Tensor) -> None:
        parts = torch.view_as_real(panel)
        if start == 0:
            parts[:, 0, 0] = self._x[:, 0]
            parts[:, 0, 1] = 0.0
        if self._nyquist and stop == self._nyquist + 1:
            parts[:, -1, 0] = self._x[:, 1]
            parts[:, -1, 1] = 0.0
        first, last = self._inner(start, stop)
        if first < last:
            parts[:, first - start : last - start].copy_(self._bins(first, last))

    def write(self, start: int, stop: int, panel: torch.Tensor) -> None:
        parts = torch.view_as_real(panel)
        if start == 0:
            self._x[:, 0] = parts[:, 0, 0]
        if self._nyquist and stop == self._nyquist + 1:
            self._x[:, 1] = parts[:, -1, 0]
        first, last = self._inner(start, stop)
        if first < last:
            self._bins(first, last).copy_(parts[:, first - start : last - start])

    def scale(self, start: int, stop: int, gain: float) -> None:
        if start == 0:
            self._x[:, 0] *= gain
        if self._nyquist and stop == self._nyquist + 1:
            self._x[:, 1] *= gain
        first, last = self._inner(start, stop)
        if first < last:
            self._bins(first, last).mul_(gain)

    def _inner(self, start: int, stop: int) -> tuple[int, int]:
        return max(start, 1), min(stop, self._interior + 1)

    def _bins(self, start: int, stop: int) -> torch.Tensor:
        floats = self._x[:, self._first + 2 * (start - 1) : self._first + 2 * (stop - 1)]
        return floats.unflatten(1, (stop - start, 2))


def _filter_columns(store: _Separate | _Packed, columns: _Columns, height: int, like: torch.Tensor) -> None:
    """Apply the gains of every kept column: in place where they are constant, between two column FFTs elsewhere."""
    widest = max((p.stop - p.start for p in columns.panels if p.gains is not None), default=0)
    flat = torch.empty(2, height * widest, dtype=like.dtype, device=like.device)
    for p in columns.panels:
        if p.gains is None:
            if p.factor != 1.0:
                store.scale(p.start, p.stop, p.factor)
            continue
        panel, spectrum = (buffer[: height * (p.stop - p.start)].view(height, -1) for buffer in flat)
        store.read(p.start, p.stop, panel)
        torch.fft.fft(panel, dim=0, out=spectrum)
        if p.gains.dtype == torch.bool:
            spectrum.masked_fill_(p.gains, 0.0)
        else:
            spectrum.mul_(p.gains)
        torch.fft.ifft(spectrum, dim=0, out=panel)
        if p.factor != 1.0:
            panel.mul_(p.factor)
        store.write(p.start, p.stop, panel)
