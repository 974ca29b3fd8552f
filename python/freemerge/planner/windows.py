"""Decimation of one axis: window weights, their transform, and the error they leave.

With n samples, P cells and u_s = s P / n the position of sample s in cells, spreading, ``C[p] = sum_s phi(u_s - p)
x[s]``, has the P-point DFT ``phihat(k) X[k]`` for the offsets |k| < band of the plan, up to aliases; interpolating back
by the same weights multiplies by phihat(k) once more. phi is the Kaiser-Bessel window of Fessler and Sutton (2003),
with beta as in Beatty, Nishimura and Pauly (2005).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .plan import Decimation

Array = npt.NDArray[np.float64]

_MAX_WRAPS = 8  # aliases beyond this many periods add less than 10 % to the error


def half_bin(n: int, d: Decimation) -> float:
    """How far the first bin at or above the centre of the band is above it: around Nyquist of an odd n, half a bin."""
    return 0.5 if d.nyquist and n % 2 else 0.0


def kaiser_beta(d: Decimation) -> float:
    """Shape parameter of the window for its oversampling cells / (2 band - 1)."""
    sigma = d.cells / (2 * d.band - 1)
    return math.pi * math.sqrt(max(1.0, (d.taps / sigma) ** 2 * (sigma - 0.5) ** 2 - 0.8))


def window_transform(d: Decimation, offsets: Array) -> Array:
    """phihat at the given offsets, in DFT bins."""
    if not d.taps:
        return np.ones_like(offsets)
    beta = kaiser_beta(d)
    squared = beta * beta - (math.pi * d.taps * offsets / d.cells) ** 2
    root = np.sqrt(np.maximum(np.abs(squared), 1e-12))
    profile = np.where(squared > 0, np.sinh(np.minimum(root, 700.0)), np.sin(root)) / root
    return d.taps * profile / float(np.i0(beta))


@dataclass(frozen=True)
class WindowError:
    """How far a decimated axis is from exact, relative to the norm of the input."""

    alias: float  #: what reaches (or leaves) the worst offset of the band from outside it
    amplification: float  #: phihat at the centre of the band over phihat at its edge: rounding grows with it


def window_error(n: int, d: Decimation) -> WindowError:
    """Bounds for an axis of n samples, of which only the parity counts; cheap, for the planner compares many."""
    if not d.taps:
        return WindowError(0.0, 1.0)
    edge = d.band - 1 + half_bin(n, d)
    centre = _profile(d, edge)
    squares = 0.0
    for wrap in range(1, _MAX_WRAPS + 1):
        for frequency in (wrap * d.cells - edge, wrap * d.cells + edge):  # beyond n / 2 they count modulo n
            squares += _profile(d, frequency) ** 2
    return WindowError(math.sqrt(squares) / abs(centre), _profile(d, 0) / abs(centre))


def _profile(d: Decimation, offset: float) -> float:
    """phihat up to a constant factor."""
    squared = kaiser_beta(d) ** 2 - (math.pi * d.taps * offset / d.cells) ** 2
    root = math.sqrt(max(abs(squared), 1e-12))
    return (math.sinh(root) if squared > 0 else math.sin(root)) / root


@dataclass(frozen=True)
class Piece:
    """One product of a window: spread samples [sample0, sample1) on cells [cell0, cell1), or interpolate them.

    ``first`` starts a sum over several pieces.
    """

    cell0: int
    cell1: int
    sample0: int
    sample1: int
    weights: torch.Tensor
    first: bool = True


class Window:
    """The weights of one decimated axis of ``n`` samples, cut into blocks; equal blocks share one tensor.

    They are computed in float64, a block at a time, and kept as ``dtype`` on ``device``.
    """

    def __init__(self, n: int, d: Decimation, dtype: torch.dtype = torch.float64, device: str = "cpu") -> None:
        self._n, self._d = n, d
        self._dtype, self._device = dtype, device
        self._shared: dict[tuple[int, ...], torch.Tensor] = {}

    def spread(self, block: int) -> list[Piece]:
        """Products that fill all cells, ``block`` cells at a time; a block that wraps around takes two.

        Weights have shape (cells, samples).
        """
        n, d = self._n, self._d
        pieces: list[Piece] = []
        for cell0 in range(0, d.cells, block):
            cell1 = min(cell0 + block, d.cells)
            half = d.taps / 2
            low = math.ceil((cell0 - half) * n / d.cells)
            high = math.floor((cell1 - 1 + half) * n / d.cells) + 1
            ranges = [(0, n)] if high - low >= n else list(_wrap(low, high, n))
            for first, (sample0, sample1) in enumerate(ranges):
                weights = self._weights(cell0, cell1, sample0, sample1, spreads=True)
                pieces.append(Piece(cell0, cell1, sample0, sample1, weights, first == 0))
        return pieces

    def interpolate(self, block: int) -> list[Piece]:
        """Products that fill all samples, about ``block`` cells at a time.

        Cells are numbered past both ends, -taps <= cell < cells + taps: the grid is extended periodically. Weights have
        shape (samples, cells).
        """
        n, d = self._n, self._d
        pieces = []
        step = max(1, round(block * n / d.cells))
        for sample0 in range(0, n, step):
            sample1 = min(sample0 + step, n)
            cell0 = math.ceil(sample0 * d.cells / n - d.taps / 2)
            cell1 = math.floor((sample1 - 1) * d.cells / n + d.taps / 2) + 1
            weights = self._weights(cell0, cell1, sample0, sample1, spreads=False)
            pieces.append(Piece(cell0, cell1, sample0, sample1, weights))
        return pieces

    def _weights(self, cell0: int, cell1: int, sample0: int, sample1: int, *, spreads: bool) -> torch.Tensor:
        """phi between the cells and samples; spreading takes the shorter way around the axis.

        Around Nyquist, odd samples are negated, counted on over the ends of the axis: where n is odd, the grid changes
        its sign from a period to the next, and has frequencies half-way between bins.
        """
        n, d = self._n, self._d
        period = n * d.cells
        offset = sample0 * d.cells - cell0 * n
        key = (
            offset,
            cell1 - cell0,
            sample1 - sample0,
            sample0 % 2 * d.nyquist,
            max(0, -cell0) * d.nyquist,  # cells beyond the ends
            max(0, cell1 - d.cells) * d.nyquist,
            spreads,
        )
        if key not in self._shared:
            samples = np.arange(sample0, sample1, dtype=np.int64)
            cells = np.arange(cell0, cell1, dtype=np.int64)[:, None]
            distance = samples * d.cells - cells * n
            turns = (distance + period // 2) // period if spreads else cells // d.cells
            if spreads:
                distance -= turns * period
            weights = _kernel(d, distance / n)  # of integers up to here: no rounding, however long the axis
            if d.nyquist:
                weights *= 1.0 - 2.0 * ((samples - turns * n) % 2)
            weights = np.ascontiguousarray(weights if spreads else weights.T)
            self._shared[key] = torch.tensor(weights, dtype=self._dtype, device=self._device)
        return self._shared[key]


def _kernel(d: Decimation, t: Array) -> Array:
    """phi at distances t, in cells."""
    beta = kaiser_beta(d)
    inside = np.clip(1.0 - (2.0 * t / d.taps) ** 2, 0.0, None)
    return np.where(np.abs(2.0 * t) <= d.taps, np.i0(beta * np.sqrt(inside)) / np.i0(beta), 0.0)


def _wrap(low: int, high: int, n: int) -> Iterator[tuple[int, int]]:
    """The range [low, high) of a periodic axis as one or two ranges inside [0, n); shorter than n."""
    start = low % n
    stop = start + high - low
    yield start, min(stop, n)
    if stop > n:
        yield 0, stop - n
