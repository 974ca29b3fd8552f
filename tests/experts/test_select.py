"""Top-d selection against a stable sort, on every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from freemerge.backends import registry
from freemerge.errors import ArgumentError
from freemerge.experts.select import ModelSelector, Selection, rows_of, select_largest

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def expected(v: torch.Tensor, k: int) -> tuple[list[int], list[float]]:
    """By a stable sort in numpy: largest magnitude first, then lowest index; zeros dropped; ascending indices."""
    values = v.reshape(-1).numpy()
    order = np.argsort(-np.abs(values), kind="stable")[:k]
    order = np.sort(order[values[order] != 0])
    return order.tolist(), values[order].tolist()


def assert_selects(selection: Selection, indices: list[int], values: list[float]) -> None:
    assert selection.indices.tolist() == indices
    assert selection.values.tolist() == values
    assert selection.values.dtype == torch.float32


def task_vector(shape: tuple[int, ...], seed: int, dtypes: list[torch.dtype], levels: int) -> list[torch.Tensor]:
    """A model and a base; few levels make many ties and zeros."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return [torch.randint(-levels, levels + 1, shape, generator=generator).to(dtype) / 8 for dtype in dtypes]
    return [torch.randn(shape, generator=generator).to(dtype) for dtype in dtypes]


def difference(model: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    if torch.float64 in (model.dtype, base.dtype):
        return (model.double() - base.double()).float()
    return model.float() - base.float()


@settings(deadline=None, max_examples=80)
@given(
    shape=st.lists(st.integers(0, 60), min_size=1, max_size=3).map(tuple),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=2),
    levels=st.sampled_from([0, 0, 1, 3]),
    seed=st.integers(0, 1000),
    share=st.floats(0, 1.2),
)
def test_tensor_and_row_scope_agree_with_a_stable_sort(
    backend: str, shape: tuple[int, ...], dtypes: list[torch.dtype], levels: int, seed: int, share: float
) -> None:
    model, base = task_vector(shape, seed, dtypes, levels)
    kind = registry.named(backend)
    assert kind is not None
    assume(kind.takes((model, base)) is None)  # the CUDA backend has no float64
    v = difference(model, base)
    k = int(share * v.numel())
    assert_selects(select_largest(model, base, k, backend=backend), *expected(v, k))
    rows, width = rows_of(shape)
    per_row = int(share * width)
    indices: list[int] = []
    values: list[float] = []
    for row, entries in enumerate(v.reshape(rows, width)):
        where, what = expected(entries, per_row)
        indices += [row * width + index for index in where]
        values += what
    assert_selects(select_largest(model, base, per_row, by_row=True, backend=backend), indices, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [0, 2])
@pytest.mark.parametrize("k", [1, 17, 6000, 590_000, 600_000])
def test_large_tensors_take_the_guessed_threshold_and_stay_exact(dtype: torch.dtype, levels: int, k: int) -> None:
    model, base = task_vector((600, 1000), 5, [dtype, dtype], levels)
    assert_selects(select_largest(model, base, k), *expected(difference(model, base), k))


@pytest.mark.parametrize("k", [100, 9000, 40000])
def test_zeros_are_left_out_wherever_they_are(backend: str, k: int) -> None:
    v = torch.randn(40000, generator=torch.Generator().manual_seed(0))  # a GPU ranks them in three chunks
    v[torch.arange(40000) % 4 > 0] = 0.0
    v[1::8] = -0.0
    v[::12] = 2.5  # ties
    assert_selects(select_largest(v, torch.zeros(40000), k, backend=backend), *expected(v, k))
    two = torch.stack([v, v.flip(0)])
    indices, values = expected(v, k)
    more_indices, more_values = expected(two[1], k)
    both = [*indices, *(40000 + i for i in more_indices)], values + more_values
    assert_selects(select_largest(two, torch.zeros(2, 40000), k, by_row=True, backend=backend), *both)


def test_a_guess_that_misleads_is_corrected() -> None:
    """Nearly all large entries sit where the sample rarely looks, and the sample sees mostly large ones elsewhere."""
    model = torch.zeros(1 << 20)
    model[: 1 << 10] = torch.linspace(1, 2, 1 << 10)
    base = torch.zeros(1 << 20)
    for k in (5, 1000, 1 << 10, 1 << 12):
        assert_selects(select_largest(model, base, k), *expected(model, k))
    growing = torch.cat([torch.linspace(0.001, 0.002, 1 << 19), torch.linspace(1, 2, 1 << 19)])
    assert_selects(select_largest(growing, base, 1 << 19), *expected(growing, 1 << 19))


def test_rows_of_very_different_size_do_not_mislead_each_other() -> None:
    scale = torch.tensor([1.0, 1e-6, 1e6, 0.0, 3.0, 1e-30]).repeat(50)
    v = torch.randn(300, 257, generator=torch.Generator().manual_seed(0)) * scale[:, None]
    selection = select_largest(v, torch.zeros_like(v), 9, by_row=True)
    indices = [row * 257 + index for row in range(300) for index in expected(v[row], 9)[0]]
    assert selection.indices.tolist() == indices


def test_threads_do_not_matter() -> None:
    model, base = task_vector((700, 999), 3, [torch.bfloat16, torch.bfloat16], 0)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append([select_largest(model, base, 6993), select_largest(model, base, 9, by_row=True)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one.indices, two.indices)
            assert torch.equal(one.values, two.values)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 400), min_size=1, max_size=5),
    levels=st.sampled_from([0, 1, 4]),
    seed=st.integers(0, 1000),
    share=st.floats(0, 1.1),
)
def test_model_scope_is_tensor_scope_of_all_tensors_in_a_row(
    sizes: list[int], levels: int, seed: int, share: float
) -> None:
    pairs = [task_vector((n,), seed + n, [torch.float32, torch.bfloat16], levels) for n in sizes]
    k = int(share * sum(sizes))
    selector = ModelSelector()
    for model, base in pairs:
        selector.count(model, base)
    for model, base in pairs:
        selector.collect(model, base, k)
    whole = torch.cat([difference(model, base) for model, base in pairs])
    for wanted in (k, k // 3):
        indices, values, start = [], [], 0
        for n, selection in zip(sizes, selector.finish(wanted), strict=True):
            indices += [start + index for index in selection.indices.tolist()]
            values += selection.values.tolist()
            start += n
        assert (indices, values) == expected(whole, wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_non_finite_entry_is_always_selected(backend: str, bad: float) -> None:
    model = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    model[4321] = bad
    assert 4321 in select_largest(model, torch.zeros(5000), 3, backend=backend).indices.tolist()


def test_nan_ranks_above_infinity(backend: str) -> None:
    v = torch.tensor([1.0, float("inf"), float("nan"), -3.0])
    assert select_largest(v, torch.zeros(4), 1, backend=backend).indices.tolist() == [2]
    assert select_largest(v, torch.zeros(4), 2, backend=backend).indices.tolist() == [1, 2]


def test_without_removes_a_nested_selection() -> None:
    model, base = task_vector((50, 20), 1, [torch.float32, torch.float32], 2)
    more, fewer = select_largest(model, base, 100), select_largest(model, base, 40)
    rest = more.without(fewer)
    assert rest.indices.tolist() == sorted(set(more.indices.tolist()) - set(fewer.indices.tolist()))
    assert torch.equal(rest.values, difference(model, base).reshape(-1)[rest.indices])


def test_a_negative_k_is_refused() -> None:
    with pytest.raises(ArgumentError, match="k must not be negative"):
        select_largest(torch.ones(3), torch.ones(3), -1)
