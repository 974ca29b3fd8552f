"""removed_fraction, which counts or integrates, against the plain sum over all bins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import freemerge as fm
from freemerge.responses import Response, transposed
from freemerge.responses.sums import mean_over_bins

SIDES = st.integers(1, 500)
MEASURES = st.sampled_from([{}, {"unit": "bins"}, {"metric": "normalized"}])


def plain_sum(response: Response, shape: tuple[int, ...]) -> float:
    return float(np.mean(1 - np.minimum(np.abs(response.mask(shape)), 1)))


@st.composite
def step_responses(draw: st.DrawFn) -> Response:
    measure = draw(MEASURES)
    edges = st.floats(0, 80) if measure.get("unit") == "bins" else st.sampled_from([0.1, 0.25, 0.5]) | st.floats(0, 1.5)
    low, high = sorted((draw(edges), draw(edges)))
    gains = st.floats(-2, 2)
    return draw(
        st.sampled_from(
            [
                fm.HighPass(high, **measure),
                fm.LowPass(high, **measure),
                fm.BandPass(low, high, **measure),
                fm.BandStop(low, high, **measure),
                fm.BandGain(high, draw(gains), draw(gains), **measure),
                fm.Center(-1),
                fm.Center(-2),
                fm.Official(low, relative_to="min"),
                fm.Official(high, relative_to="max"),
            ]
        )
    )


@st.composite
def smooth_responses(draw: st.DrawFn) -> Response:
    measure = draw(MEASURES)
    cutoff = draw(st.floats(0.1, 300) if measure.get("unit") == "bins" else st.floats(0.001, 3))
    order = draw(st.sampled_from([1, 2, 4]) | st.floats(0.1, 300))
    return draw(st.sampled_from([fm.Butterworth(cutoff, order, **measure), fm.Gaussian(cutoff, **measure)]))


@settings(max_examples=300)
@given(step_responses(), SIDES, SIDES)
def test_steps_are_counted(response: Response, height: int, width: int) -> None:
    shape = (height, width)
    assert response.removed_fraction(shape) == pytest.approx(plain_sum(response, shape), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("height", "width", "cutoff"), [(38, 7, 17 / 38), (43, 30, 18 / 43), (40, 55, 20 / 40), (46, 13, 14 / 46)], ids=str
)
def test_bins_on_the_edge_are_counted_as_they_are_kept(height: int, width: int, cutoff: float) -> None:
    response = fm.HighPass(cutoff, metric="normalized")  # an edge on a bin, to the last bit or nearly
    shape = (height, width)
    assert response.removed_fraction(shape) == pytest.approx(plain_sum(response, shape), rel=1e-12)


@settings(max_examples=200)
@given(smooth_responses(), SIDES, SIDES)
def test_smooth_responses_are_within_a_millionth(response: Response, height: int, width: int) -> None:
    shape = (height, width)
    assert response.removed_fraction(shape) == pytest.approx(plain_sum(response, shape), rel=0, abs=1e-6)


@pytest.mark.parametrize("shape", [(3000, 700), (700, 3001), (1, 100_000), (40_000, 3), (60_001,)])
@pytest.mark.parametrize(
    "response",
    [
        fm.HighPass(0.4),
        fm.BandPass(0.1, 0.2, metric="normalized"),
        fm.Official(0.7),
        fm.Official(0.05),
        fm.Butterworth(0.2),
        fm.Butterworth(3, 1, unit="bins"),
        fm.Butterworth(0.3, 40, metric="normalized"),
        fm.Gaussian(0.05),
        fm.Gaussian(0.2, metric="normalized"),
    ],
    ids=repr,
)
def test_long_shapes(response: Response, shape: tuple[int, ...]) -> None:
    assert response.removed_fraction(shape) == pytest.approx(plain_sum(response, shape), rel=0, abs=1e-6)


@given(smooth_responses() | step_responses(), SIDES, SIDES)
def test_transposition_removes_as_much(response: Response, height: int, width: int) -> None:
    turned = transposed(response).removed_fraction((width, height))
    assert turned == pytest.approx(response.removed_fraction((height, width)), rel=0, abs=1e-9)


@pytest.mark.parametrize("shape", [(128256, 4096), (5376, 262144)])
@pytest.mark.parametrize("order", [1, 4, 12])
def test_few_bins_of_a_large_spectrum_are_evaluated(shape: tuple[int, int], order: int) -> None:
    evaluated = 0

    def values(ky: np.ndarray, kx: np.ndarray) -> np.ndarray:
        nonlocal evaluated
        evaluated += ky.size * kx.size
        return 1 / (1 + ((ky * ky + kx * kx) / 800**2) ** order)

    mean_over_bins(values, *shape)
    assert evaluated < 0.01 * shape[0] * shape[1]


@given(st.integers(1, 40_000), st.integers(1, 700))
def test_polynomials_are_summed_exactly(height: int, width: int) -> None:
    mean = mean_over_bins(lambda ky, kx: (ky / height) ** 10 * (kx / width) ** 4 + 1, height, width)
    y, x = (np.minimum(np.arange(n), n - np.arange(n)) / n for n in (height, width))
    assert mean == pytest.approx(np.mean(y**10) * np.mean(x**4) + 1, rel=1e-12)


def test_a_mask_without_smoothness_is_summed_bin_by_bin() -> None:
    shape = (301, 420)

    def rough(ky: np.ndarray, kx: np.ndarray) -> np.ndarray:
        return ((np.abs(ky) * 31 + np.abs(kx) * 17) % 5 == 0).astype(np.float64)

    k, l = (np.minimum(np.arange(n), n - np.arange(n)).astype(float) for n in shape)  # noqa: E741
    assert mean_over_bins(rough, *shape) == pytest.approx(rough(k[:, None], l[None, :]).mean(), rel=1e-12)


@pytest.mark.parametrize(
    "response", [fm.HighPass(0.3), fm.Gaussian(0.3, metric="normalized"), fm.Center(), fm.Official(0.7)]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (-1, 2), (1.5, 2), None, "wide"])
def test_what_is_no_shape_is_refused(response: Response, shape: Any) -> None:
    for ask in (response.removed_fraction, response.mask):
        with pytest.raises(fm.ArgumentError, match="shape must be one or more whole numbers from 1 on"):
            ask(shape)
