"""Isotropic merging (arXiv 2502.04959): the merged matrix has equal singular values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..lazy import torch
from .parameters import parameter, share
from .spectra import (
    AVERAGE_HOLDS,
    SpectralMethod,
    mean_of_nonzero,
    polar_factor,
    replace_matrices,
    singular_triplets,
    squareness,
    summed_matrices,
    united,
)
from .vectors import Sides, TaskVectors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class IsoC(SpectralMethod):
    """Iso-C: U S V^T = sum_i v_i becomes mean(S) U V^T, which has the same nuclear norm; other tensors are averaged.

    The mean is over the non-zero singular values, so that a sum of low rank, as of LoRA adapters, keeps its rank.
    """

    name = "iso_c"
    title = "Iso-C"
    paper = "2502.04959"

    def holds(self, count: int, matrix: Sides | None) -> float:
        return AVERAGE_HOLDS if matrix is None else 12 + 2 * squareness(matrix)

    def combine(self, vectors: TaskVectors) -> list[Tensor]:
        sums, deltas = summed_matrices(vectors)
        exact = deltas[0].dtype == torch.float64
        return replace_matrices(vectors, deltas, (_isotropic(matrix, exact) for matrix in sums))


@dataclass(frozen=True)
class IsoCTS(SpectralMethod):
    """Iso-CTS: as Iso-C, but the weakest directions of the sum give way to the strongest ones of each task.

    Those are of what is left of v_i outside the directions that stay. All are made orthogonal by the polar factor.
    Each unit is read twice: for the sum and for what is left.

    Attributes:
        common: share of the directions that come from the sum, rounded so that every task has as many as the others.
    """

    name = "iso_cts"
    title = "Iso-CTS"
    paper = "2502.04959"
    by_inputs = True

    common: float = parameter(0.8, "share of the singular directions that come from the sum", kind=share())

    def reads(self, as_matrices: bool) -> int:
        return 2 if as_matrices else 1

    def holds(self, count: int, matrix: Sides | None) -> float:
        return AVERAGE_HOLDS if matrix is None else 18 + 6 * squareness(matrix)

    def combine(self, vectors: TaskVectors) -> list[Tensor]:
        count = vectors.count
        sums, deltas = summed_matrices(vectors)
        exact = deltas[0].dtype == torch.float64
        own = [self._own(min(matrix.shape[-2:]), count) for matrix in sums]
        found = [
            [singular_triplets(matrix, min(matrix.shape[-2:]) - count * directions, exact)]
            for matrix, directions in zip(sums, own, strict=True)
        ]
        del sums
        for deltas in vectors.each() if any(own) else ():
            for matrix, directions, triplets in zip(vectors.linear_maps(deltas), own, found, strict=True):
                shared = triplets[0][0]
                rest = matrix.double() - shared @ (shared.mT @ matrix.double())
                triplets.append(singular_triplets(rest, directions, exact, torch.linalg.matrix_norm(matrix.double())))
        return replace_matrices(vectors, deltas, (_joined(triplets, exact) for triplets in found))

    def _own(self, rank: int, count: int) -> int:
        """The number of directions that each task contributes, as in the released code."""
        return min(rank // count, round((rank - int(rank * self.common)) / count))


def _isotropic(matrix: Tensor, exact: bool) -> Tensor:
    factor, values = polar_factor(matrix, exact)
    return factor * mean_of_nonzero(values)[..., None, None]


def _joined(triplets: list[tuple[Tensor, Tensor, Tensor]], exact: bool) -> Tensor:
    left, values, right = united(triplets, exact)
    return left @ right * mean_of_nonzero(values)[..., None, None]
