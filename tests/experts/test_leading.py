"""Leading singular values against numpy's decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from freemerge.experts import leading
from freemerge.experts.leading import leading_triplets, spectral_norm
from in_memory import noise

SHAPES = [(1, 1), (1, 13), (13, 1), (7, 5), (40, 37), (211, 300), (600, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_spectral_norm_is_found_from_below(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = noise(*shape).to(dtype)
    true = np.linalg.norm(matrix.double().numpy(), 2)
    assert 0.97 * true <= spectral_norm(matrix) <= true * (1 + 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_dominant_direction_is_found_to_rounding(shape: tuple[int, int]) -> None:
    matrix = 0.01 * noise(*shape)
    matrix += 10 * torch.outer(noise(shape[0], 1)[:, 0], noise(shape[1], 1, seed=1)[:, 0])
    assert spectral_norm(matrix) == pytest.approx(np.linalg.norm(matrix.double().numpy(), 2), rel=1e-6)


def test_nothing_has_no_direction() -> None:
    assert spectral_norm(torch.zeros(5, 3)) == 0
    assert [part.shape for part in leading_triplets(torch.zeros(5, 3), 2)] == [(5, 0), (0,), (0, 3)]


@given(
    height=st.integers(1, 60), width=st.integers(1, 60), count=st.integers(1, 5), seed=st.integers(0, 99),
    exact=st.booleans(),
)  # fmt: skip
def test_triplets_are_those_of_numpy(height: int, width: int, count: int, seed: int, exact: bool) -> None:
    # Singular values that halve, so that iteration must find what the decomposition does.
    left, _ = np.linalg.qr(noise(height, min(height, width), seed=seed).double().numpy())
    right, _ = np.linalg.qr(noise(width, min(height, width), seed=seed + 1).double().numpy())
    values = 0.5 ** np.arange(min(height, width))
    matrix = torch.from_numpy(left * values @ right.T)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leading, "EXACT", 1 << 30 if exact else 0)
        u, s, v = leading_triplets(matrix, count)
    n = min(count, height, width)
    np.testing.assert_allclose(s.numpy(), values[:n], rtol=1e-6)
    expected = left[:, :n] * values[:n] @ right[:, :n].T
    np.testing.assert_allclose(((u * s) @ v).numpy(), expected, atol=1e-5)
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    assert u.t() @ u == pytest.approx(np.eye(n), abs=1e-6)


def test_iteration_keeps_most_of_the_energy_of_a_slowly_falling_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    left, _ = torch.linalg.qr(noise(500, 400).double())
    right, _ = torch.linalg.qr(noise(400, 400, seed=1).double())
    values = torch.arange(1, 401).double() ** -0.5
    monkeypatch.setattr(leading, "EXACT", 0)
    matrix = (left * values) @ right.t()
    u, s, v = leading_triplets(matrix, 20)
    assert (s <= values[:20] * (1 + 1e-9)).all()
    assert float(s.square().sum()) >= 0.98 * float(values[:20].square().sum())
    assert float((matrix - (u * s) @ v).square().sum()) <= 1.01 * float(values[20:].square().sum())
