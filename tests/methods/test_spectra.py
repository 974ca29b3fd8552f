"""Singular triplets and polar factors over the Gram matrix, against a singular value decomposition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from freemerge.methods.spectra import RANK_TOLERANCE, mean_of_nonzero, polar_factor, singular_triplets

SHAPES = [(12, 30), (30, 12), (16, 16), (1, 9), (9, 1), (3, 20, 17), (2, 2, 5, 6)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(height: int, width: int, values: Tensor) -> Tensor:
    left, _ = torch.linalg.qr(normal(height, len(values)).double())
    right, _ = torch.linalg.qr(normal(width, len(values), seed=1).double())
    return left * values @ right.mT


@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_decomposition(shape: tuple[int, ...]) -> None:
    matrix = normal(*shape)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    n = max(1, min(shape[-2:]) // 2)
    own_left, own, own_right = singular_triplets(matrix, n)
    torch.testing.assert_close(own, values[..., :n], rtol=1e-12, atol=0)
    best = left[..., :n] * values[..., None, :n] @ right[..., :n, :]
    torch.testing.assert_close(own_left * own[..., None, :] @ own_right, best, rtol=0, atol=1e-10)
    factor, everything = polar_factor(matrix)
    torch.testing.assert_close(everything, values, rtol=1e-8, atol=0)
    torch.testing.assert_close(factor, left @ right, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", [(40, 25), (25, 40)])
def test_the_stated_error(shape: tuple[int, int]) -> None:
    values = torch.logspace(0, -4.9, 25, dtype=torch.float64)
    matrix = with_spectrum(*shape, values)
    left, found, right = singular_triplets(matrix, 25)
    error = (found / values - 1).abs()
    assert float(error.max()) < 1e-5
    assert float(error[values > 1e-4].max()) < 6e-8, "below the rounding of float32"
    for basis in (left, right.mT):
        gram = basis.mT @ basis
        torch.testing.assert_close(gram, torch.eye(25, dtype=torch.float64), rtol=0, atol=1e-5)
    exact = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(polar_factor(matrix)[0], exact[0] @ exact[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_what_is_below_the_tolerance_is_left_out(rank: int) -> None:
    values = torch.ones(9, dtype=torch.float64)
    values[rank:] = 0.1 * RANK_TOLERANCE if rank else 0.0
    matrix = with_spectrum(9, 14, values)
    left, found, right = torch.linalg.svd(matrix)
    factor, own = polar_factor(matrix)
    assert int((own > 0).sum()) == rank
    torch.testing.assert_close(factor, left[:, :rank] @ right[:rank], rtol=0, atol=1e-10)
    assert float(mean_of_nonzero(own)) == pytest.approx(float(found[:rank].sum()) / max(1, rank))
    # Relative to something larger, nothing is left.
    assert not singular_triplets(matrix, 3, torch.tensor(1e6))[1].any()
