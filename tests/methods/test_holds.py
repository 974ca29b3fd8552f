"""What a method says that it holds in memory is no less than what it allocates, and not far more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from allocations import peak_bytes

from freemerge.methods import METHODS
from freemerge.methods.vectors import TaskVectors
from in_memory import deltas

FIXED = 8 << 20  # half of what is allowed, with units that are no larger
MATRICES: dict[str, tuple[list[tuple[int, ...]], tuple[int, ...]]] = {
    "square": ([(240, 240)], ()),
    "wide": ([(96, 500)], ()),
    "tall": ([(500, 96)], ()),
    "row": ([(1, 40000)], ()),
    "stack": ([(100, 240), (140, 240)], ()),
    "split": ([(240, 240)], (60, 180)),
    "batch": ([(4, 130, 130)], ()),
}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in METHODS),
    ("ties", {"scope": "tensor"}),
    ("pcb", {"scope": "tensor"}),
    ("fr", {"scope": "tensor", "stats": "filtered"}),
    ("fr", {"align": True, "sign_election": True}),
]


def unit(shapes: list[tuple[int, ...]], count: int, dtype: torch.dtype, *, parts: tuple[int, ...] = ()) -> TaskVectors:
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for i, shape in enumerate(shapes):
        base = torch.randn(shape, generator=generator, dtype=dtype)
        models = [base + 0.1 * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]
        tensors.append(deltas(f"t{i}", base, models, []))
    return TaskVectors(tuple(tensors), len(shapes[0]) > 1, parts)


def allocated(name: str, options: dict[str, Any], vectors: TaskVectors, count: int) -> int:
    """Bytes allocated while a model of one unit is measured and merged."""
    method = METHODS[name](**options)

    def work() -> None:
        method.merge(vectors, method.measure([vectors], count))
        if method.default_scale(count) is None:
            method.measure_scale([vectors])

    work()  # tables of filters are made once
    return peak_bytes(work)


def entries(vectors: TaskVectors) -> int:
    return sum(tensor.numel for tensor in vectors.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_matrices(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    count = 3
    declared = METHODS[name](**options).holds(count, True)
    matrices = MATRICES if METHODS[name].sees_matrices else {}
    shares = []
    for shapes, parts in matrices.values():
        vectors = unit(shapes, count, dtype, parts=parts)
        size = entries(vectors) * dtype.itemsize
        taken = allocated(name, options, vectors, count)
        assert taken <= declared * size + (1 << 14)
        shares.append(taken / (declared * size))
    if matrices and dtype == torch.float32:
        assert max(shares) > 0.45, "no more than is needed"


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_other_tensors(name: str, options: dict[str, Any], count: int) -> None:
    vectors = unit([(1 << 21,)], count, torch.float32)
    size = 4 * entries(vectors)
    declared = METHODS[name](**options).holds(count, False)
    taken = allocated(name, options, vectors, count)
    assert taken <= declared * size + FIXED
    assert taken > 0.5 * declared * size, "no more than is needed"
