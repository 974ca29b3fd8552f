"""Removal of the mean of each row or of each column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import ArgumentError
from .base import Box, ClosedForm, Gains, MaskParams, matrix_shape


@dataclass(frozen=True)
class Center(ClosedForm):
    """Remove only the mean along ``axis``: -1 subtracts each row's mean (kx = 0), -2 each column's mean (ky = 0)."""

    axis: Literal[-1, -2] = -1

    def __post_init__(self) -> None:
        if self.axis not in (-1, -2):
            raise ArgumentError(f"axis must be -1 (row means) or -2 (column means), got {self.axis!r}")
        super().__post_init__()

    def params(self, shape: tuple[int, ...]) -> MaskParams:
        height, width = matrix_shape(shape)
        if len(shape) == 1 and self.axis == -2:
            raise ArgumentError("axis=-2 needs a matrix, got a vector")
        return MaskParams("center", height, width, axis=1 if self.axis == -1 else 0)

    def gain(self, ky: Gains, kx: Gains, shape: tuple[int, ...]) -> Gains:
        removed = (kx if self.params(shape).axis == 1 else ky) == 0.0
        return np.where(removed, 0.0, 1.0) * np.ones_like(ky + kx)

    def removed_fraction(self, shape: tuple[int, ...]) -> float:
        params = self.params(shape)
        return 1.0 / (params.width if params.axis == 1 else params.height)

    def box(self, shape: tuple[int, ...], tolerance: float) -> Box:
        params = self.params(shape)
        return Box(1.0, (params.height, 1) if params.axis == 1 else (1, params.width))

    def _columns(self, params: MaskParams) -> Gains:
        if params.axis == 0:
            return np.full(params.width // 2 + 1, 0.0 if params.height == 1 else np.nan)
        gains = np.ones(params.width // 2 + 1)
        gains[0] = 0.0
        return gains
