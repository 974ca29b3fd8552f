"""The election of signs of methods by hand and against a loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from freemerge.methods.election import agreeing_sum


def test_election_keeps_what_agrees_with_the_sign_of_the_sum() -> None:
    deltas = [torch.tensor([1.0, -3.0, 2.0, 0.0, 1.0]), torch.tensor([2.0, 1.0, -2.0, 5.0, -4.0])]
    #                                        sums: 3, -2, 0, 5, -3
    assert agreeing_sum(deltas, [1.0, 1.0]).tolist() == [3.0, -3.0, 0.0, 5.0, -4.0]


@pytest.mark.parametrize("weight", [1 / 3, 0.1, 0.7])
def test_what_cancels_with_equal_weights_elects_no_sign(weight: float) -> None:
    ones = torch.arange(1.0, 100.0)
    deltas = [ones, 4 * ones, -5 * ones]
    assert not agreeing_sum(deltas, [weight] * 3).any()


@given(st.integers(1, 6), st.integers(0, 2**31))
def test_election_against_a_loop(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    deltas = [torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(count)]
    weights = torch.randn(count, generator=generator, dtype=torch.float64).tolist()
    merged = agreeing_sum(deltas, weights)
    for entry in range(7):
        terms = [w * float(d[entry]) for w, d in zip(weights, deltas, strict=True)]
        elected = sum(terms) > 0
        expected = sum(term for term in terms if (term > 0) == elected)
        assert float(merged[entry]) == pytest.approx(expected, abs=1e-12)
