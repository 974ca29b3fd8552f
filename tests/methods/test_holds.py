"""What a method says that it holds in memory is no less than what it allocates, and not far more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from allocations import peak_bytes

from freemerge.methods import METHODS, Method
from freemerge.methods.filtered import Filter, Filtered
from freemerge.methods.vectors import TaskVectors
from freemerge.methods.whole import Whole
from in_memory import deltas

FIXED = 16 << 20  # half of what is allowed, with units that are no larger
MATRICES: dict[str, tuple[list[tuple[int, ...]], tuple[int, ...]]] = {
    "square": ([(240, 240)], ()),
    "wide": ([(96, 500)], ()),
    "tall": ([(500, 96)], ()),
    "row": ([(1, 40000)], ()),
    "few rows": ([(3, 16000)], ()),
    "large enough for a range finder": ([(260, 300)], ()),
    "stack": ([(100, 240), (140, 240)], ()),
    "split": ([(240, 240)], (60, 180)),
    "batch": ([(4, 130, 130)], ()),
    "wide, as inputs by outputs": ([(500, 96)], ()),
    "tall, as inputs by outputs": ([(96, 500)], ()),
}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in METHODS),
    ("ties", {"scope": "tensor"}),
    ("pcb", {"scope": "tensor"}),
    ("dare", {"sign_election": True}),
    ("fr", {"scope": "tensor", "stats": "filtered"}),
    ("fr", {"align": True, "sign_election": True}),
    ("wudi", {"rank": 0.5}),
]


def unit(
    shapes: list[tuple[int, ...]],
    count: int,
    dtype: torch.dtype,
    *,
    parts: tuple[int, ...] = (),
    transposed: bool = False,
) -> TaskVectors:
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for i, shape in enumerate(shapes):
        base = torch.randn(shape, generator=generator, dtype=dtype)
        models = [base + 0.1 * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]
        tensors.append(deltas(f"t{i}", base, models, [], transposed=transposed))
    return TaskVectors(tuple(tensors), len(shapes[0]) > 1, parts)


def allocated(method: Method, vectors: TaskVectors, count: int) -> int:
    """Bytes allocated while a model of one unit is measured and merged."""

    whole = Whole(lambda: [vectors])

    def work() -> None:
        method.merge(vectors, method.measure(whole, count))
        if method.default_scale(count) is None:
            method.measure_scale(whole)

    work()  # tables of filters are made once
    return peak_bytes(work)


def entries(vectors: TaskVectors) -> int:
    return sum(tensor.numel for tensor in vectors.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_matrices(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    method = METHODS[name](**options)
    shares = []
    for count in (1, 5):
        for kind, (shapes, parts) in MATRICES.items() if method.sees_matrices else ():
            transposed = kind.endswith("inputs by outputs")
            vectors = unit(shapes, count, dtype, parts=parts, transposed=transposed)
            size = entries(vectors) * dtype.itemsize
            taken = allocated(method, vectors, count)
            sides = (max(parts, default=sum(shape[-2] for shape in shapes)), shapes[0][-1])
            declared = method.holds(count, sides[::-1] if transposed else sides)
            assert taken <= declared * size + (1 << 14)
            shares.append(taken / (declared * size))
    if shares and dtype == torch.float32:
        assert max(shares) > 0.5, "no more than is needed"


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_other_tensors(name: str, options: dict[str, Any], count: int) -> None:
    vectors = unit([(1 << 22,)], count, torch.float32)
    size = 4 * entries(vectors)
    method = METHODS[name](**options)
    if count < method.fewest:
        return
    declared = method.holds(count, None)
    taken = allocated(method, vectors, count)
    assert taken <= declared * size + FIXED
    assert taken > 0.5 * declared * size, "no more than is needed"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["average", "ties", "pcb", "dare", "iso_c"])
def test_a_filter_around_a_method(name: str, when: Any) -> None:
    method = Filtered(METHODS[name](), Filter(when))
    for shapes, parts in MATRICES.values():
        vectors = unit(shapes, 3, torch.float32, parts=parts)
        sides = (max(parts, default=sum(shape[-2] for shape in shapes)), shapes[0][-1])
        fixed = FIXED if name in ("ties", "pcb") else 1 << 14  # histograms
        assert allocated(method, vectors, 3) <= method.holds(3, sides) * 4 * entries(vectors) + fixed
