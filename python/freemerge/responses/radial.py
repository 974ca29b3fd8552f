"""Responses of the radius of a bin only."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal

import numpy as np

from ..errors import ArgumentError
from .base import ClosedForm, Gains, MaskParams, matrix_shape, removed
from .sums import mean_over_bins

CutoffUnit = Literal["fraction", "bins"]
Metric = Literal["bins", "normalized"]


class Radial(ClosedForm):
    """A response of the radius of a bin only, measured in DFT bins or in cycles per sample (``metric``).

    Subclasses are frozen dataclasses with the fields ``unit`` and ``metric``. They define :meth:`params`, as
    :meth:`_params` of their edges, and :meth:`_profile`, which rises or falls throughout (or :meth:`_columns` too).
    """

    unit: CutoffUnit
    metric: Metric

    def __post_init__(self) -> None:
        if self.unit not in ("fraction", "bins"):
            raise ArgumentError(f"unit must be 'fraction' or 'bins', got {self.unit!r}")
        if self.metric not in ("bins", "normalized"):
            raise ArgumentError(f"metric must be 'bins' or 'normalized', got {self.metric!r}")
        if self.metric == "normalized" and self.unit == "bins":
            raise ArgumentError(
                "unit='bins' cannot be combined with metric='normalized' (its radius is in cycles per sample)"
            )
        super().__post_init__()

    @abstractmethod
    def _profile(self, radius: Gains, params: MaskParams) -> Gains:
        """The gain at each radius."""

    def _params(
        self,
        kind: str,
        shape: tuple[int, ...],
        *edges: float,
        gains: tuple[float, float, float] = (0.0, 0.0, 0.0),
        order: float = 1.0,
    ) -> MaskParams:
        """The numbers of a mask, its edges given in the user's unit."""
        height, width = matrix_shape(shape)
        normalized = self.metric == "normalized"
        units = (1.0 / height, 1.0 / width) if normalized else (1.0, 1.0)
        if normalized:
            # (1 / 140) * 14 < 0.1: bins on an edge must not be lost by the rounding of their radius.
            edges = tuple(edge * (1.0 - 1e-12) for edge in edges)
        elif self.unit == "fraction":
            # Rounding keeps 0.55 * 100 = 55.00000000000001 from losing the bins at radius 55.
            edges = tuple(round(edge * min(shape[-2:]), 9) for edge in edges)
        edge0, edge1 = (*edges, 0.0)[:2]
        return MaskParams(kind, height, width, *units, edge0, edge1, *gains, order)

    def gain(self, ky: Gains, kx: Gains, shape: tuple[int, ...]) -> Gains:
        params = self.params(shape)
        return self._profile(bin_radius(params.unit_y * ky, params.unit_x * kx), params)

    def removed_fraction(self, shape: tuple[int, ...]) -> float:
        return mean_over_bins(lambda ky, kx: removed(self.gain(ky, kx, shape)), *matrix_shape(shape))

    def _columns(self, params: MaskParams) -> Gains:
        # The radius grows with |ky| and the profile rises or falls throughout: the two ends decide.
        fx = params.unit_x * np.arange(params.width // 2 + 1, dtype=np.float64)
        near, far = np.sqrt(fx * fx), bin_radius(params.unit_y * float(params.height // 2), fx)
        low, high = self._profile(near, params), self._profile(far, params)
        return np.where(low == high, low, np.nan)


def bin_radius(fy: Gains | float, fx: Gains) -> Gains:
    """The distance from DC, in the same operations as the native kernels."""
    distance: Gains = np.sqrt(fy * fy + fx * fx)
    return distance


def bands(params: MaskParams, edge: float) -> tuple[int, int]:
    """The band along each axis that all bins with a radius below the edge lie in."""
    return _band(edge, params.unit_y, params.height), _band(edge, params.unit_x, params.width)


def _band(edge: float, unit: float, n: int) -> int:
    """Number of frequencies 0, 1, 2, ..., at most n, whose radius unit * k lies below the edge."""
    if edge > unit * n:
        return n
    count = max(0, math.ceil(edge / unit))
    while count > 0 and unit * (count - 1) >= edge:
        count -= 1
    while unit * count < edge:
        count += 1
    return count
