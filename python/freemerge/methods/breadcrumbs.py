"""Model Breadcrumbs (arXiv 2312.06795): leave out the smallest entries and the outliers, and add up the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .base import Measured, Merged, Method
from .order import check_comparable, kth_of
from .parameters import parameter, share, weights_parameter
from .rules import default_scale
from .vectors import Sides, TaskVectors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Breadcrumbs(Method):
    """Model Breadcrumbs: the sum of the v_i without the smallest and the largest entries of each tensor.

    All entries that are equal to the smallest one kept are kept, those equal to the smallest outlier are outliers. Of
    tensors so small that the shares leave none, the largest that is no outlier is kept.

    Attributes:
        beta: share of each tensor that is left out as too small.
        gamma: share that is left out as too large; what the paper calls gamma is the percentile, 99.3 % by default.
        weights: lambda_i = 1 at scale 0.4, or given at scale 1.
    """

    name = "breadcrumbs"
    title = "Model Breadcrumbs"
    paper = "2312.06795"
    strengthened = 1.2  # what is cut off took some of the tasks along, see docs/methods.md
    sees_matrices = False
    linear = True

    beta: float = parameter(0.85, "share of each tensor that is left out as too small", kind=share())
    gamma: float = parameter(0.007, "share of each tensor that is left out as too large", kind=share())
    weights: Literal["sum"] | tuple[float, ...] = weights_parameter("sum")

    def default_scale(self, count: int) -> float:
        return default_scale(self.weights, count)

    def holds(self, count: int, matrix: Sides | None) -> float:
        return min(count, 2) + 1

    @property
    def left_out(self) -> str:
        return "" if self.beta + self.gamma < 1 else "beta, gamma: they leave out everything"

    def merge(self, vectors: TaskVectors, measured: Measured) -> Merged:
        from ..accumulate import elect, new_empty

        totals: list[Tensor] = []
        for deltas, weight in zip(vectors.each(), measured.weights, strict=True):
            totals = totals or [new_empty(delta.shape, delta).zero_() for delta in deltas]
            for tensor, delta, total in zip(vectors.tensors, deltas, totals, strict=True):
                check_comparable(tensor.name, delta)
                least, outlier = kth_of(delta, self._ranks(delta.numel()))
                elect(delta, weight, (total, total), least=least, outlier=outlier)  # both signs to one sum
        return Merged(totals)

    def _ranks(self, count: int) -> tuple[int, int]:
        """Of the smallest entry that is kept, and of the smallest outlier; 0 for none."""
        kept, outliers = round((1.0 - self.beta) * count), round(self.gamma * count)
        if count and not self.left_out:
            outliers = min(outliers, count - 1)
            kept = max(kept, outliers + 1)
        return kept, outliers
