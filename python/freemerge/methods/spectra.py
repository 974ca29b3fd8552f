"""Singular vectors and polar factors of matrices, and what the methods that are made of them share.

Everything goes over the float64 Gram matrix of the shorter side, A A^T or A^T A, which costs one symmetric
eigendecomposition of that side instead of a singular value decomposition, and runs on batches [..., H, W] and on any
device that has float64. Squaring halves the digits: a singular value s is found to about 1e-16 (s_1 / s)^2 of itself,
s_1 the largest. Directions below ``RANK_TOLERANCE`` s_1 are treated as zero, so the relative error is at most about
1e-6, at s = 1e-5 s_1, and below the rounding of float32 task vectors for all s over 1e-4 s_1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..lazy import torch
from .base import Measured, Merged, Method
from .rules import projection_scale
from .vectors import TaskVectors

if TYPE_CHECKING:
    from torch import Tensor

RANK_TOLERANCE = 1e-5


def singular_triplets(matrix: Tensor, count: int, size: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` largest singular values with their vectors: U [..., H, n], s [..., n], V^T [..., n, W], float64.

    A singular value below ``RANK_TOLERANCE`` of the largest (or of ``size``, one number a matrix) is zero, and so are
    its vectors: which basis of the null space a decomposition happens to return must not matter.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    wide = (matrix.mT if tall else matrix).double()
    squares, left = torch.linalg.eigh(wide @ wide.mT)
    values, left = squares.flip(-1)[..., :count].clamp(min=0).sqrt(), left.flip(-1)[..., :count]
    kept = values > RANK_TOLERANCE * (values[..., :1] if size is None else size[..., None])
    values, left = values.where(kept, 0.0), left.where(kept[..., None, :], 0.0)
    right = (left * values.reciprocal().where(kept, 0.0)[..., None, :]).mT @ wide
    return (right.mT, values, left.mT) if tall else (left, values, right)


def polar_factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """U V^T of the singular value decomposition U diag(s) V^T, and s, both float64.

    The polar factor is the closest matrix with orthonormal rows or columns. Of a rank-deficient matrix it is the
    closest partial isometry: directions below ``RANK_TOLERANCE`` are left out.
    """
    left, values, right = singular_triplets(matrix, min(matrix.shape[-2:]))
    return left @ right, values


def united(triplets: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets of several matrices of one shape as one, with bases made orthogonal by polar factors."""
    lefts, values, rights = zip(*triplets, strict=True)
    return polar_factor(torch.cat(lefts, -1))[0], torch.cat(values, -1), polar_factor(torch.cat(rights, -2))[0]


def mean_of_nonzero(values: Tensor) -> Tensor:
    """The mean over the last axis of those singular values that are not zero; 0 where all are."""
    return values.sum(-1) / (values > 0).sum(-1).clamp(min=1)


class SpectralMethod(Method):
    """A method that combines matrices by their singular vectors and averages everything else, as the papers do.

    The default scale is found from the weights (:func:`freemerge.methods.rules.projection_scale`), for which every
    unit is merged once more; name a scale to save that.
    """

    def default_scale(self, count: int) -> float | None:
        return None

    def measure_scale(self, units: Iterable[TaskVectors]) -> float:
        squares: list[float] = []
        overlaps: list[float] = []
        for vectors in units:
            sums = [torch.zeros(()) for _ in vectors.tensors]
            merged = self._combined(vectors, _watched(vectors.each(), sums, squares))
            overlaps += [float((total.double() * tensor).sum()) for total, tensor in zip(sums, merged, strict=True)]
        return projection_scale(squares, overlaps)

    def merge(self, vectors: TaskVectors, measured: Measured) -> Merged:
        return Merged(self._combined(vectors, vectors.each()))

    def _combined(self, vectors: TaskVectors, each: Iterator[list[Tensor]]) -> list[Tensor]:
        """The merged task vector of each member, from the task vectors of each model."""
        if not vectors.as_matrices or any(len(tensor.shape) < 2 for tensor in vectors.tensors):
            total, count = add_up(each)
            return [tensor.div_(count) for tensor in total]
        return self.combine(vectors, each)

    @abstractmethod
    def combine(self, vectors: TaskVectors, each: Iterator[list[Tensor]]) -> list[Tensor]:
        """The merged task vector of each member, from the task vectors of each model, seen as matrices."""


def add_up(each: Iterator[list[Tensor]]) -> tuple[list[Tensor], int]:
    """The sum of the task vectors of all models, one tensor a member, and the number of models."""
    total = next(each)
    count = 1
    for deltas in each:
        count += 1
        for tensor, delta in zip(total, deltas, strict=True):
            tensor.add_(delta)
    return total, count


def replace_matrices(vectors: TaskVectors, deltas: list[Tensor], merged: Iterable[Tensor]) -> list[Tensor]:
    """``deltas``, with the matrices that they make up overwritten."""
    matrices = vectors.matrices(deltas)
    for matrix, new in zip(matrices, merged, strict=True):
        matrix.copy_(new)
    vectors.unstack(matrices, deltas)
    return deltas


def _watched(each: Iterator[list[Tensor]], sums: list[Tensor], squares: list[float]) -> Iterator[list[Tensor]]:
    """The same task vectors; their sums and squared norms are taken on the way."""
    from ..accumulate import norm

    for deltas in each:
        squares.append(norm(deltas) ** 2)
        for i, delta in enumerate(deltas):
            sums[i] = sums[i].to(delta.device) + delta
        yield deltas
