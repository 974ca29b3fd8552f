"""Singular triplets and polar factors over the Gram matrix, against a singular value decomposition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from freemerge.methods.spectra import (
    RANK_TOLERANCE,
    add_lower_gram_,
    low_rank,
    mean_of_nonzero,
    polar_factor,
    singular_triplets,
)
from in_memory import noise

SHAPES = [(12, 30), (30, 12), (16, 16), (1, 9), (9, 1), (3, 20, 17), (2, 2, 5, 6)]


def with_spectrum(height: int, width: int, values: Tensor) -> Tensor:
    left, _ = torch.linalg.qr(noise(height, len(values)).double())
    right, _ = torch.linalg.qr(noise(width, len(values), seed=1).double())
    return left * values @ right.mT


@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_decomposition(shape: tuple[int, ...]) -> None:
    matrix = noise(*shape)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    n = max(1, min(shape[-2:]) // 2)
    own_left, own, own_right = singular_triplets(matrix, n, exact=False)
    torch.testing.assert_close(own, values[..., :n], rtol=1e-12, atol=0)
    best = left[..., :n] * values[..., None, :n] @ right[..., :n, :]
    torch.testing.assert_close(own_left * own[..., None, :] @ own_right, best, rtol=0, atol=1e-10)
    factor, everything = polar_factor(matrix, exact=False)
    torch.testing.assert_close(everything, values, rtol=1e-8, atol=0)
    torch.testing.assert_close(factor, left @ right, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", [(40, 25), (25, 40)])
def test_the_stated_error(shape: tuple[int, int]) -> None:
    values = torch.logspace(0, -4.9, 25, dtype=torch.float64)
    matrix = with_spectrum(*shape, values)
    left, found, right = singular_triplets(matrix, 25, exact=False)
    error = (found / values - 1).abs()
    assert float(error.max()) < 1e-5
    assert float(error[values > 1e-4].max()) < 6e-8, "below the rounding of float32"
    for basis in (left, right.mT):
        gram = basis.mT @ basis
        torch.testing.assert_close(gram, torch.eye(25, dtype=torch.float64), rtol=0, atol=1e-5)
    exact = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(polar_factor(matrix, exact=False)[0], exact[0] @ exact[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_what_is_below_the_tolerance_is_left_out(rank: int) -> None:
    values = torch.ones(9, dtype=torch.float64)
    values[rank:] = 0.1 * RANK_TOLERANCE if rank else 0.0
    matrix = with_spectrum(9, 14, values)
    left, found, right = torch.linalg.svd(matrix)
    factor, own = polar_factor(matrix, exact=False)
    assert int((own > 0).sum()) == rank
    torch.testing.assert_close(factor, left[:, :rank] @ right[:rank], rtol=0, atol=1e-10)
    assert float(mean_of_nonzero(own)) == pytest.approx(float(found[:rank].sum()) / max(1, rank))
    # Relative to something larger, nothing is left.
    assert not singular_triplets(matrix, 3, False, torch.tensor(1e6))[1].any()


# The range finder


def low_rank_update(shape: tuple[int, ...], rank: int, full: float = 0.0) -> Tensor:
    """As a LoRA adapter makes it; ``full``: what is of full rank, relative to its entries."""
    update = noise(*shape[:-1], rank) @ noise(*shape[:-2], rank, shape[-1], seed=1)
    return update + full * float(update.std()) * noise(*shape, seed=2)


@pytest.mark.parametrize("shape", [(256, 300), (300, 256), (260, 2100), (2, 256, 270)])
@pytest.mark.parametrize("rank", [0, 1, 5, 16])
@pytest.mark.parametrize("full", [0.0, 1e-7])
def test_low_rank_is_found_and_proved(shape: tuple[int, ...], rank: int, full: float) -> None:
    matrix = low_rank_update(shape, rank, full)
    tall = shape[-2] > shape[-1]
    wide = matrix.mT if tall else matrix
    found = low_rank(wide)
    assert found is not None
    exact_left, exact, exact_right = torch.linalg.svd(wide.double(), full_matrices=False)
    left, values = found
    assert values.shape[-1] == max(1, rank)
    torch.testing.assert_close(values[..., :rank], exact[..., :rank], rtol=1e-9, atol=0)
    projector = exact_left[..., :rank] @ exact_left[..., :rank].mT
    torch.testing.assert_close(left @ left.mT, projector, rtol=0, atol=1e-7)
    expected = exact_left[..., :rank] @ exact_right[..., :rank, :]
    torch.testing.assert_close(
        polar_factor(matrix, exact=False)[0], expected.mT if tall else expected, rtol=0, atol=1e-6
    )
    own_left, own, own_right = singular_triplets(matrix, 40, exact=False)
    torch.testing.assert_close(own_left * own[..., None, :] @ own_right, matrix.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("matrix", "why"),
    [
        (low_rank_update((256, 300), 17), "its rank is larger than the sketch"),
        (noise(256, 300), "its rank is full"),
        (low_rank_update((256, 300), 3, full=1e-3), "what is left out is not zero"),
        (torch.stack([low_rank_update((256, 300), 3), noise(256, 300)]), "one of a batch is not"),
        (low_rank_update((255, 300), 3), "it is small"),
    ],
)
def test_what_the_bound_does_not_allow_is_decomposed(matrix: Tensor, why: str) -> None:
    assert low_rank(matrix) is None, why
    values = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(polar_factor(matrix, exact=False)[1][..., :3], values[..., :3], rtol=1e-9, atol=0)


def test_a_direction_that_the_sketch_resolves_badly_is_not_accepted() -> None:
    """Singular values down to the tolerance, with noise below it: the vectors would be off, and nobody would know."""
    values = torch.cat([torch.tensor([1.0, 1e-4, 2e-5]), torch.full((253,), 5e-7)]).double()
    wide = with_spectrum(256, 300, values)
    found = low_rank(wide)
    if found is not None:
        exact = torch.linalg.svd(wide)[0][:, :3]
        torch.testing.assert_close(found[0] @ found[0].mT, exact @ exact.mT, rtol=0, atol=1e-6)
    worse = with_spectrum(256, 300, torch.cat([values[:3], torch.full((253,), 9e-6).double()]))
    assert low_rank(worse) is None


def test_float64_is_decomposed_as_it_is() -> None:
    """A Gram matrix would find the smallest singular value to 1e-6 of itself only."""
    values = torch.logspace(0, -4.9, 25, dtype=torch.float64)
    own = singular_triplets(with_spectrum(40, 25, values), 25, exact=True)[1]
    torch.testing.assert_close(own, values, rtol=1e-10, atol=0)
    rounded = singular_triplets(with_spectrum(40, 25, values), 25, exact=False)[1]
    assert float((rounded / values - 1).abs().max()) > 1e-10


@pytest.mark.parametrize("height", [1, 127, 128, 129, 300, 1025])
def test_a_gram_matrix_is_whole_on_and_below_the_diagonal(height: int) -> None:
    for rows in (noise(2, height, 40).double(), noise(2, 40, height, seed=1).double().mT):
        gram = torch.ones(2, height, height, dtype=torch.float64)
        add_lower_gram_(gram, rows)
        torch.testing.assert_close(gram.tril(), (1 + rows @ rows.mT).tril(), rtol=1e-13, atol=1e-12)
        values = torch.linalg.eigvalsh(gram)
        torch.testing.assert_close(values, torch.linalg.eigvalsh(1 + rows @ rows.mT), rtol=1e-12, atol=1e-9)
