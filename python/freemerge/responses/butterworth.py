"""A smooth high-pass with a slope that the user chooses."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field

import numpy as np

from .base import Box, Gains, MaskParams, set_number
from .radial import CutoffUnit, Metric, Radial, bands


@dataclass(frozen=True)
class Butterworth(Radial):
    """Smooth high-pass without ringing: M = 1 / (1 + (D0 / r)^(2 order)), 0 at DC; units as in :class:`HighPass`."""

    cutoff: float
    order: float = 2
    unit: CutoffUnit = field(default="fraction", kw_only=True)
    metric: Metric = field(default="bins", kw_only=True)

    def __post_init__(self) -> None:
        set_number(self, "cutoff", least=0)
        set_number(self, "order", above=0)
        super().__post_init__()

    def params(self, shape: tuple[int, ...]) -> MaskParams:
        return self._params("butterworth", shape, self.cutoff, order=self.order)

    def _profile(self, radius: Gains, params: MaskParams) -> Gains:
        positive = np.where(radius == 0.0, 1.0, radius)
        # A ratio to a cutoff at the end of the range of numbers has few digits left, which count with a small order.
        mantissa, exponent = math.frexp(params.edge0) if params.order <= 1 else (params.edge0, 0)
        with np.errstate(over="ignore"):  # far below the cutoff the power overflows and the gain is 0
            power = (mantissa / positive) ** (2.0 * params.order) * np.exp2(2.0 * params.order * exponent)
            gains = 1.0 / (1.0 + power)
        return np.where(radius == 0.0, 0.0, gains)

    def box(self, shape: tuple[int, ...], tolerance: float) -> Box:
        params = self.params(shape)
        reach = math.exp(min(700.0, -math.log(tolerance) / (2 * self.order)))  # in cutoffs
        edge = max(params.edge0 * reach, sys.float_info.min)  # the gain at DC is 0 whatever the cutoff
        return Box(1.0, bands(params, edge), tail=tolerance)
