"""The largest singular values of a matrix and their vectors, by subspace iteration.

A few products with the matrix (arXiv 0909.4061, algorithm 4.4) from a start that is always the same. Everything is in
float64, a block of rows at a time, so that memory is that of a few thin matrices beside the given one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..methods.spectra import singular_triplets

EXACT = 1024  # shortest side up to which an eigendecomposition of the Gram matrix is cheap
_ITERATIONS = 3
_MORE = 8  # directions that are followed beside those asked for
_BLOCK = 1 << 22  # entries that are converted to float64 at a time


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
        basis = _subspace(matrix, count + _MORE)
        small, values, right = singular_triplets(_transposed_times(matrix, basis).t(), count, exact=True)
        left = basis @ small
    kept = values > 0
    left, values, right = left[:, kept], values[kept], right[kept]
    sign = left.gather(0, left.abs().argmax(0, keepdim=True)).sign() if len(values) else left[:1]
    return left * sign, values, right * sign.t()


def spectral_norm(matrix: Tensor) -> float:
    """The largest singular value of [H, W], rounded to float32, which hides the order in which threads add up."""
    basis = _subspace(matrix, min(1 + _MORE, *matrix.shape))
    return float(torch.linalg.matrix_norm(_transposed_times(matrix, basis), 2).float())


def _subspace(matrix: Tensor, width: int) -> Tensor:
    """An orthonormal basis [H, width] of about where the matrix is largest."""
    start = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = _orthonormal(_times(matrix, start.to(matrix.device)))
    for _ in range(_ITERATIONS):
        basis = _orthonormal(_times(matrix, _orthonormal(_transposed_times(matrix, basis))))
    return basis


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def _times(matrix: Tensor, thin: Tensor) -> Tensor:
    return torch.cat([rows.double() @ thin for rows in _blocks(matrix)])


def _transposed_times(matrix: Tensor, thin: Tensor) -> Tensor:
    total = thin.new_zeros(matrix.shape[1], thin.shape[1])
    start = 0
    for rows in _blocks(matrix):
        total += rows.t().double() @ thin[start : start + len(rows)]
        start += len(rows)
    return total


def _blocks(matrix: Tensor) -> Iterator[Tensor]:
    yield from torch.split(matrix, max(1, _BLOCK // matrix.shape[1]))
