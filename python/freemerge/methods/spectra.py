"""Singular vectors and polar factors of matrices, and what the methods that are made of them share.

How they are found is decided in :func:`left_vectors`: by a range finder that looks for low rank and proves it, by the
singular value decomposition where a merge has float64 arithmetic, else by the eigenvectors of the float64 Gram matrix
of the shorter side, A A^T or A^T A. The last costs a third of a decomposition, and less than Newton's or
Newton-Schulz's iteration for a polar factor (an eigendecomposition takes the time of 6 products of its size; each of
their 7 to 20 steps takes 2 or 3). All run on batches [..., H, W] and on any device that has float64.

Squaring halves the digits: a Gram matrix gives a singular value s to about 1e-16 (s_1 / s)^2 of itself, s_1 the
largest. Directions below ``RANK_TOLERANCE`` s_1 are treated as zero, so the relative error is at most about 1e-6, at
s = 1e-5 s_1, and below the rounding of float32 task vectors for all s over 1e-4 s_1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..lazy import torch
from .base import Measured, Merged, Method
from .vectors import Sides, TaskVectors, added

if TYPE_CHECKING:
    from torch import Tensor

RANK_TOLERANCE = 1e-5
SKETCHED_SHARE = 16  # of the shorter side: the rank that a range finder looks for, at a tenth of the cost of the rest
SMALLEST_SKETCH = 16  # smaller matrices are decomposed in no time
POWER_STEPS = 2
BACKWARD_ERROR = 1e-7  # of the smallest singular value, half the rounding of float32
BLOCK = 1024  # columns in float64 at a time
STRIPES = 8  # of a Gram matrix, each of which is formed up to the diagonal
SMALLEST_STRIPE = 128
AVERAGE_HOLDS = 4  # what averaging allocates, and finding the scale (:meth:`Method.holds`)


def left_vectors(wide: Tensor, count: int, exact: bool, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The left singular vectors U [..., H, n] and values s [..., n] of a matrix with H <= W, float64, n <= ``count``.

    They belong to the largest singular values, of which those below ``RANK_TOLERANCE`` of the largest (or of ``size``,
    one number a matrix) are zero, and so are their vectors: which basis of the null space a decomposition happens to
    return must not matter.

    ``exact``: to the rounding of float64, at three times the cost.
    """
    sketched = low_rank(wide, size)
    if sketched is not None:
        left, values = sketched
    elif exact:
        left, values, _ = torch.linalg.svd(wide.double(), full_matrices=False)
    else:
        squares, left = torch.linalg.eigh(_lower_gram(wide))
        values, left = squares.flip(-1).clamp(min=0).sqrt(), left[..., -count:].flip(-1)
    return _nonzero(left[..., :count].contiguous(), values[..., :count], size)


def low_rank(wide: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """The same for a matrix whose rank is at most a sixteenth of H, such as a LoRA update; None if it is not.

    A randomised range finder (Halko, Martinsson and Tropp, arXiv 0909.4061) with a bound that is computed afterwards,
    so that nothing depends on luck: all that it has not found has a norm below ``RANK_TOLERANCE`` of s_1, and is zero;
    and U, s and V are exact for a matrix that differs by at most ``BACKWARD_ERROR`` of the smallest singular value.
    """
    columns = wide.shape[-2] // SKETCHED_SHARE
    if columns < SMALLEST_SKETCH:
        return None
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(wide.shape[-1], columns, generator=generator, dtype=torch.float64, device="cpu").mT
    basis = subspace(wide, start, POWER_STEPS)
    inner, values, right = torch.linalg.svd(left_times(basis, wide), full_matrices=False)
    left, values = _nonzero(basis.mT @ inner, values, size)
    smallest = values.where(values > 0, float("inf")).amin(-1)
    residual = (
        _times(wide, right[..., : values.shape[-1], :].mT) * (values > 0)[..., None, :] - left * values[..., None, :]
    )
    left_out = (squared_norm(wide) - values.square().sum(-1)).clamp(min=0).sqrt()
    zero = RANK_TOLERANCE * (values[..., 0] if size is None else size)
    found = (left_out <= zero) & (torch.linalg.matrix_norm(residual) <= BACKWARD_ERROR * smallest)
    return (left, values) if bool(found.all()) else None


def subspace(matrix: Tensor, start: Tensor, steps: int) -> Tensor:
    """Orthonormal rows [..., n, H] that span about where a matrix [..., H, W] is largest, float64.

    Subspace iteration (arXiv 0909.4061, algorithm 4.4) from the rows ``start`` [n, W]. Thin matrices are held as rows,
    by which products run several times faster.
    """
    basis = orthonormal(left_times(start.to(matrix.device), matrix.mT))
    for _ in range(steps):
        basis = orthonormal(left_times(orthonormal(left_times(basis, matrix)), matrix.mT))
    return basis


def singular_triplets(
    matrix: Tensor, count: int, exact: bool, size: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values with their vectors: U [..., H, n], s [..., n], V^T [..., n, W], float64.

    n is ``count``, or less if no matrix of a batch has so many that are not zero (see :func:`left_vectors`).
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    wide = matrix.mT if tall else matrix
    left, values = left_vectors(wide, count, exact, size)
    right = left_times((left * _inverse(values)[..., None, :]).mT, wide)
    return (right.mT, values, left.mT) if tall else (left, values, right)


def polar_factor(matrix: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """U V^T of the singular value decomposition U diag(s) V^T, and s without zeros, both float64.

    The polar factor is the closest matrix with orthonormal rows or columns. Of a rank-deficient matrix it is the
    closest partial isometry: directions below ``RANK_TOLERANCE`` are left out.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    wide = matrix.mT if tall else matrix
    left, values = left_vectors(wide, wide.shape[-2], exact)
    left.mul_(wide.any(-1, keepdim=True))  # rows of zeros, as of padding in a batch, stay exactly that
    scaled = (left * _inverse(values)[..., None, :]).mT
    if 2 * scaled.shape[-2] > scaled.shape[-1]:  # U diag(1/s) U^T first is cheaper
        left = left @ scaled
        del scaled
        factor = left_times(left, wide)
    else:
        factor = left @ left_times(scaled, wide)
    return factor.mT if tall else factor, values


def united(triplets: Sequence[tuple[Tensor, Tensor, Tensor]], exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets of several matrices of one shape as one, with bases made orthogonal by polar factors."""
    lefts, values, rights = zip(*triplets, strict=True)
    left, _ = polar_factor(torch.cat(lefts, -1), exact)
    right, _ = polar_factor(torch.cat(rights, -2), exact)
    return left, torch.cat(values, -1), right


def mean_of_nonzero(values: Tensor) -> Tensor:
    """The mean over the last axis of those singular values that are not zero; 0 where all are."""
    return values.sum(-1) / (values > 0).sum(-1).clamp(min=1)


def squareness(matrix: Sides) -> float:
    """The shorter side over the longer one: of the size of a matrix, that of a Gram matrix."""
    return min(matrix) / max(matrix)


def left_times(left: Tensor, matrix: Tensor) -> Tensor:
    """``left @ matrix`` in float64, of which ``left`` is; the matrix is not copied as a whole."""
    product = left.new_empty(*matrix.shape[:-2], left.shape[-2], matrix.shape[-1])
    for part, block in zip(torch.split(product, BLOCK, -1), torch.split(matrix, BLOCK, -1), strict=True):
        part.copy_(left @ block.double())
    return product


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows [..., n, W] that span the given ones, n <= W."""
    basis: Tensor = torch.linalg.qr(rows.mT).Q.mT
    return basis


def _times(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix @ right`` in float64, likewise."""
    products = (
        a.double() @ b for a, b in zip(torch.split(matrix, BLOCK, -1), torch.split(right, BLOCK, -2), strict=True)
    )
    return _added(products)


def _lower_gram(wide: Tensor) -> Tensor:
    """A A^T on and below the diagonal in float64, likewise."""
    height = wide.shape[-2]
    gram = wide.new_zeros(*wide.shape[:-2], height, height, dtype=torch.float64)
    for block in torch.split(wide, BLOCK, -1):
        add_lower_gram_(gram, block.double())
    return gram


def add_lower_gram_(gram: Tensor, rows: Tensor) -> None:
    """Add A A^T of some rows [..., n, W] to ``gram`` [..., n, n] on and below the diagonal, and somewhat above it.

    An eigendecomposition looks at no more, and it is little more than half of the products.
    """
    height = rows.shape[-2]
    for begin in range(0, height, step := max(SMALLEST_STRIPE, -(-height // STRIPES))):
        end = min(begin + step, height)
        gram[..., begin:end, :end] += rows[..., begin:end, :] @ rows[..., :end, :].mT


def gram_of(rows: Tensor) -> Tensor:
    """A A^T of some rows [..., n, W], the whole of it."""
    gram = rows.new_zeros(*rows.shape[:-1], rows.shape[-2])
    add_lower_gram_(gram, rows)
    lower: Tensor = gram.tril()
    return lower + gram.tril(-1).mT


def squared_norm(wide: Tensor) -> Tensor:
    """The squared norm of each matrix in float64, likewise."""
    return _added(block.double().square().sum((-2, -1)) for block in torch.split(wide, BLOCK, -1))


def _added(terms: Iterator[Tensor]) -> Tensor:
    total = next(terms)
    for term in terms:
        total += term
    return total


def _nonzero(left: Tensor, values: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Without those that are zero in all matrices, and at least one."""
    kept = values > RANK_TOLERANCE * (values[..., :1] if size is None else size[..., None])
    if bool(kept.all()):
        return left, values
    most = max(1, int(kept.sum(-1).max()))
    return left[..., :most].where(kept[..., None, :most], 0.0), values[..., :most].where(kept[..., :most], 0.0)


def _inverse(values: Tensor) -> Tensor:
    return values.reciprocal().where(values > 0, 0.0)


class SpectralMethod(Method):
    """A method that combines matrices by their singular vectors and averages everything else, as the papers do.

    The default scale is found from the weights (:meth:`Method.measure_scale`), for which every unit is merged once
    more; name a scale to save that.
    """

    def default_scale(self, count: int) -> float | None:
        return None

    def merge(self, vectors: TaskVectors, measured: Measured) -> Merged:
        if not self.averages(vectors):
            return Merged(self.combine(vectors))
        return Merged([total.div_(vectors.count) for total in added(vectors.each())])

    def averages(self, vectors: TaskVectors) -> bool:
        """Whether the members of a unit are averaged, because they are no matrices to this method."""
        return not vectors.as_matrices or any(len(tensor.shape) < 2 for tensor in vectors.tensors)

    @abstractmethod
    def combine(self, vectors: TaskVectors) -> list[Tensor]:
        """The merged task vector of each member of a unit of matrices."""


def stacked_matrices(vectors: TaskVectors) -> tuple[list[Tensor], list[Tensor]]:
    """The linear maps of all models, [K, ..., H, W] for each of a unit, and the task vectors that were read last.

    The latter are there for :func:`replace_matrices` to overwrite.
    """
    stacks: list[Tensor] = []
    for model, deltas in enumerate(vectors.each()):
        matrices = vectors.linear_maps(deltas)
        if not stacks:
            stacks = [matrix.new_empty(vectors.count, *matrix.shape) for matrix in matrices]
        for stack, matrix in zip(stacks, matrices, strict=True):
            stack[model] = matrix
    return stacks, deltas


def summed_matrices(vectors: TaskVectors) -> tuple[list[Tensor], list[Tensor]]:
    """The linear maps of the sum of all models in float64, and the task vectors that were read last, likewise.

    What float32 would round off the sum, relative to its largest singular value s_1, turns the vectors of another, s,
    by s_1 / s times as much.
    """
    sums: list[Tensor] = []
    for deltas in vectors.each():
        sums = sums or [delta.new_zeros(delta.shape, dtype=torch.float64) for delta in deltas]
        for total, delta in zip(sums, deltas, strict=True):
            total.add_(delta)
    return vectors.linear_maps(sums), deltas


def replace_matrices(vectors: TaskVectors, deltas: list[Tensor], merged: Iterable[Tensor]) -> list[Tensor]:
    """``deltas``, with the linear maps that they make up overwritten."""
    matrices = vectors.matrices(deltas)
    for matrix, new in zip(vectors.turned(matrices), merged, strict=True):
        matrix.copy_(new)
    vectors.unstack(matrices, deltas)
    return deltas
