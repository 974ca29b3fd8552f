"""TSV-Merge (arXiv 2412.00081): the strongest singular directions of each task, made orthogonal to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..lazy import torch
from .spectra import AVERAGE_HOLDS, SpectralMethod, replace_matrices, singular_triplets, squareness, united
from .vectors import Sides, TaskVectors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TSVM(SpectralMethod):
    """TSV-M: the top min(H, W) / K singular triplets of each v_i; U diag(s) V^T of all, with U and V made orthogonal.

    Orthogonal bases are the polar factors of the concatenated ones. Tensors that are no matrices are averaged.
    """

    name = "tsv_m"
    title = "TSV-M"
    paper = "2412.00081"
    regained = 0.8  # measured, see docs/methods.md: what is cut off need not be made up for by what is kept
    strengthened = 1.7

    def holds(self, count: int, matrix: Sides | None) -> float:
        if matrix is None:
            return AVERAGE_HOLDS
        return max(15 + 6 * squareness(matrix), 8 * count / min(matrix) + 3)  # each task keeps at least one direction

    def combine(self, vectors: TaskVectors) -> list[Tensor]:
        count = vectors.count
        found: list[list[tuple[Tensor, Tensor, Tensor]]] = []
        for deltas in vectors.each():
            exact = deltas[0].dtype == torch.float64
            matrices = vectors.linear_maps(deltas)
            kept = [max(1, min(matrix.shape[-2:]) // count) for matrix in matrices]
            found.append([singular_triplets(matrix, n, exact) for matrix, n in zip(matrices, kept, strict=True)])
        return replace_matrices(vectors, deltas, (_joined(parts, exact) for parts in zip(*found, strict=True)))


def _joined(triplets: tuple[tuple[Tensor, Tensor, Tensor], ...], exact: bool) -> Tensor:
    left, values, right = united(triplets, exact)
    return left * values[..., None, :] @ right
