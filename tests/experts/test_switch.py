"""Sparse updates against dense arithmetic, and their undo bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.backends import cpu, cuda
from freemerge.backends.sparse import SparseVector, Update
from freemerge.errors import ArgumentError
from freemerge.experts.switch import Switch, weighted_sum
from updates import apply_, expected, mixed_updates, sparse

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def layouts(weights: torch.Tensor) -> list[torch.Tensor]:
    """The same values contiguous, transposed in memory, and as every other column of a wider matrix."""
    wide = torch.empty(weights.shape[0], 2 * weights.shape[1], dtype=weights.dtype)
    wide[:, ::2] = weights
    return [weights.clone(), weights.t().contiguous().t(), wide[:, ::2]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_apply_is_dense_arithmetic_and_restores(backend: str, dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    if backend == "cuda" and dtype == torch.float64:
        pytest.skip("the CUDA backend has no float64")
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


def test_many_tensors_change_at_once(backend: str) -> None:
    updates = mixed_updates(DTYPES[:3] if backend == "cuda" else DTYPES, 130)
    before, after = [update.weights.clone() for update in updates], [expected(update) for update in updates]
    with apply_(updates, backend=backend):
        assert all(torch.equal(update.weights, want) for update, want in zip(updates, after, strict=True))
    assert all(torch.equal(update.weights, want) for update, want in zip(updates, before, strict=True))


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, TimeoutError])
@pytest.mark.parametrize("backend", ["cpu", "cuda-emulated"], indirect=True)
def test_an_interruption_that_python_tells_of_after_the_switch_is_undone(
    backend: str, interruption: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a signal's handler raises while native code runs comes when that is through, and the weights have
    changed."""
    updates = mixed_updates(DTYPES[:3], 130)
    before = [update.weights.clone() for update in updates]
    told: list[object] = []

    def interrupted(weights: Sequence[torch.Tensor]) -> None:
        told.append(weights)
        if len(told) == 1:
            raise interruption

    for module in (cpu, cuda):
        monkeypatch.setattr(module, "mark_changed", interrupted)
    with pytest.raises(interruption), apply_(updates, backend=backend):
        pass
    assert len(told) == 2
    assert all(torch.equal(update.weights, want) for update, want in zip(updates, before, strict=True))


def test_nan_payloads_and_negative_zeros_come_back(backend: str) -> None:
    bits = torch.tensor([0x7FA1, 0xFFB2 - 0x10000, -0x8000, 0x7F80], dtype=torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        weights = bits.clone().view(dtype)
        with apply_([Update(weights, SparseVector(torch.arange(4), torch.ones(4)), 1.0)], backend=backend):
            pass
        assert torch.equal(weights.view(torch.int16), bits)


def test_weights_of_inference_mode_change_and_come_back(backend: str) -> None:
    with torch.inference_mode():
        weights = torch.randn(9, 10)
    before, entries = weights.clone(), sparse(90, 9, 0)
    with apply_([Update(weights, entries, 0.5)], backend=backend):
        assert torch.equal(weights, expected(Update(before, entries, 0.5)))
    assert torch.equal(weights, before)


ONES = torch.ones(2)


@pytest.mark.parametrize(
    ("entries", "origin", "message"),
    [
        (SparseVector(torch.tensor([0, 10]), ONES), None, "outside the tensor"),
        (SparseVector(torch.tensor([0, -1], dtype=torch.int32), ONES), None, "outside the tensor"),
        (SparseVector(torch.tensor([0, 1]), torch.ones(3)), None, "of one length"),
        (SparseVector(torch.tensor([0, 1, 2, 3])[::2], ONES), None, "contiguous"),
        (SparseVector(torch.tensor([0, 1], dtype=torch.int16), ONES), None, "int32 or int64 indices"),
        (SparseVector(torch.tensor([0, 1]), ONES.double()), None, "float32 values"),
        (SparseVector(torch.tensor([0, 1]), ONES), torch.ones(1), "of one length"),
        (SparseVector(torch.tensor([0, 1]), ONES), ONES.bfloat16(), r"origin of torch\.bfloat16"),
        (SparseVector(torch.tensor([0, 1], device="meta"), ONES), None, "on the device of the weights"),
    ],
)
def test_what_cannot_be_applied_changes_nothing(
    entries: SparseVector, origin: torch.Tensor | None, message: str, backend: str
) -> None:
    weights, other = torch.ones(10), torch.ones(10)
    with pytest.raises(ArgumentError, match=message):
        apply_([Update(other, sparse(10, 3, 0), 1.0), Update(weights, entries, 1.0, origin)], backend=backend)
    assert torch.equal(other, torch.ones(10))
    assert torch.equal(weights, torch.ones(10))


def test_a_switch_is_turned_on_again_and_within_itself(backend: str) -> None:
    updates = mixed_updates([torch.float32], 12)
    weights, before = [update.weights for update in updates], [update.weights.clone() for update in updates]
    switch = Switch(updates, backend=backend)
    for _ in range(3):
        with switch.on(weights):
            once = [tensor.clone() for tensor in weights]
            with switch.on(weights):
                twice = [tensor.clone() for tensor in weights]
            assert all(map(torch.equal, weights, once))
        assert all(map(torch.equal, weights, before))
    assert not all(map(torch.equal, once, twice))


def test_a_switch_fits_tensors_that_lie_where_its_own_did() -> None:
    weights = torch.randn(8, 8)
    switch = Switch([Update(weights, sparse(64, 9, 0), 1.0)])
    for same in (weights, weights.detach(), weights.view(8, 8)):
        assert switch.fits([same])
    for other in (weights.clone(), weights.t(), weights.view(64), weights.view(torch.int32), weights[:4]):
        assert not switch.fits([other])


def test_weights_that_get_other_data_meanwhile_are_restored_where_they_were(backend: str) -> None:
    weights = torch.nn.Parameter(torch.randn(300, 300))
    before, alias = weights.detach().clone(), weights.data
    with apply_([Update(weights, sparse(90_000, 900, 0), 1.0)], backend=backend):
        assert not torch.equal(alias, before)
        weights.data = torch.zeros(3)
    assert torch.equal(alias, before)
    assert torch.equal(weights, torch.zeros(3))


def test_weights_whose_memory_is_shared_meanwhile_are_restored_where_it_is_now(backend: str) -> None:
    memory = torch.randn(300, 301, generator=torch.Generator().manual_seed(1))
    original = memory.clone()
    updates = [Update(rows, sparse(rows.numel(), 9_000, 2), 0.3, None) for rows in (memory[:100].t(), memory[150:])]
    with apply_(updates, backend=backend):
        former = memory.data_ptr()
        memory.share_memory_()
        assert memory.data_ptr() != former
        assert not torch.equal(memory, original)
    assert torch.equal(memory, original)
    with apply_(updates, backend=backend):
        assert not torch.equal(memory, original)
    assert torch.equal(memory, original)


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
    numel=st.integers(1, 200) | st.integers(1, 20_000),  # more than are added up together
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


@pytest.mark.parametrize("indices", [[3, 3], [3, 2], [-1, 2], [4096, 4095], [0, 9000, 8999]])
def test_positions_that_do_not_ascend_are_refused(indices: list[int]) -> None:
    terms = [(SparseVector(torch.tensor(i), torch.ones(len(i))), 1.0) for i in ([0, 5], indices)]
    with pytest.raises(ValueError, match="must be ascending"):
        weighted_sum(terms)
