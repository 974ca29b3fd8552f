"""Means of a smooth function over all bins of a spectrum, from far fewer values than there are bins."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from .base import Gains, blocks

_POINTS = 8  # of one panel
_TOLERANCE = 1e-7


def mean_over_bins(values: Callable[[Gains, Gains], Gains], height: int, width: int) -> float:
    """Mean over an H x W spectrum of ``values(ky, kx)``, which must be even in each frequency.

    Frequencies are grouped into panels whose length grows with the distance from DC. A panel of at most 8 bins is
    summed as it is, a longer one by the Gauss rule of its bins, which takes 8 points and is exact for polynomials up to
    degree 15. Panels are halved until the mean changes by less than 1e-7; where that takes many points, or would not
    save many, every bin is summed.
    """
    growth, mean = 0.5, np.inf
    while True:
        (ky, weights_y), (kx, weights_x) = _rule(height, growth), _rule(width, growth)
        exact = 4 * ky.size * kx.size > (height // 2 + 1) * (width // 2 + 1)
        if exact:
            (ky, weights_y), (kx, weights_x) = _rule(height, 0.0), _rule(width, 0.0)
        total = 0.0
        for rows in blocks(ky.size, kx.size):
            total += float(weights_y[rows] @ (values(ky[rows, None], kx[None, :]) @ weights_x))
        previous, mean = mean, total / (height * width)
        if exact or abs(mean - previous) < _TOLERANCE:
            return mean
        growth /= 2


def _rule(n: int, growth: float) -> tuple[Gains, Gains]:
    """Frequencies and weights, so that the weighted sum of an even function is its sum over the n bins of an axis."""
    last = n // 2
    frequencies, weights = [], []
    start = 0
    while start <= last:
        length = min(max(_POINTS, int(growth * start)), last + 1 - start)
        offsets, panel_weights = _panel(length)
        frequencies.append(start + offsets)
        weights.append(2.0 * panel_weights)
        start += length
    weights[0][0] = 1.0  # DC has no mirror image, nor has Nyquist
    if n % 2 == 0:
        frequencies.append(np.array([float(last)]))
        weights.append(np.array([-1.0]))
    return np.concatenate(frequencies), np.concatenate(weights)


@lru_cache(maxsize=1024)
def _panel(length: int) -> tuple[Gains, Gains]:
    """Points and weights of the Gauss rule for the sum over 0, 1, ..., length - 1 (Golub and Welsch)."""
    if length <= _POINTS:
        return np.arange(length, dtype=np.float64), np.ones(length)
    k = np.arange(1, _POINTS, dtype=np.float64)  # the recurrence of the discrete Chebyshev polynomials
    off_diagonal = k * np.sqrt((length * length - k * k) / (4.0 * (4.0 * k * k - 1.0)))
    points, vectors = np.linalg.eigh(np.diag(off_diagonal, -1))
    return points + (length - 1) / 2, length * vectors[0] ** 2
