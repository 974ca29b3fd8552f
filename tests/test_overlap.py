"""Which tensors share memory: every pair that does, and no other, in few exact tests."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import freemerge as fm
from freemerge.overlap import overlapping_pair, overlapping_pairs

SLICES = st.tuples(st.integers(0, 9), st.integers(1, 10), st.integers(1, 4)).map(
    lambda s: slice(s[0], s[0] + s[1], s[2])
)


@settings(deadline=None, max_examples=200)
@given(
    views=st.lists(st.tuples(st.integers(0, 2), SLICES, SLICES, SLICES, st.booleans()), min_size=2, max_size=12),
    last=st.sampled_from([1, 3, 10]),
)
def test_exactly_the_pairs_that_share_an_element_are_found(
    views: list[tuple[int, slice, slice, slice, bool]], last: int
) -> None:
    memory = [torch.zeros(10, 10, last), torch.zeros(10, 10, last).bfloat16(), torch.zeros(100 * last)]
    tensors = []
    for which, rows, columns, third, turned in views:
        view = memory[which].view(10, 10, last)[rows, columns, third if last > 1 else slice(None)]
        tensors.append(view.transpose(0, 1) if turned else view)
    tensors = [tensor for tensor in tensors if tensor.numel()]
    arrays = [tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy() for tensor in tensors]
    expected = {(i, j) for i, j in combinations(range(len(arrays)), 2) if np.shares_memory(arrays[i], arrays[j])}
    found = [*overlapping_pairs(tensors)]
    assert len(found) == len(expected)
    assert {*found} == expected


@pytest.mark.parametrize("kind", ["columns", "blocks of columns", "blocks", "last axis"])
def test_interleaved_views_take_no_test_of_every_pair(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(32, 480)
    views = {
        "columns": whole.unbind(1),
        "blocks of columns": whole.split(2, dim=1),
        "blocks": [block for rows in whole.split(4) for block in rows.split(6, dim=1)],
        "last axis": whole[:, :400].unflatten(1, (10, 40)).unbind(2),
    }[kind]
    tests, exact = [], np.shares_memory
    monkeypatch.setattr(np, "shares_memory", lambda *both: (tests.append(both), exact(*both))[1])
    fm.filter_([*views], fm.HighPass(0.1))
    assert len(tests) < len(views)
    assert overlapping_pair([*views, whole[3:4, 7:9]]) is not None


def test_expanded_tensors() -> None:
    a = torch.zeros(9, 8)
    assert [*overlapping_pairs([a[:1].expand(4, 8), a[:8], a[8:].expand(3, 8)])] == [(0, 1)]
