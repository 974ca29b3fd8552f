"""The merging rules against their formulas, by hand and elementwise."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freemerge.methods.rules import (
    alignment_factors,
    default_scale,
    energy_factor,
    magnitude_weights,
    projection_scale,
    weights_by_rule,
)

means = st.lists(st.floats(1e-12, 1e6), min_size=1, max_size=12)


@given(means)
def test_magnitude_weights_are_shares_of_the_mean_magnitude(values: list[float]) -> None:
    weights = magnitude_weights(values)
    assert math.isclose(sum(weights), 1.0, rel_tol=1e-12)
    assert all(math.isclose(w * math.fsum(values), v, rel_tol=1e-12) for w, v in zip(weights, values, strict=True))


def test_weights_of_zero_task_vectors() -> None:
    assert magnitude_weights([0.0, 0.0]) == (0.5, 0.5)
    assert magnitude_weights([0.0, 3.0]) == (0.0, 1.0)


def test_other_weights() -> None:
    assert weights_by_rule("uniform", 2) == (0.5, 0.5)
    assert weights_by_rule("sum", 2) == (1.0, 1.0)
    assert weights_by_rule((0.2, -0.7), 2) == (0.2, -0.7)


def test_the_default_scale_merges_at_the_strength_of_task_arithmetic() -> None:
    assert default_scale("magnitude", 8) * sum(magnitude_weights([1.0] * 8)) / 8 == pytest.approx(0.4)
    for rule in ("uniform", "sum"):
        assert default_scale(rule, 8) * sum(weights_by_rule(rule, 8)) / 8 == pytest.approx(0.4)
    assert default_scale((0.3, 0.3), 2) == 1.0


@given(means)
def test_alignment_gives_every_task_the_largest_magnitude(values: list[float]) -> None:
    for value, factor in zip(values, alignment_factors(values), strict=True):
        assert math.isclose(value * factor, max(values), rel_tol=1e-12)


def test_alignment_leaves_zero_at_zero() -> None:
    assert alignment_factors([0.0, 2.0]) == [0.0, 1.0]
    assert alignment_factors([0.0, 0.0]) == [0.0, 0.0]


def test_energy_factor() -> None:
    assert energy_factor(6.0, 2.0) == 3.0
    assert energy_factor(0.0, 0.0) == 1.0
    assert energy_factor(1.0, 1e-9) == 1.0, "rounding noise is not amplified"


def test_projection_scale() -> None:
    assert projection_scale([4.0, 2.0], [1.0, 2.0]) == 2.0
    assert projection_scale([0.0], [0.0]) == 1.0
    assert projection_scale([5.0, 5.0], [1e-9]) == 1.0, "task vectors that cancel"
    assert projection_scale([1.0], [-1.0]) == 1.0
