"""Singular values of task vectors, and how far their strongest directions coincide."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from ..dense import without_autocast
from ..methods.spectra import RANK_TOLERANCE, singular_triplets
from .sums import RANKS, SingularSums

EXACT_SIDE = 1024  #: a matrix with a longer shorter side is not decomposed, only its strongest directions are found
LEADING = 64  #: how many of them
DIRECTIONS = 16  #: directions of each task vector that are compared, at most, and n / K of the shorter side n

_SPARE, _ITERATIONS = 16, 8  # of the subspace iteration on the Gram matrix

Triplets = tuple[Tensor, Tensor, Tensor]


def singular_sums(vectors: Sequence[Tensor], tasks: int) -> SingularSums:
    """Sums over the matrices of one tensor.

    ``vectors``: [..., H, W] or [n], the first ``tasks`` are task vectors. Zero matrices are left out.
    """
    sums = SingularSums.zeros(tasks, len(vectors) - tasks)
    shape = vectors[0].shape if vectors[0].ndim > 1 else (1, *vectors[0].shape)
    stacks = [vector.reshape(-1, *shape[-2:]) for vector in vectors]
    side = min(shape[-2:])
    count = min(DIRECTIONS, max(1, side // tasks))
    for matrices in zip(*stacks, strict=True):
        directions: dict[int, Triplets] = {}
        for v, matrix in enumerate(matrices):
            norm = float(torch.linalg.vector_norm(matrix.double()))
            if norm == 0:
                continue
            with without_autocast(matrix.device):
                (left, values, right), fourth, complete = _decomposed(matrix / norm)
            energy = values.square()
            sums.matrices[v] += 1
            sums.stable[v] += 1 / float(energy[0]) / side
            sums.effective[v] += 1 / fourth / side
            found = energy.cumsum(0)
            for r, rank in enumerate(RANKS):
                if complete or rank <= len(found):
                    sums.top[v, r] += norm**2 * float(found[min(rank, len(found)) - 1])
                    sums.known[v, r] += norm**2
            if v < tasks:
                kept = min(count, int((values > 0).sum()))
                directions[v] = left[:, :kept], values[:kept], right[:kept]
        for i, j in combinations(directions, 2):
            beyond = [_beyond_chance(directions[i][end], directions[j][end], end == 2) for end in (0, 2)]
            known = [overlap for overlap in beyond if overlap is not None]
            if known:
                sums.overlap[[i, j], [j, i]] += sum(known) / len(known)
                sums.pairs[[i, j], [j, i]] += 1
    return sums


def _decomposed(matrix: Tensor) -> tuple[Triplets, float, bool]:
    """Singular triplets of a matrix of norm 1, the strongest first, the sum of all s^4, and whether these are all."""
    side = min(matrix.shape)
    if side <= EXACT_SIDE:
        triplets = singular_triplets(matrix, side, exact=False)
        return triplets, float(triplets[1].pow(4).sum()), True
    tall = matrix.shape[0] > side
    wide = matrix.mT if tall else matrix
    gram = wide @ wide.mT
    start = torch.randn(
        side, LEADING + _SPARE, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    )
    basis = start.to(gram)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(gram @ basis).Q
    squares, inner = torch.linalg.eigh((basis.mT @ gram @ basis).double())
    values = squares.flip(-1)[:LEADING].clamp(min=0).sqrt()
    kept = values > RANK_TOLERANCE * values[0]
    left = (basis.double() @ inner.flip(-1)[:, :LEADING]).where(kept, 0.0)
    right = (left * values.reciprocal().where(kept, 0.0)).mT @ wide.double()
    fourth = float(torch.linalg.vector_norm(gram, dtype=torch.float64)) ** 2
    return ((right.mT, values, left.mT) if tall else (left, values, right)), fourth, False


def _beyond_chance(first: Tensor, second: Tensor, rows: bool) -> float | None:
    """The mean squared cosine of the angles between two subspaces, 0 for random ones and 1 where one holds the other.

    Bases as columns, or as ``rows``. None where the larger one is the whole space.
    """
    first, second = (first.mT, second.mT) if rows else (first, second)
    small, large = sorted((first.shape[1], second.shape[1]))
    chance = large / first.shape[0]
    if chance >= 1:
        return None
    shared = float((first.mT @ second).square().sum()) / small
    return (shared - chance) / (1 - chance)
