"""WUDI-Merging in closed form (arXiv 2503.08099, 2606.07289): the merged matrix interferes least with each task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..lazy import torch
from .interference import Interference
from .layers import is_embedding
from .parameters import number, parameter, share
from .spectra import (
    AVERAGE_HOLDS,
    SpectralMethod,
    add_lower_gram_,
    gram_of,
    left_times,
    low_rank,
    orthonormal,
    replace_matrices,
    stacked_matrices,
)
from .vectors import Sides, TaskVectors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class WUDI(SpectralMethod):
    """WUDI: the matrix X that minimises ``sum_i ||(X - v_i) v_i^T||^2 / ||v_i||^2``, regularised.

    The rows of v_i, [outputs, inputs], stand for the inputs of task i.
    With A = sum_i v_i^T v_i / ||v_i||^2 and B = sum_i v_i v_i^T v_i / ||v_i||^2 the minimum has X A = B. Small
    eigenvalues of A carry noise, so X starts from sum_i v_i and goes only a share 1 - exp(-t lambda) of the way along
    each eigenvector: where gradient descent is after time t. A has trace K, whatever the size of the task vectors.

    Embeddings and tensors that are no matrices are averaged: the papers are about linear layers.

    Attributes:
        steps: t in units of 1 / lambda_1, about the number of gradient steps of that length.
        rank: share of the eigenvectors, those of the largest eigenvalues, along which X moves at all.
    """

    name = "wudi"
    title = "WUDI-Merging"
    paper = "2503.08099"
    by_inputs = True

    steps: float = parameter(100.0, "time of the gradient flow, in units of 1 / lambda_1", kind=number(0, 1e12))
    rank: float = parameter(1.0, "share of the eigenvectors that are corrected", kind=share())

    def holds(self, count: int, matrix: Sides | None) -> float:
        if matrix is None:
            return AVERAGE_HOLDS
        height, width = matrix
        side = min(width, count * height)  # of A
        square = side * side / (height * width)
        decomposition = 32 / height  # LAPACK's work space for a few long rows
        return max(count + 21 + 6.5 * square, 6 * count + 5 + 8.5 * square * (side < width)) + decomposition

    def strength(self, least: Interference) -> float:
        return least.cosine  # measured, docs/methods.md: the more still interferes, the less of it

    def combine(self, vectors: TaskVectors) -> list[Tensor]:
        stacks, deltas = stacked_matrices(vectors)
        return replace_matrices(vectors, deltas, map(self._least_interference, stacks))

    def averages(self, vectors: TaskVectors) -> bool:
        return any(is_embedding(tensor.name) for tensor in vectors.tensors) or super().averages(vectors)

    def _least_interference(self, tasks: Tensor) -> Tensor:
        """X [..., H, W] of the task vectors [K, ..., H, W], in float64."""
        norms = torch.linalg.matrix_norm(tasks, dtype=torch.float64)
        shares = norms.reciprocal().where(norms > 0, 0.0)[..., None, None]
        width = tasks.shape[-1]
        rows = _row_space(tasks, shares)
        if rows is not None:  # X has its rows there, too
            tasks = torch.stack([left_times(rows, task.mT).mT for task in tasks])
        total = tasks.sum(0, dtype=torch.float64)
        gram = total.new_zeros(*total.shape[:-2], total.shape[-1], total.shape[-1])
        downhill = torch.zeros_like(total)
        tall = total.shape[-2] >= total.shape[-1]  # v_i^T v_i is no larger than v_i then
        for task, part in zip(tasks, shares, strict=True):
            inputs = task.double() * part
            if tall:
                own = gram_of(inputs.mT)
                gram += own
                downhill += (task - total) @ own
            else:
                add_lower_gram_(gram, inputs.mT)
                downhill += (task - total) @ inputs.mT @ inputs
        values, directions = torch.linalg.eigh(gram)
        way = self._way(values, round(self.rank * width))
        merged = total.add_((downhill @ directions).mul_(way[..., None, :]) @ directions.mT)
        return merged if rows is None else merged @ rows

    def _way(self, values: Tensor, corrected: int) -> Tensor:
        """The integral of exp(-s lambda) over s from 0 to t for each eigenvalue, ascending; 0 for all but the last."""
        largest = values[..., -1:].where(values[..., -1:] > 0, 1.0)
        values = (values / largest).clamp(min=0)
        way = torch.where(values > 0, -torch.expm1(-self.steps * values) / values, self.steps) / largest
        way[..., : max(0, values.shape[-1] - corrected)] = 0.0
        return way


def _row_space(tasks: Tensor, shares: Tensor) -> Tensor | None:
    """Orthonormal rows [..., n, W] that span those of all task vectors, if they are fewer than W."""
    stacked = (tasks * shares.to(tasks.dtype)).movedim(0, -3).flatten(-3, -2)
    height, width = stacked.shape[-2:]
    found = low_rank(stacked if height < width else stacked.mT)
    if found is not None:
        rows = left_times(found[0].mT, stacked) if height < width else found[0].mT
    elif height < width:
        rows = stacked.double()
    else:
        return None
    return orthonormal(rows)
