"""Joint singular vectors: one pair of orthonormal bases in which every task vector is nearly diagonal.

It is freemerge's own, made so that each task can be told apart in the merged matrix again: experts with
``values="gains"`` (:mod:`freemerge.experts.gains`) keep one number for each singular direction of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..lazy import torch
from .spectra import (
    AVERAGE_HOLDS,
    SpectralMethod,
    left_times,
    mean_of_nonzero,
    polar_factor,
    replace_matrices,
    singular_triplets,
    squared_norm,
    squareness,
    stacked_matrices,
    united,
)
from .vectors import Sides, TaskVectors

if TYPE_CHECKING:
    from torch import Tensor


TURNS = 3  # of each basis; the diagonals then have 97 % of the energy that they get in the end
SPREAD = 0.5  # of singular values around their mean


@dataclass(frozen=True)
class JSV(SpectralMethod):
    """JSV: U diag(s) V^T, where U and V maximise ``sum_i ||d_i||^2 / ||v_i||^2`` with d_i the diagonal of U^T v_i V.

    The bases start from TSV-M's, the top min(H, W) / K singular vectors of each v_i made orthogonal, and take turns:
    with one and all d_i fixed, the other is a polar factor. s falls evenly from 1.5 to .5 times the mean of
    ``(sum_i d_ik^2)^.5``, in the order of these: nearly as flat as in Iso-C, but far enough apart for the directions to
    be found again. Each s_k has the sign of ``sum_i d_ik``. Where tasks share directions, there are fewer of them than
    min(H, W). Tensors that are no matrices are averaged.
    """

    name = "jsv"
    title = "Joint singular vectors"
    by_inputs = True
    regained = 0.85  # measured, see docs/methods.md

    def holds(self, count: int, matrix: Sides | None) -> float:
        if matrix is None:
            return AVERAGE_HOLDS
        crowded = 6.5 * count + 3 if count > min(matrix) else 0.0  # all tasks' rows side by side, see _start()
        return max(2 * count + 15 + 6 * squareness(matrix), crowded)

    def combine(self, vectors: TaskVectors) -> list[Tensor]:
        stacks, deltas = stacked_matrices(vectors)
        return replace_matrices(vectors, deltas, map(_joined, stacks))


def _joined(tasks: Tensor) -> Tensor:
    """U diag(s) V^T [..., H, W] of the task vectors [K, ..., H, W], in float64."""
    changed = tasks.flatten(-2).any(-1).reshape(len(tasks), -1)
    if (changed != changed[:, :1]).any():  # matrices of a batch share their directions among other tasks then
        return torch.stack([_joined(part) for part in tasks.unbind(1)])
    left, right = _bases(tasks)
    diagonals = torch.stack([_diagonal(left_times(left.mT, task), right) for task in tasks])
    lengths = torch.linalg.vector_norm(diagonals, dim=0)
    values = _spaced(lengths).copysign(diagonals.sum(0))  # with the majority, where tasks are opposed
    merged: Tensor = left * values[..., None, :] @ right
    return merged


def _spaced(lengths: Tensor) -> Tensor:
    """Singular values in the order of the lengths, evenly spaced, with the mean of those that are not zero."""
    places = lengths.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1).float()
    last = ((lengths > 0).sum(-1, keepdim=True) - 1).clamp(min=1)
    values = 1 + SPREAD - 2 * SPREAD * places / last
    return values * mean_of_nonzero(lengths)[..., None] * (lengths > 0)


def _bases(tasks: Tensor) -> tuple[Tensor, Tensor]:
    """U [..., H, n] and V^T [..., n, W]."""
    exact = tasks.dtype == torch.float64
    squares = torch.stack([squared_norm(task) for task in tasks])
    shares = squares.reciprocal().where(squares > 0, 0.0)[..., None]
    left, right = _start(tasks, shares, exact)
    for _ in range(TURNS):
        right = _turned(tasks, left.mT, right, shares, exact)
        left = _turned(tasks.mT, right, left.mT, shares, exact).mT
    return left, right


def _start(tasks: Tensor, shares: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    rank = min(tasks.shape[-2:])
    changed = [task for task in tasks if task.any()]  # others need no directions
    if len(changed) <= rank:
        own = rank // max(1, len(changed))
        left, _, right = united([singular_triplets(task, own, exact) for task in changed or tasks[:1]], exact)
        return left, right
    # More tasks than directions: the strongest of all columns, and of all rows, which unlike a sum cannot cancel.
    equal = list(tasks * shares.sqrt()[..., None].to(tasks.dtype))
    left, _, _ = singular_triplets(torch.cat(equal, -1), rank, exact)
    _, _, right = singular_triplets(torch.cat(equal, -2), rank, exact)
    count = min(left.shape[-1], right.shape[-2])
    return left[..., :count], right[..., :count, :]


def _turned(tasks: Tensor, fixed: Tensor, turned: Tensor, shares: Tensor, exact: bool) -> Tensor:
    """The basis [..., n, W] that suits the other one, ``fixed`` [..., n, H], where ``turned`` gives the diagonals."""
    total = torch.zeros_like(turned)
    for task, share in zip(tasks, shares, strict=True):
        seen = left_times(fixed, task)
        total += seen.mul_((share * _diagonal(seen, turned))[..., None])
    return polar_factor(total, exact)[0]


def _diagonal(rows: Tensor, basis: Tensor) -> Tensor:
    """The inner product of each row with the same row of ``basis``."""
    products: Tensor = (rows * basis).sum(-1)
    return products
