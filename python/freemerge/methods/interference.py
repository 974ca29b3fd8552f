"""The scale at which what was merged interferes least with the tasks, from the weights alone.

A linear layer's task vector v_i [out, in] works on inputs that lie, as far as the weights can tell, in its own row
space; a convolution's, [out, in * kernel], on patches. What a merged X does to them instead of v_i is
(c X - v_i) v_i^T, the interference of WUDI-Merging (arXiv 2503.08099). The c that minimises the sum of
||(c X - v_i) v_i^T||^2 / ||v_i||^4 over tensors and tasks is a quotient of two sums. Each is over pairs of rows, and
estimated from some of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..lazy import torch
from .vectors import TaskVectors

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 128  # of each matrix; more change the scale by about a hundredth
DIGITS = 6  # of what is measured, which the last bits of a matrix product then do not change
BALANCE = 2.2  # tasks, see Interference.emphasis; measured, docs/methods.md

Terms = tuple[float, float, float, float, float]
"""<X v_i^T, v_i v_i^T>, ||X v_i^T||^2, ||v_i v_i^T||^2, and the first two with sum_j v_j for X; all over ||v_i||^4."""


@dataclass(frozen=True)
class Interference:
    """What the weights of ``count`` models tell of what was merged.

    Attributes:
        scale: the c at which it interferes least.
        cosine: of the angle between all X v_i^T and all v_i v_i^T, each over ||v_i||^2: 1 without interference.
        tasks: to how many tasks that have nothing in common the models come: ``count`` times the c of sum_i v_i, which
            is 1 / ``count`` where all are the same.
    """

    count: int
    scale: float
    cosine: float
    tasks: float

    @property
    def emphasis(self) -> float:
        """By how much more than ``scale`` helps what is merged entry by entry, as measured: more where the tasks have
        less in common. It leaves sum_i v_i between the average of the models and their sum, and as it is where they are
        all the same or have nothing in common."""
        least = min(1.0, max(1 / self.tasks, self.tasks / self.count))
        most = max(1.0, self.count / self.tasks)
        return min(max(math.sqrt(self.tasks / BALANCE), least), most)


def interference_terms(vectors: TaskVectors, merge: Callable[[], Sequence[Tensor]]) -> list[Terms]:
    """The terms of each matrix and model of a unit; none for vectors. Reads the unit once, and as ``merge`` does."""
    if all(len(tensor.shape) < 2 for tensor in vectors.tensors):
        return []
    own = [[_rows(matrix) for matrix in vectors.linear_maps(deltas)] for deltas in vectors.each()]
    sums = [sum(models[1:], models[0]) for models in zip(*([rows for rows, _ in model] for model in own), strict=True)]
    merged = [_rows(matrix) for matrix in vectors.linear_maps(merge())]
    return [
        _terms(x, total, v, height)
        for model in own
        for (x, height), total, (v, _) in zip(merged, sums, model, strict=True)
    ]


def least_interference(terms: Iterable[Terms], count: int) -> Interference | None:
    """What the terms of ``count`` models say; None where what was merged has nothing in common with them."""
    found = list(terms)
    gain, cost, own, gain_of_sum, cost_of_sum = (math.fsum(term[i] for term in found) for i in range(5))
    if not gain > 1e-6 * own:  # nor where sums overflowed
        return None
    tasks = count * gain_of_sum / cost_of_sum if gain_of_sum > 1e-6 * own else 1.0
    cosine = gain / math.sqrt(cost * own)
    return Interference(count, *(float(f"{x:.{DIGITS}g}") for x in (gain / cost, cosine, tasks)))


def sampled(count: int, rows: int) -> float:
    """What the samples of ``count`` models take, in copies of a float32 matrix of so many rows."""
    return 2 * (count + 2) * min(1.0, ROWS / max(1, rows))


def _rows(matrix: Tensor) -> tuple[Tensor, int]:
    """Some rows [..., n, W] in float64, always the same of all matrices of a height, and that height."""
    height = matrix.shape[-2]
    generator = torch.Generator().manual_seed(height)
    chosen = torch.randperm(height, generator=generator, device="cpu")[:ROWS].sort().values
    return matrix.index_select(-2, chosen.to(matrix.device)).double(), height


def _terms(merged: Tensor, total: Tensor, v: Tensor, height: int) -> Terms:
    largest = float(v.abs().max()) if v.numel() else 0.0
    if largest == 0:
        return 0.0, 0.0, 0.0, 0.0, 0.0
    merged, total, v = (rows / largest for rows in (merged, total, v))  # fourth powers of large entries overflow
    square = float(v.square().sum()) * height / v.shape[-2]
    mixed, summed, own = (rows @ v.mT for rows in (merged, total, v))
    products = mixed * own, mixed.square(), own.square(), summed * own, summed.square()
    gain, cost, alone, gain_of_sum, cost_of_sum = (_over_pairs(each, height) / square**2 for each in products)
    return gain, cost, alone, gain_of_sum, cost_of_sum


def _over_pairs(products: Tensor, height: int) -> float:
    """The sum of [..., n, n] over all pairs of rows; of those of n rows, too many are of a row with itself."""
    count = products.shape[-1]
    same = float(products.diagonal(dim1=-2, dim2=-1).sum())
    others = float(products.sum()) - same
    pairs = height * (height - 1) / (count * (count - 1)) if count > 1 else 0.0
    return same * height / count + others * pairs
