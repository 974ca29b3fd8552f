"""The k-th largest of many numbers in two passes, against sorting them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from freemerge.methods.order import kth_largest, kth_of
from freemerge.methods.whole import Whole

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
VALUES = st.lists(FINITE | st.sampled_from([0.0, 1.0, -1.0 - 2**-23]), max_size=60)


@given(models=st.lists(VALUES, min_size=1, max_size=3), share=st.floats(0, 1), pieces=st.integers(1, 4))
def test_it_is_the_one_that_sorting_finds(models: list[list[float]], share: float, pieces: int) -> None:
    parts = [torch.tensor(values, dtype=torch.float32).tensor_split(pieces) for values in models]
    units = [
        [(i, own[piece], torch.zeros_like(own[piece]) if i % 2 else None) for i, own in enumerate(parts)]
        for piece in range(pieces)
    ]
    for values, found in zip(models, kth_largest(Whole(lambda: units), len(models), share), strict=True):
        k = max(1, round(share * len(values))) if share and values else 0
        assert found == (np.sort(np.abs(np.float32(values)))[-k] if k else float("inf"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_shape_and_dtype(dtype: torch.dtype) -> None:
    values = torch.rand(7, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = float(values.flatten().sort(descending=True).values[round(0.3 * 105) - 1])
    assert kth_largest(Whole(lambda: [[(0, values, None)]]), 1, 0.3) == [expected]
    assert kth_of(values, [round(0.3 * 105), 0, 105]) == [expected, float("inf"), float(values.min())]
