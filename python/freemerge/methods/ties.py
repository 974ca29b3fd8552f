"""TIES-Merging (arXiv 2306.01708): trim, elect signs, average what agrees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .base import Measured, Merged, Method
from .election import Election
from .order import kth_largest, kth_of
from .parameters import number, parameter, weights_parameter
from .rules import relative
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

    With ``weights``, which the paper has not, signs are elected by ``sum_i lambda_i v_i``, and the mean is the weighted
    one: the sum of those lambda_i v_i that agree over that of their ``|lambda_i|``. It is the same for any multiple of
    the weights, so that equal ones are the paper's; a negative one stands for the opposite task vector.

    Attributes:
        density: share of each v_i that is kept.
        scope: whether that share is of the ``"model"``, as in the paper, which takes two passes of its own over all
            weights, or of each ``"tensor"``.
        weights: lambda_i, equal or given.
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
    weights: Literal["uniform"] | tuple[float, ...] = weights_parameter("uniform")

    @property
    def passes(self) -> int:
        return 2 if self.scope == "model" else 0

    def holds(self, count: int, matrix: Sides | None) -> float:
        return 11

    @property
    def by_entries(self) -> bool:
        return self.scope == "model"

    def measure(self, units: Whole[TaskVectors], count: int) -> Measured:
        alone = super().measure(units, count)
        if self.scope == "tensor":
            return alone

        def magnitudes(vectors: TaskVectors) -> Iterator[tuple[int, Tensor]]:
            for model, deltas in enumerate(vectors.each()):
                yield from ((model, delta.abs_()) for delta in deltas)

        return Thresholds(alone.weights, thresholds=tuple(kth_largest(units.through(magnitudes), count, self.density)))

    def merge(self, vectors: TaskVectors, measured: Measured) -> Merged:
        """One look at each model: what both signs amount to is kept until one is elected."""
        thresholds = measured.thresholds if isinstance(measured, Thresholds) else ()
        weights = relative(measured.weights)
        elections: list[Election] = []
        for model, deltas in enumerate(vectors.each()):
            elections = elections or [Election(delta, shares=True) for delta in deltas]
            for delta, election in zip(deltas, elections, strict=True):
                magnitude = delta.abs().float()
                threshold = thresholds[model] if thresholds else kth_of(magnitude, self.density)
                delta.masked_fill_(magnitude < threshold, 0.0)
                election.add(delta, weights[model])
        return Merged([election.mean() for election in elections])
