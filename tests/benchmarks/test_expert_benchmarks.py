"""What is done to experts, measured on small tensors: the benchmarks run, and check what they time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import freemerge as fm
from benchmarks import experts, harness, kernels

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_turns(works: Mapping[str, Callable[[], object]], *_: Any, **__: Any) -> dict[str, list[float]]:
        return {name: [1.0] for name, work in works.items() if (work(), True)}

    monkeypatch.setattr(harness, "in_turns", in_turns)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_measured(dtype: torch.dtype) -> None:
    assert kernels.selection((30, 200), dtype)["select_ratio"] == 1.0
    assert kernels.accumulate((30, 40), dtype, 3)["models"] == 3


@pytest.mark.parametrize("values", experts.sparse_codings())
def test_every_coding_of_entries_is_measured(values: str) -> None:
    assert kernels.codec(values, shape=(40, 90))["values"] == values


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_switch_is_measured_if_it_switches(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert experts.switching(dtype, layers=1)["parameters"] == 2304 * 2305
    monkeypatch.setattr(fm.ExpertBank, "active", lambda bank, name: nullcontext())
    with pytest.raises(AssertionError):
        experts.switching(dtype, layers=1)


def test_a_batch_of_several_experts_is_measured() -> None:
    assert experts.routing(2, 3, 4)["soft_ratio"] == 1.0
