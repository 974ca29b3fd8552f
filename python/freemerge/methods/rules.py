"""The rules of merging, on plain tensors and numbers: weights, scale, alignment, energy.

Nothing here knows about Fourier transforms or files, so every rule can be checked by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from ..lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


Weights = Literal["magnitude", "uniform", "sum"] | tuple[float, ...]

_PIECE = 1 << 15  # entries, which torch adds up on one thread
TASK_ARITHMETIC_STRENGTH = 0.4  # strength of a summed task vector at which task arithmetic is usually best


def weights_by_rule(rule: Weights, count: int) -> tuple[float, ...]:
    """The coefficients lambda_i of K = ``count`` task vectors that need no look at them.

    ``"uniform"``: 1/K. ``"sum"``: 1 (the released code). A tuple is returned as it is.
    """
    if rule == "uniform":
        return (1.0 / count,) * count
    if rule == "sum":
        return (1.0,) * count
    assert rule != "magnitude"
    return rule


def magnitude_weights(means: Sequence[float]) -> tuple[float, ...]:
    """lambda_i = E_i / sum_j E_j from E_i = mean |v_i|, the equation of FR-Merging (arXiv 2411.16815).

    If every task vector is zero, 1/K.
    """
    total = math.fsum(means)
    return tuple(mean / total for mean in means) if total > 0 else (1.0 / len(means),) * len(means)


def default_scale(rule: Weights, count: int) -> float:
    """The scale that merges at the strength of task arithmetic.

    0.4 K where the weights sum to one ("magnitude", "uniform"), 0.4 where each is one ("sum"). Weights given as numbers
    are taken literally: 1.
    """
    if isinstance(rule, tuple):
        return 1.0
    return TASK_ARITHMETIC_STRENGTH * (1 if rule == "sum" else count)


def alignment_factors(means: Sequence[float]) -> list[float]:
    """Factors that give one tensor the same mean magnitude in every task: max_j m_j / m_i; a zero tensor stays zero.

    Source: the released FREE-Merging code, where a zero task vector gives NaN instead.
    """
    largest = max(means)
    return [largest / mean if mean > 0 else 0.0 for mean in means]


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i weights[i] deltas[i] as a new tensor."""
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    return total


def relative(weights: Sequence[float]) -> list[float]:
    """The weights over the largest, so that equal ones are exactly one, and what cancels leaves no rounding noise."""
    largest = max(map(abs, weights)) or 1.0
    return [weight / largest for weight in weights]


def energy_factor(norm_before: float, norm_after: float) -> float:
    """Factor that gives a filtered task vector its norm back; 1 where the filter left nothing to amplify."""
    # A filter that removes everything leaves rounding noise, which must not be amplified to full size.
    return norm_before / norm_after if norm_after > 1e-6 * norm_before else 1.0


def inner_product(a: Tensor, b: Tensor) -> float:
    """<a, b> over all entries, in float64; the same for any number of threads."""
    pieces = zip(torch.split(a.flatten(), _PIECE), torch.split(b.flatten(), _PIECE), strict=True)
    return math.fsum(float((x.double() * y).sum()) for x, y in pieces)


def projection_scale(squares: Iterable[float], overlaps: Iterable[float]) -> float:
    """The scale c with <c X, sum_i v_i> = sum_i ||v_i||^2, for a merged task vector X over the whole model.

    ``squares``: ||v_i||^2 of each tensor and model; ``overlaps``: <X, sum_i v_i> of each tensor. 1 where X has nothing
    in common with the task vectors, as when they cancel.
    """
    square, overlap = math.fsum(squares), math.fsum(overlaps)
    return square / overlap if overlap > 1e-6 * square else 1.0
