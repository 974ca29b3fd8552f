"""Sums over entries, bins and singular values, from which every measure follows; they add up over tensors.

V = K + M vectors: the task vectors of K models, then what M methods make of them (unscaled). All arrays are float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
EDGES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, math.inf)
"""Band b holds the bins with EDGES[b] <= radius / min(H, W) < EDGES[b + 1], in the unit that a filter's cutoff has."""

BANDS = len(EDGES) - 1
RANKS = tuple(2**power for power in range(11))  #: numbers of singular directions whose energy is summed
S = TypeVar("S", bound="_Sums")


@dataclass(frozen=True)
class _Sums:
    def __add__(self: S, other: S) -> S:
        added: dict[str, Any] = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return type(self)(**added)


@dataclass(frozen=True)
class EntrySums(_Sums):
    """Over the entries of a tensor: of any number of dimensions.

    Attributes:
        entries: their number.
        base: sum of theta_0^2.
        gram: [V, V] scalar products.
        agreeing, differing: [K, K] entries where two task vectors have the same sign, or opposite ones; zeros are in
            neither.
    """

    entries: int
    base: float
    gram: Array
    agreeing: Array
    differing: Array

    @classmethod
    def zeros(cls, tasks: int, methods: int) -> EntrySums:
        vectors = tasks + methods
        return cls(0, 0.0, np.zeros((vectors, vectors)), np.zeros((tasks, tasks)), np.zeros((tasks, tasks)))


@dataclass(frozen=True)
class BandSums(_Sums):
    """Over the bins of each of B bands of the two-dimensional spectrum, of matrices.

    Attributes:
        bins: [B] their number.
        gram: [B, V, V] real parts of scalar products of the spectra.
        white: [B, V] the energy that each band would have, were the energy of each matrix spread evenly over its bins.
        variance: [B] the variance over tasks of the amplitude.
        means: [2, V] the energy of the means of rows, and of the means of columns.
        white_means: [2, V] the same, were the energy spread evenly.
        kept: [M, 3] what the filter of a method keeps of bins, of energy (mean over tasks), and of variance.
    """

    bins: Array
    gram: Array
    white: Array
    variance: Array
    means: Array
    white_means: Array
    kept: Array

    @classmethod
    def zeros(cls, tasks: int, methods: int) -> BandSums:
        vectors = tasks + methods
        return cls(
            np.zeros(BANDS),
            np.zeros((BANDS, vectors, vectors)),
            np.zeros((BANDS, vectors)),
            np.zeros(BANDS),
            np.zeros((2, vectors)),
            np.zeros((2, vectors)),
            np.zeros((methods, 3)),
        )


@dataclass(frozen=True)
class SingularSums(_Sums):
    """Over the singular values of matrices.

    Attributes:
        matrices: [V] number of matrices with a non-zero vector.
        stable, effective: [V] sums over matrices of the ranks, as shares of the shorter side.
        top: [V, R] the energy in the first RANKS singular directions, where that is known.
        known: [V, R] the energy of those matrices.
        overlap, pairs: [K, K] sums over matrices of the overlap between the strongest directions of two task vectors,
            beyond chance, and the number of matrices where both have any.
    """

    matrices: Array
    stable: Array
    effective: Array
    top: Array
    known: Array
    overlap: Array
    pairs: Array

    @classmethod
    def zeros(cls, tasks: int, methods: int) -> SingularSums:
        vectors, ranks = tasks + methods, len(RANKS)
        return cls(
            np.zeros(vectors),
            np.zeros(vectors),
            np.zeros(vectors),
            np.zeros((vectors, ranks)),
            np.zeros((vectors, ranks)),
            np.zeros((tasks, tasks)),
            np.zeros((tasks, tasks)),
        )


@dataclass(frozen=True)
class Sums(_Sums):
    """All sums of a tensor, or of several."""

    entries: EntrySums
    bands: BandSums
    singular: SingularSums

    @classmethod
    def zeros(cls, tasks: int, methods: int) -> Sums:
        return cls(EntrySums.zeros(tasks, methods), BandSums.zeros(tasks, methods), SingularSums.zeros(tasks, methods))
