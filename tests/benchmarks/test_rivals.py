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


def test_average_and_task_arithmetic(vectors: list[TaskVector]) -> None:
    total = sum(flat(vector) for vector in vectors)
    close(flat(rivals.average(vectors)), total / 3)
    close(flat(rivals.task_arithmetic(vectors)), total)


def test_keep_largest_is_exact_in_number() -> None:
    x = torch.tensor([0.0, -3.0, 2.0, 1.0, -2.5])
    assert rivals.keep_largest(x, 0.4).tolist() == [0.0, -3.0, 0.0, 0.0, -2.5]
    assert rivals.keep_largest(x, 0.0).tolist() == [0.0] * 5


def test_ties_entry_by_entry(vectors: list[TaskVector]) -> None:
    trimmed = []
    for vector in vectors:
        values = flat(vector)
        threshold = np.sort(np.abs(values))[-round(0.3 * values.size)]
        trimmed.append(np.where(np.abs(values) >= threshold, values, 0.0))
    expected = []
    for entries in zip(*trimmed, strict=True):
        sign = np.sign(sum(entries))
        agreeing = [value for value in entries if value != 0 and np.sign(value) == sign]
        expected.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    close(flat(rivals.ties(vectors, density=0.3)), np.array(expected))


def test_dare_keeps_rescaled_entries_and_the_expectation(vectors: list[TaskVector]) -> None:
    values = flat(vectors[0])
    kept = flat(rivals.dare(vectors[:1], drop=0.75, seed=3))
    assert set(np.unique(np.round(kept[kept != 0] / values[kept != 0], 4))) == {4.0}
    mean = np.mean([flat(rivals.dare(vectors[:1], drop=0.75, seed=seed)) for seed in range(4000)], axis=0)
    np.testing.assert_allclose(mean, values, atol=0.45)  # 5 sigma of |v| sqrt(3 / 4000) at |v| = 3
    assert np.abs(mean - values).mean() < 0.05


def test_dare_is_seeded(vectors: list[TaskVector]) -> None:
    first, again, other = (flat(rivals.dare(vectors, seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_pcb_formula(vectors: list[TaskVector]) -> None:
    def norm(x: np.ndarray) -> np.ndarray:
        return (x - x.min()) / (x.max() - x.min())

    def softmax(x: np.ndarray) -> np.ndarray:
        return np.exp(x) / np.exp(x).sum()

    values = [flat(vector) for vector in vectors]
    numerator = denominator = 0.0
    for own in values:
        beta = softmax(3 * norm(own * own)) * sum(softmax(norm(own * other)) for other in values)
        threshold = np.sort(beta)[-round(0.4 * beta.size)]
        beta = np.where(beta >= threshold, beta, 0.0)
        numerator, denominator = numerator + beta * own, denominator + beta
    expected = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
    close(flat(rivals.pcb(vectors, density=0.4)), expected)


def test_iso_c_flattens_the_spectrum_of_the_sum(vectors: list[TaskVector]) -> None:
    merged = rivals.iso_c(vectors)
    total = sum(vector["layer.weight"].double() for vector in vectors)
    left, values, right = np.linalg.svd(total.numpy(), full_matrices=False)
    close(merged["layer.weight"], left @ np.diag(np.full(8, values.mean())) @ right)
    close(merged["layer.bias"], sum(vector["layer.bias"].double().numpy() for vector in vectors) / 3)


def test_tsv_m_whitens_the_concatenated_singular_vectors(vectors: list[TaskVector]) -> None:
    rank = 8 // 3
    parts = [np.linalg.svd(vector["layer.weight"].double().numpy(), full_matrices=False) for vector in vectors]
    left = np.concatenate([u[:, :rank] for u, _, _ in parts], axis=1)
    right = np.concatenate([vh[:rank] for _, _, vh in parts], axis=0)
    values = np.concatenate([s[:rank] for _, s, _ in parts])

    def inverse_root(gram: np.ndarray) -> np.ndarray:
        eigenvalues, eigenvectors = np.linalg.eigh(gram)
        return eigenvectors @ np.diag(eigenvalues**-0.5) @ eigenvectors.T

    # U (U^T U)^(-1/2) is the closest orthonormal matrix: the paper's whitening, by another route than the code's.
    left = left @ inverse_root(left.T @ left)
    right = inverse_root(right @ right.T) @ right
    np.testing.assert_allclose(rivals.tsv_m(vectors)["layer.weight"], left @ np.diag(values) @ right, atol=2e-5)


def test_tsv_m_of_one_task_is_that_task(vectors: list[TaskVector]) -> None:
    close(rivals.tsv_m(vectors[:1])["layer.weight"], vectors[0]["layer.weight"].double().numpy())


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


def test_twin_svd_and_its_storage(vectors: list[TaskVector]) -> None:
    shared = rivals.average(vectors)
    twin = rivals.twin_svd(vectors, shared, rank=2)
    exclusive = (vectors[1]["layer.weight"] - shared["layer.weight"]).double().numpy()
    left, values, right = np.linalg.svd(exclusive, full_matrices=False)
    expected = shared["layer.weight"].double().numpy() + left[:, :2] @ np.diag(values[:2]) @ right[:2]
    close(twin.vectors[1]["layer.weight"], expected)
    assert torch.equal(twin.vectors[1]["layer.bias"], shared["layer.bias"])
    assert twin.bytes_per_task == 2 * (2 * (12 + 8) + 2 * (5 + 8))


def test_twin_svd_of_full_rank_restores_the_matrices(vectors: list[TaskVector]) -> None:
    twin = rivals.twin_svd(vectors, rivals.average(vectors), rank=8)
    close(twin.vectors[2]["layer.weight"], vectors[2]["layer.weight"].double().numpy())


def test_inputs_are_not_modified(vectors: list[TaskVector]) -> None:
    before = [flat(vector) for vector in vectors]
    shared = rivals.average(vectors)
    for method in (rivals.task_arithmetic, rivals.ties, rivals.dare, rivals.pcb, rivals.iso_c, rivals.tsv_m):
        method(vectors)
    rivals.emr(vectors)
    rivals.twin_svd(vectors, shared, 1)
    assert all(np.array_equal(flat(vector), old) for vector, old in zip(vectors, before, strict=True))
