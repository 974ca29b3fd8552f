"""Each rival method against its paper's formula, written out entry by entry in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.quality import rivals
from benchmarks.quality.rivals import TaskVector


@pytest.fixture
def vectors() -> list[TaskVector]:
    generator = torch.Generator().manual_seed(7)
    shapes = {"layer.weight": (12, 8), "layer.bias": (12,), "head.weight": (5, 8)}
    return [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(3)]


def flat(vector: TaskVector) -> np.ndarray:
    return np.concatenate([tensor.double().numpy().ravel() for tensor in vector.values()])


def close(actual: Tensor | np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(actual, dtype=np.float64), expected, rtol=2e-5, atol=2e-6)


def test_flattening_is_undone(vectors: list[TaskVector]) -> None:
    again = rivals.unflatten(rivals.flatten(vectors[0]), vectors[0])
    assert all(torch.equal(again[name], tensor) for name, tensor in vectors[0].items())


def test_emr_entry_by_entry(vectors: list[TaskVector]) -> None:
    values = np.array([flat(vector) for vector in vectors])
    elected = []
    for column in values.T:
        sign = np.sign(column.sum())
        elected.append(sign * max([abs(v) for v in column if np.sign(v) == sign], default=0.0))
    merged = rivals.emr(vectors)
    for own, result in zip(values, merged.vectors, strict=True):
        masked = np.where(own * elected > 0, elected, 0.0)
        close(flat(result), np.abs(own).sum() / np.abs(masked).sum() * masked)
    assert merged.bytes_per_task == math.ceil(values.shape[1]) / 8 + 4


def test_inputs_are_not_modified(vectors: list[TaskVector]) -> None:
    before = [flat(vector) for vector in vectors]
    rivals.emr(vectors)
    assert all(np.array_equal(flat(vector), old) for vector, old in zip(vectors, before, strict=True))
