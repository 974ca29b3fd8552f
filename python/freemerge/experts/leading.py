"""The largest singular values of a matrix and their vectors, by subspace iteration.

In float64; the matrix is not copied as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..methods.spectra import left_times, singular_triplets, subspace

EXACT = 1024  # shortest side up to which an eigendecomposition of the Gram matrix is cheap
_ITERATIONS = 3
_MORE = 8  # directions that are followed beside those asked for


def leading_triplets(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` largest singular values of [H, W]: U [H, n], s [n] falling and V^T [n, W], n <= count, in float64.

    Where the matrix is small or most of it is asked for, they are exact (:func:`singular_triplets`); values that are
    zero are left out. Otherwise a value is never above the true one, and below it by a few percent at most unless many
    are nearly equal. In each component, the entry of U of largest magnitude is positive.
    """
    shortest = min(matrix.shape)
    if shortest <= EXACT or 4 * (count + _MORE) >= shortest:
        left, values, right = singular_triplets(matrix, count, exact=matrix.dtype == torch.float64)
    else:
        basis = _leading_rows(matrix, count + _MORE)
        small, values, right = singular_triplets(left_times(basis, matrix), count, exact=True)
        left = basis.mT @ small
    kept = values > 0
    left, values, right = left[:, kept], values[kept], right[kept]
    sign = left.gather(0, left.abs().argmax(0, keepdim=True)).sign() if len(values) else left[:1]
    return left * sign, values, right * sign.t()


def spectral_norm(matrix: Tensor) -> float:
    """The largest singular value of [H, W], rounded to float32, which hides the order in which threads add up."""
    basis = _leading_rows(matrix, min(1 + _MORE, *matrix.shape))
    return float(torch.linalg.matrix_norm(left_times(basis, matrix), 2).float())


def _leading_rows(matrix: Tensor, width: int) -> Tensor:
    """Orthonormal rows [width, H] that span about where the matrix is largest, from a start that is always the same."""
    start = torch.randn(
        width, matrix.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"
    )
    return subspace(matrix, start, _ITERATIONS)
