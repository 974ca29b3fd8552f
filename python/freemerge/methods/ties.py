"""TIES-Merging (arXiv 2306.01708): trim, elect signs, average what agrees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..lazy import torch
from .base import Measured, Merged, Method
from .order import kth_largest
from .parameters import number, parameter
from .vectors import Sides, TaskVectors
from .whole import Whole

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Thresholds(Measured):
    """For each model the magnitude from which on an entry is kept; empty where every tensor has its own."""

    thresholds: tuple[float, ...] = ()


@dataclass(frozen=True)
class TIES(Method):
    """TIES-Merging: the mean of those entries of the trimmed v_i whose sign is that of their sum.

    Trimming keeps the largest entries of each v_i, and all that are equal to the smallest of them. Where the trimmed
    entries sum to zero, no sign is elected, and the merged entry is zero.

    Attributes:
        density: share of each v_i that is kept.
        scope: whether that share is of the ``"model"``, as in the paper, which takes two passes of its own over all
            weights, or of each ``"tensor"``.
    """

    name = "ties"
    title = "TIES-Merging"
    paper = "2306.01708"
    strengthened = 1.2  # what is cut off took some of the tasks along, see docs/methods.md
    sees_matrices = False

    density: float = parameter(0.2, "share of each task vector that is kept", kind=number(0, 1))
    scope: Literal["model", "tensor"] = parameter(
        "model", "of what the largest entries are kept", choices=("model", "tensor")
    )

    @property
    def passes(self) -> int:
        return 2 if self.scope == "model" else 0

    def holds(self, count: int, matrix: Sides | None) -> float:
        return 11

    @property
    def by_entries(self) -> bool:
        return self.scope == "model"

    def measure(self, units: Whole[TaskVectors], count: int) -> Measured:
        if self.scope == "tensor":
            return Measured()

        def magnitudes(vectors: TaskVectors) -> Iterator[tuple[int, Tensor]]:
            for model, deltas in enumerate(vectors.each()):
                yield from ((model, delta.abs_()) for delta in deltas)

        return Thresholds(thresholds=tuple(kth_largest(units.through(magnitudes), count, self.density)))

    def merge(self, vectors: TaskVectors, measured: Measured) -> Merged:
        """One look at each model: the sums and counts of both signs are kept until the sign is known."""
        thresholds = measured.thresholds if isinstance(measured, Thresholds) else ()
        agreements: list[_Agreement] = []
        for model, deltas in enumerate(vectors.each()):
            agreements = agreements or [_Agreement(delta) for delta in deltas]
            for delta, agreement in zip(deltas, agreements, strict=True):
                magnitude = delta.abs().float()
                threshold = thresholds[model] if thresholds else self._threshold(magnitude)
                agreement.add(delta.masked_fill_(magnitude < threshold, 0.0))
        return Merged([agreement.mean() for agreement in agreements])

    def _threshold(self, magnitude: Tensor) -> float:
        return kth_largest(Whole(lambda: [[(0, magnitude)]]), 1, self.density)[0]


class _Agreement:
    """Sums and counts of the positive and of the negative entries of one tensor."""

    def __init__(self, like: Tensor) -> None:
        self._sums = [torch.zeros_like(like) for _ in range(2)]
        self._counts = [torch.zeros_like(like, dtype=torch.int32) for _ in range(2)]

    def add(self, delta: Tensor) -> None:
        for total, count, part in zip(self._sums, self._counts, (delta.clamp(min=0), delta.clamp(max=0)), strict=True):
            total.add_(part)
            count.add_(part != 0)

    def mean(self) -> Tensor:
        """The mean of the entries whose sign is that of their sum; zero where that is zero."""
        (positive, negative), (positives, negatives) = self._sums, self._counts
        elected = positive + negative
        mean = torch.where(elected > 0, positive / positives, negative / negatives)
        return mean.masked_fill_(elected == 0, 0.0)
