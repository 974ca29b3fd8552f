"""Model Breadcrumbs (arXiv 2312.06795): leave out the smallest entries and the outliers, and add up the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .base import Measured, Merged, Method
from .order import kth_of
from .parameters import number, parameter, weights_parameter
from .rules import default_scale
from .vectors import Sides, TaskVectors, added

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Breadcrumbs(Method):
    """Model Breadcrumbs: the sum of the v_i without the smallest and the largest entries of each tensor.

    All entries that are equal to the smallest one kept are kept, those equal to the smallest outlier are outliers.

    Attributes:
        beta: share of each tensor that is left out as too small.
        gamma: share that is left out as too large; what the paper calls gamma is the percentile, 99.3 % by default.
        weights: lambda_i = 1 at scale 0.4, or given at scale 1.
    """

    name = "breadcrumbs"
    title = "Model Breadcrumbs"
    paper = "2312.06795"
    sees_matrices = False

    beta: float = parameter(0.85, "share of each tensor that is left out as too small", kind=number(0, 1))
    gamma: float = parameter(0.007, "share of each tensor that is left out as too large", kind=number(0, 1))
    weights: Literal["sum"] | tuple[float, ...] = weights_parameter("sum")

    def default_scale(self, count: int) -> float:
        return default_scale(self.weights, count)

    def holds(self, count: int, matrix: Sides | None) -> float:
        return min(count, 2) + 3

    @property
    def linear(self) -> bool:
        return True

    def merge(self, vectors: TaskVectors, measured: Measured) -> Merged:
        return Merged(added(self._weighted(vectors, measured.weights)))

    def _weighted(self, vectors: TaskVectors, weights: Sequence[float]) -> Iterator[list[Tensor]]:
        """weights[i] times what is kept of v_i."""
        for deltas, weight in zip(vectors.each(), weights, strict=True):
            for delta in deltas:
                magnitude = delta.abs().float()
                least, outlier = kth_of(magnitude, 1.0 - self.beta), kth_of(magnitude, self.gamma)
                delta.mul_(weight).masked_fill_((magnitude < least).logical_or_(magnitude >= outlier), 0.0)
            yield deltas
