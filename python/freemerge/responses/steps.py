"""Ideal (brick-wall) filters: gains that are constant between radii."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ..errors import ArgumentError
from .base import LARGEST_GAIN, Box, Gains, MaskParams, column_weights, removed, set_number
from .radial import CutoffUnit, Metric, Radial, bands, bin_radius


class Steps(Radial):
    """Constant gains below, between and from two radii on."""

    def _profile(self, radius: Gains, params: MaskParams) -> Gains:
        outer = np.where(radius < params.edge1, params.gain1, params.gain2)
        return np.where(radius < params.edge0, params.gain0, outer)

    def box(self, shape: tuple[int, ...], tolerance: float) -> Box:
        params = self.params(shape)
        return Box(params.gain2, bands(params, params.edge1))

    def removed_fraction(self, shape: tuple[int, ...]) -> float:
        params = self.params(shape)
        bins = float(params.height * params.width)
        inner, outer = _bins_below(params.edge0, params), _bins_below(params.edge1, params)
        counts = np.array([inner, outer - inner, bins - outer])
        return float(removed(np.array([params.gain0, params.gain1, params.gain2])) @ counts) / bins

    def _columns(self, params: MaskParams) -> Gains:
        rows = params.height // 2 + 1
        inner, outer = (np.minimum(_frequencies_below(edge, params), rows) for edge in (params.edge0, params.edge1))
        present = np.array([inner > 0, outer > inner, rows > np.maximum(inner, outer)])
        gains = np.array([[params.gain0], [params.gain1], [params.gain2]])
        low, high = np.where(present, gains, np.inf).min(axis=0), np.where(present, gains, -np.inf).max(axis=0)
        return np.where(low == high, low, np.nan)


def _bins_below(edge: float, params: MaskParams) -> float:
    """The number of bins whose radius lies below the edge."""
    bins = np.clip(2.0 * _frequencies_below(edge, params) - 1.0, 0.0, params.height)
    return float(bins @ column_weights(params.width))


def _frequencies_below(edge: float, params: MaskParams) -> Gains:
    """In each column, how many of the row frequencies 0, 1, 2, ..., H lie below the edge."""
    fx = params.unit_x * np.arange(params.width // 2 + 1, dtype=np.float64)
    # An estimate, which rounding may put off by one.
    estimate = np.ceil(np.sqrt(np.maximum(edge * edge - fx * fx, 0.0)) / params.unit_y)
    count = np.clip(estimate - 1.0, 0.0, params.height)
    count += sum(bin_radius(params.unit_y * (count + step), fx) < edge for step in (0.0, 1.0))
    return count


@dataclass(frozen=True)
class _SingleCutoff(Steps):
    cutoff: float
    unit: CutoffUnit = field(default="fraction", kw_only=True)
    metric: Metric = field(default="bins", kw_only=True)

    _gains: ClassVar[tuple[float, float]]

    def __post_init__(self) -> None:
        set_number(self, "cutoff", least=0)
        super().__post_init__()

    def params(self, shape: tuple[int, ...]) -> MaskParams:
        below, beyond = self._gains
        return self._params("steps", shape, self.cutoff, self.cutoff, gains=(below, beyond, beyond))


@dataclass(frozen=True)
class HighPass(_SingleCutoff):
    """The paper's ideal high-pass: keep bins with sqrt(ky^2 + kx^2) >= D0 (arXiv 2411.16815, section 4.1).

    ``cutoff`` is a fraction of min(H, W), so D0 = cutoff * min(H, W) DFT bins; with ``unit="bins"`` it is D0 itself;
    with ``metric="normalized"`` bins with sqrt((ky/H)^2 + (kx/W)^2) >= cutoff are kept, so that a rectangle is treated
    isotropically. A vector of n entries is filtered along its one axis with D0 = cutoff * n.
    """

    _gains: ClassVar[tuple[float, float]] = (0.0, 1.0)


@dataclass(frozen=True)
class LowPass(_SingleCutoff):
    """The complement of :class:`HighPass`: keep bins with a radius below the cutoff."""

    _gains: ClassVar[tuple[float, float]] = (1.0, 0.0)


@dataclass(frozen=True)
class _TwoCutoffs(Steps):
    low: float
    high: float
    unit: CutoffUnit = field(default="fraction", kw_only=True)
    metric: Metric = field(default="bins", kw_only=True)

    _gains: ClassVar[tuple[float, float, float]]

    def __post_init__(self) -> None:
        set_number(self, "low", least=0)
        set_number(self, "high", least=0)
        if self.low > self.high:
            raise ArgumentError(f"low must not exceed high, got low={self.low!r} and high={self.high!r}")
        super().__post_init__()

    def params(self, shape: tuple[int, ...]) -> MaskParams:
        return self._params("steps", shape, self.low, self.high, gains=self._gains)


@dataclass(frozen=True)
class BandPass(_TwoCutoffs):
    """Keep bins with low <= radius < high; units as in :class:`HighPass`."""

    _gains: ClassVar[tuple[float, float, float]] = (0.0, 1.0, 0.0)


@dataclass(frozen=True)
class BandStop(_TwoCutoffs):
    """Remove bins with low <= radius < high; units as in :class:`HighPass`."""

    _gains: ClassVar[tuple[float, float, float]] = (1.0, 0.0, 1.0)


@dataclass(frozen=True)
class BandGain(Steps):
    """Gain ``low`` below the cutoff and ``high`` from it on, as FreSca and FAM Diffusion apply to 2-D latents."""

    cutoff: float
    low: float
    high: float
    unit: CutoffUnit = field(default="fraction", kw_only=True)
    metric: Metric = field(default="bins", kw_only=True)

    def __post_init__(self) -> None:
        set_number(self, "cutoff", least=0)
        set_number(self, "low", size=LARGEST_GAIN)
        set_number(self, "high", size=LARGEST_GAIN)
        super().__post_init__()

    def params(self, shape: tuple[int, ...]) -> MaskParams:
        return self._params("steps", shape, self.cutoff, self.cutoff, gains=(self.low, self.high, self.high))
