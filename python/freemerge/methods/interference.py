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
from typing import TYPE_CHECKING

from ..lazy import torch
from .vectors import TaskVectors

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 128  # of each matrix; more change the scale by about a hundredth
DIGITS = 6  # of the scale, which the last bits of a matrix product then do not change

Terms = tuple[float, float, float]  # <X v_i^T, v_i v_i^T>, ||X v_i^T||^2 and ||v_i v_i^T||^2, over ||v_i||^4


def interference_terms(vectors: TaskVectors, merge: Callable[[], Sequence[Tensor]]) -> list[Terms]:
    """The terms of each matrix and model of a unit; none for vectors. Reads the unit once, and as ``merge`` does."""
    if all(len(tensor.shape) < 2 for tensor in vectors.tensors):
        return []
    own = [[_rows(matrix) for matrix in vectors.linear_maps(deltas)] for deltas in vectors.each()]
    merged = [_rows(matrix) for matrix in vectors.linear_maps(merge())]
    return [_terms(x, v) for model in own for x, v in zip(merged, model, strict=True)]


def least_interference(terms: Iterable[Terms]) -> float | None:
    """The scale c; None where what was merged has nothing in common with the task vectors."""
    found = list(terms)
    gain, cost, own = (math.fsum(term[i] for term in found) for i in range(3))
    return float(f"{gain / cost:.{DIGITS}g}") if gain > 1e-6 * own else None


def sampled(count: int, rows: int) -> float:
    """What the samples of ``count`` models take, in copies of a float32 matrix of so many rows."""
    return 2 * (count + 1) * min(1.0, ROWS / max(1, rows))


def _rows(matrix: Tensor) -> tuple[Tensor, int]:
    """Some rows [..., n, W] in float64, always the same of all matrices of a height, and that height."""
    height = matrix.shape[-2]
    generator = torch.Generator().manual_seed(height)
    chosen = torch.randperm(height, generator=generator, device="cpu")[:ROWS].sort().values
    return matrix.index_select(-2, chosen.to(matrix.device)).double(), height


def _terms(merged: tuple[Tensor, int], vector: tuple[Tensor, int]) -> Terms:
    (x, height), (v, _) = merged, vector
    largest = float(v.abs().max()) if v.numel() else 0.0
    if largest == 0:
        return 0.0, 0.0, 0.0
    x, v = x / largest, v / largest  # fourth powers of large entries overflow
    square = float(v.square().sum()) * height / x.shape[-2]
    crossed, own = x @ v.mT, v @ v.mT
    gain, cost, alone = (_over_pairs(products, height) for products in (crossed * own, crossed.square(), own.square()))
    return gain / square**2, cost / square**2, alone / square**2


def _over_pairs(products: Tensor, height: int) -> float:
    """The sum of [..., n, n] over all pairs of rows; of those of n rows, too many are of a row with itself."""
    count = products.shape[-1]
    same = float(products.diagonal(dim1=-2, dim2=-1).sum())
    others = float(products.sum()) - same
    pairs = height * (height - 1) / (count * (count - 1)) if count > 1 else 0.0
    return same * height / count + others * pairs
