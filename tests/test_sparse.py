"""Sparse updates against dense arithmetic, and their undo bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.experts.sparse import SparseVector, Update, apply_, weighted_sum

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = ["cpu", "torch"]


def sparse(numel: int, count: int, seed: int, index_dtype: torch.dtype = torch.int32) -> SparseVector:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(numel, generator=generator)[:count].sort().values
    return SparseVector(indices.to(index_dtype), torch.randn(count, generator=generator))


def layouts(weights: torch.Tensor) -> list[torch.Tensor]:
    """The same values contiguous, transposed in memory, and as every other column of a wider matrix."""
    wide = torch.empty(weights.shape[0], 2 * weights.shape[1], dtype=weights.dtype)
    wide[:, ::2] = weights
    return [weights.clone(), weights.t().contiguous().t(), wide[:, ::2]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_apply_is_dense_arithmetic_and_restores(backend: str, dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    original = torch.randn(130, 301, generator=torch.Generator().manual_seed(1)).to(dtype)
    update = sparse(original.numel(), 20_000, 2, index_dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    where = update.indices.long()
    origin = torch.randn(20_000, generator=torch.Generator().manual_seed(3)).to(dtype)
    scaled = update.values.to(compute) * 0.3
    for start in (None, origin):
        expected = original.clone().view(-1)
        expected[where] = ((expected[where] if start is None else start).to(compute) + scaled).to(dtype)
        for weights in layouts(original):
            with apply_([Update(weights, update, 0.3, start)], backend=backend):
                assert torch.equal(weights, expected.view_as(weights))
            assert torch.equal(weights, original)


def test_an_index_outside_the_tensor_changes_nothing() -> None:
    for bad in (10, -1):
        weights, other = torch.ones(10), torch.ones(10)
        update = SparseVector(torch.tensor([0, bad], dtype=torch.int32), torch.ones(2))
        with pytest.raises(ValueError, match="outside the tensor"):
            apply_([Update(other, sparse(10, 3, 0), 1.0), Update(weights, update, 1.0)], backend="cpu")
        assert torch.equal(other, torch.ones(10))
        assert torch.equal(weights, torch.ones(10))


@pytest.mark.parametrize("backend", BACKENDS)
def test_updates_of_one_memory_are_made_in_order_and_undone_in_reverse(backend: str) -> None:
    original = torch.randn(90, 80, generator=torch.Generator().manual_seed(4))
    weights = original.clone()
    first, second = sparse(7200, 5000, 5), sparse(7200, 5000, 6, torch.int64)
    expected = original.clone().view(-1)
    for update, scale in ((first, 0.5), (second, -2.0)):
        expected[update.indices.long()] += update.values * scale
    with apply_([Update(weights, first, 0.5), Update(weights.t().t(), second, -2.0)], backend=backend):
        assert torch.equal(weights.view(-1), expected)
    assert torch.equal(weights, original)


@settings(deadline=None, max_examples=50)
@given(
    numel=st.integers(1, 200),
    counts=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    weights=st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4),
    wide=st.booleans(),
)
def test_weighted_sum_is_the_sum_of_dense_vectors(
    numel: int, counts: list[int], weights: list[float], wide: bool
) -> None:
    dtype = torch.int64 if wide else torch.int32
    terms = [(sparse(numel, min(count, numel), i, dtype), weights[i]) for i, count in enumerate(counts)]
    total = weighted_sum(terms)
    expected = torch.zeros(numel)
    touched = set()
    for term, weight in terms:
        expected[term.indices.long()] += term.values * weight
        touched |= set(term.indices.tolist())
    assert total.indices.tolist() == sorted(touched)
    dense = torch.zeros(numel)
    dense[total.indices] = total.values
    assert torch.equal(dense, expected)
