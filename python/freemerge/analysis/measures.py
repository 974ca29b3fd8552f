"""The measures that are reported, from sums. docs/analysis.md says what each one means.

None stands for what has no value: a ratio of zeros, or a measure of matrices where there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .sums import Array, Sums

_NOTHING = 1e-9  # of the energy of noise: what is left in a band that a filter has removed is rounding

Value = float | None
Row = tuple[Value, ...]  #: one value a task, a band or a rank, as the attribute says


@dataclass(frozen=True)
class Spectrum:
    """Of one vector.

    Attributes:
        bands: energy in each band of the spectrum, relative to an even spread over all bins.
        row_means, column_means: energy of the means of rows and of columns, relative to the same.
        effective_rank: (sum s^2)^2 / sum s^4 of the singular values s, as a share of the shorter side; mean over
            matrices.
        stable_rank: sum s^2 / max s^2, likewise.
        top: share of the energy in the first 1, 2, 4, ... singular directions of each matrix.
    """

    bands: Row
    row_means: Value
    column_means: Value
    effective_rank: Value
    stable_rank: Value
    top: Row


@dataclass(frozen=True)
class FilterEffect:
    """What the filter of a method keeps: shares of bins, of the energy, and of the variance over tasks of amplitude."""

    bins: Value
    energy: Value
    variance: Value


@dataclass(frozen=True)
class MethodMeasures:
    """Of the task vector X that a method merges, at its scale c.

    Attributes:
        spectrum: of X.
        cosine: with each task vector.
        bands: the same in each band of the spectrum, mean over tasks; None where X has nothing but rounding.
        norm: ||c X||, relative to the root mean square of the ||v_i||.
        kept: <c X, v_i> / ||v_i||^2 of each task: how much of its own task vector the merged model has.
        filter: what the method's filter keeps, if it has one.
    """

    spectrum: Spectrum
    cosine: Row
    bands: Row
    norm: Value
    kept: Row
    filter: FilterEffect | None


@dataclass(frozen=True)
class Measures:
    """Of a tensor, or of all tensors of a group together. K tasks, v_i their task vectors, B bands of the spectrum.

    Attributes:
        entries: number of entries.
        relative_size: ||v_i|| / ||theta_0|| of each task.
        cosine: [K][K] between task vectors.
        sign_agreement: [K][K] share of the entries, non-zero in both, that have the same sign.
        spectra: of each task vector.
        band_cosine: [B] mean over pairs of the cosine in each band.
        variance: over tasks, of the amplitude of their spectra, relative to its mean square.
        band_variance: [B] the same in each band.
        overlap: [K][K] mean squared cosine of the angles between the subspaces of the strongest singular directions,
            0 as between random subspaces, 1 for equal ones; None on the diagonal.
        methods: by label.
    """

    entries: int
    relative_size: Row
    cosine: tuple[Row, ...]
    sign_agreement: tuple[Row, ...]
    spectra: tuple[Spectrum, ...]
    band_cosine: Row
    variance: Value
    band_variance: Row
    overlap: tuple[Row, ...]
    methods: dict[str, MethodMeasures]

    @property
    def mean_cosine(self) -> Value:
        """Mean over pairs of tasks."""
        return _pair_mean(self.cosine)

    @property
    def mean_sign_agreement(self) -> Value:
        """Mean over pairs of tasks."""
        return _pair_mean(self.sign_agreement)

    @property
    def mean_overlap(self) -> Value:
        """Mean over pairs of tasks."""
        return _pair_mean(self.overlap)


def measures_of(sums: Sums, scales: Mapping[str, float], filters: Mapping[str, bool]) -> Measures:
    """The measures of a tensor or a group. ``scales`` and ``filters`` have the methods' labels, in order."""
    entries, bands, singular = sums.entries, sums.bands, sums.singular
    tasks = len(entries.agreeing)
    square = np.diagonal(entries.gram)
    cosine = _cosine(entries.gram)
    energy = np.diagonal(bands.gram, axis1=1, axis2=2)
    present = energy > _NOTHING * bands.white
    by_band = np.stack([_cosine(gram) for gram in bands.gram])
    by_band[~(present[:, :, None] & present[:, None, :])] = np.nan
    pairs = np.array(list(combinations(range(tasks), 2)), dtype=int).reshape(-1, 2)
    signs = _ratio(entries.agreeing, entries.agreeing + entries.differing)
    spectra = [_spectrum(sums, energy, v) for v in range(len(square))]
    effects = _ratio(bands.kept, _whole(sums, energy, tasks))
    found = {}
    for m, (label, scale) in enumerate(scales.items()):
        v = tasks + m
        found[label] = MethodMeasures(
            spectra[v],
            _row(cosine[v, :tasks]),
            _row(_mean(by_band[:, v, :tasks], 1)),
            _value(abs(scale) * _ratio(np.sqrt(square[v]), np.sqrt(square[:tasks].mean()))),
            _row(scale * _ratio(entries.gram[v, :tasks], square[:tasks])),
            FilterEffect(*map(_value, effects[m])) if filters[label] else None,
        )
    return Measures(
        entries.entries,
        _row(_ratio(np.sqrt(square[:tasks]), np.sqrt(entries.base))),
        tuple(map(_row, cosine[:tasks, :tasks])),
        tuple(map(_row, signs)),
        tuple(spectra[:tasks]),
        _row(_mean(by_band[:, pairs[:, 0], pairs[:, 1]], 1)),
        _value(_ratio(bands.variance.sum(), energy[:, :tasks].mean(1).sum())),
        _row(_ratio(bands.variance, energy[:, :tasks].mean(1))),
        tuple(map(_row, _ratio(singular.overlap, singular.pairs))),
        found,
    )


def _spectrum(sums: Sums, energy: Array, v: int) -> Spectrum:
    bands, singular = sums.bands, sums.singular
    means = _ratio(bands.means[:, v], bands.white_means[:, v])
    return Spectrum(
        _row(_ratio(energy[:, v], bands.white[:, v])),
        _value(means[0]),
        _value(means[1]),
        _value(_ratio(singular.effective[v], singular.matrices[v])),
        _value(_ratio(singular.stable[v], singular.matrices[v])),
        _row(_ratio(singular.top[v], singular.known[v])),
    )


def _whole(sums: Sums, energy: Array, tasks: int) -> Array:
    """Bins, energy and variance that a filter could keep."""
    return np.array([sums.bands.bins.sum(), energy[:, :tasks].mean(1).sum(), sums.bands.variance.sum()])


def _cosine(gram: Array) -> Array:
    norms = np.sqrt(np.diagonal(gram))
    return np.clip(_ratio(gram, np.outer(norms, norms)), -1.0, 1.0)


def _ratio(over: Array | float, under: Array | float) -> Array:
    """Entry by entry; NaN where both are zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient: Array = np.asarray(np.divide(over, under))
    return np.where(np.isfinite(quotient), quotient, np.nan)


def _mean(values: Array, axis: int) -> Array:
    """The mean of those that are not NaN; NaN where all are."""
    return _ratio(np.nansum(values, axis), np.isfinite(values).sum(axis))


def _pair_mean(matrix: tuple[Row, ...]) -> Value:
    values = [matrix[i][j] for i, j in combinations(range(len(matrix)), 2)]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _value(number: Array | float) -> Value:
    return float(number) if np.isfinite(number) else None


def _row(values: Array) -> Row:
    return tuple(map(_value, values))
