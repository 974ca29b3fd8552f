"""The mask of the paper's released code."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..errors import ArgumentError
from .base import Box, ClosedForm, Gains, MaskParams, matrix_shape, set_number


@dataclass(frozen=True)
class Official(ClosedForm):
    """The mask of the authors' released code, quirks included (algorithm of ``fft2`` without ``fftshift``).

    With c = (H//2, W//2) in unshifted index space, dist in float32, r_lo = min(H, W)//10 and
    r_hi = ratio * min(H, W) (or max, as in the RoBERTa script): M = 1[dist <= r_hi] + 1[dist == r_lo]. It keeps a disc
    around Nyquist, and the few bins at exactly r_lo count twice.
    """

    ratio: float = 0.7
    relative_to: Literal["min", "max"] = field(default="min", kw_only=True)

    def __post_init__(self) -> None:
        set_number(self, "ratio", least=0)
        if self.relative_to not in ("min", "max"):
            raise ArgumentError(f"relative_to must be 'min' or 'max', got {self.relative_to!r}")
        super().__post_init__()

    def params(self, shape: tuple[int, ...]) -> MaskParams:
        height, width = matrix_shape(shape)
        sides = shape[-2:]
        reference = min(sides) if self.relative_to == "min" else max(sides)
        radius = min(self.ratio * reference, float(height + width))  # all bins are closer, and it fits into float32
        return MaskParams("official", height, width, edge0=radius, edge1=float(min(sides) // 10))

    def gain(self, ky: Gains, kx: Gains, shape: tuple[int, ...]) -> Gains:
        params = self.params(shape)
        bin_y, bin_x = ky % params.height, kx % params.width
        mirror_y, mirror_x = -ky % params.height, -kx % params.width
        return 0.5 * (self._raw(bin_y, bin_x, params) + self._raw(mirror_y, mirror_x, params))

    def removed_fraction(self, shape: tuple[int, ...]) -> float:
        # The sum of 1 - min(M_s, 1) is H W, less the sum of M, plus what M_s exceeds 1 by, which only a ring can.
        params = self.params(shape)
        centre, dx = params.height // 2, np.arange(params.width, dtype=np.float64) - params.width // 2
        # In each column, how many of the row distances 0, 1, 2, ... lie in the disc, below the ring, up to the ring.
        disc, below, upto = (
            np.ceil(np.sqrt(np.maximum(squares - dx * dx, 0.0))).astype(np.int64) for squares in _squares(params)
        )
        in_disc, below_ring, upto_ring = (np.clip(2 * n - 1, 0, params.height).sum() for n in (disc, below, upto))
        kept = float(in_disc + upto_ring - below_ring)

        lengths = upto - below
        columns = np.tile(np.repeat(np.arange(params.width), lengths), 2)
        distances = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - upto, lengths)
        rows = np.concatenate((centre - distances, centre + distances))
        exist = (rows >= 0) & (rows < params.height)
        ring = np.stack((rows[exist], columns[exist]))
        y, x = np.unique(np.concatenate((ring, -ring % [[params.height], [params.width]]), axis=1), axis=1)
        excess = np.maximum(self.gain(y.astype(np.float64), x.astype(np.float64), shape) - 1.0, 0.0).sum()
        return 1.0 - (kept - float(excess)) / (params.height * params.width)

    def box(self, shape: tuple[int, ...], tolerance: float) -> Box | None:
        params = self.params(shape)
        band = math.floor(max(params.edge0, params.edge1)) + 2  # float32 may round a distance down onto the edge
        bands = tuple(band if 2 * band - 1 < n else n for n in (params.height, params.width))
        return Box(0.0, (bands[0], bands[1]), (bands[0] == band, bands[1] == band))

    def _columns(self, params: MaskParams) -> Gains:
        x = np.arange(params.width // 2 + 1, dtype=np.float64)
        here, mirror = self._raw_column(x, params), self._raw_column(-x % params.width, params)
        return 0.5 * (here + mirror)  # NaN where either varies

    def _raw_column(self, bin_x: Gains, params: MaskParams) -> Gains:
        """Gain of each column if all its rows agree, else NaN: the disc by its two ends, the ring by its few bins."""
        centre = params.height // 2
        near = self._raw(np.full_like(bin_x, centre), bin_x, params)
        constant = near == self._raw(np.zeros_like(bin_x), bin_x, params)
        reach = np.sqrt(np.maximum(params.edge1**2 - (bin_x - params.width // 2) ** 2, 0.0))
        for step in (-1.0, 0.0, 1.0):
            row = np.clip(centre - np.round(reach) + step, 0.0, params.height - 1.0)
            constant &= self._raw(row, bin_x, params) == near
        return np.where(constant, near, np.nan)

    @staticmethod
    def _raw(bin_y: Gains, bin_x: Gains, params: MaskParams) -> Gains:
        dy, dx = bin_y - params.height // 2, bin_x - params.width // 2
        distance = np.sqrt((dy * dy + dx * dx).astype(np.float32))
        gains: Gains = (distance <= np.float32(params.edge0)).astype(np.float64)
        gains += distance == np.float32(params.edge1)
        return gains


def _squares(params: MaskParams) -> tuple[int, int, int]:
    """How many of the squared distances 0, 1, 2, ... lie in the disc, below the ring, and up to the ring."""
    squares = range(params.height**2 + params.width**2)
    disc, ring = np.float32(params.edge0), np.float32(params.edge1)

    def distance(squared: int) -> np.float32:
        root: np.float32 = np.sqrt(np.float32(squared))
        return root

    return (
        bisect_right(squares, disc, key=distance),
        bisect_left(squares, ring, key=distance),
        bisect_right(squares, ring, key=distance),
    )
