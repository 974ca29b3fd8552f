"""A smooth high-pass that is 1 beyond a few cutoffs, so that large matrices need few frequencies."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field

import numpy as np

from .base import Box, Gains, MaskParams, set_number
from .radial import CutoffUnit, Metric, Radial, bands


@dataclass(frozen=True)
class Gaussian(Radial):
    """Smooth high-pass without ringing: M = 1 - exp(-r^2 / (2 D0^2)); units as in :class:`HighPass`."""

    cutoff: float
    unit: CutoffUnit = field(default="fraction", kw_only=True)
    metric: Metric = field(default="bins", kw_only=True)

    def __post_init__(self) -> None:
        set_number(self, "cutoff", above=0)
        super().__post_init__()

    def params(self, shape: tuple[int, ...]) -> MaskParams:
        return self._params("gaussian", shape, self.cutoff)

    def _profile(self, radius: Gains, params: MaskParams) -> Gains:
        with np.errstate(divide="ignore", over="ignore"):  # a cutoff that was rounded to 0 removes the mean alone
            scaled = np.divide(radius, params.edge0, out=np.zeros_like(radius), where=radius > 0)
            return -np.expm1(-0.5 * (scaled * scaled))

    def box(self, shape: tuple[int, ...], tolerance: float) -> Box:
        params = self.params(shape)
        edge = max(params.edge0 * math.sqrt(-2 * math.log(tolerance)), sys.float_info.min)  # the gain at DC is 0
        return Box(1.0, bands(params, edge), tail=tolerance)
