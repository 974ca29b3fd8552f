"""Model Stock (arXiv 2403.19522): the mean of the models, drawn back to the base as far as they disagree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..lazy import torch
from .base import Measured, Merged, Method
from .interference import Interference
from .rules import inner_product
from .vectors import Sides, TaskVectors

if TYPE_CHECKING:
    from torch import Tensor

SINGULAR = 1e-6  # of 1 + (K - 1) cos, below which the unit vectors cancel up to rounding


@dataclass(frozen=True)
class ModelStock(Method):
    """Model Stock: ``t sum_i v_i / K`` with ``t = K cos / (1 + (K - 1) cos)``, tensor by tensor.

    cos is the cosine of the angle between two task vectors, for K > 2 the mean over all pairs. t is 1 where they are
    the same and 0 where they are orthogonal. The formula is followed where they point away from each other, too: t is
    negative there, and 0 where they cancel.
    """

    name = "model_stock"
    title = "Model Stock"
    paper = "2403.19522"
    sees_matrices = False
    fewest = 2

    def holds(self, count: int, matrix: Sides | None) -> float:
        return 4

    def strength(self, least: Interference) -> float:
        return self.strengthened  # measured, docs/methods.md: t tells what the tasks have in common already

    def merge(self, vectors: TaskVectors, measured: Measured) -> Merged:
        stocks: list[_Stock] = []
        for deltas in vectors.each():
            stocks = stocks or [_Stock(delta) for delta in deltas]
            for delta, stock in zip(deltas, stocks, strict=True):
                stock.add(delta)
        ratios = [stock.ratio() for stock in stocks]
        merged = [stock.total.mul_(ratio / stock.count) for stock, ratio in zip(stocks, ratios, strict=True)]
        return Merged(merged, [{"ratio": ratio} for ratio in ratios])


class _Stock:
    """Sum and cosines of the task vectors of one tensor, one after the other.

    The sum of the cosines with all before is that with the sum of their unit vectors.
    """

    def __init__(self, like: Tensor) -> None:
        self.total, self._directions = torch.zeros_like(like), torch.zeros_like(like)
        self.count, self._cosines = 0, 0.0

    def add(self, delta: Tensor) -> None:
        """Add a task vector, which may be overwritten."""
        from ..accumulate import norm

        self.count += 1
        self.total.add_(delta)
        length = norm([delta])
        if length > 0:
            direction = delta.div_(length)
            self._cosines += inner_product(self._directions, direction)
            self._directions.add_(direction)

    def ratio(self) -> float:
        """t, from the mean over all pairs of models."""
        cosine = self._cosines / (self.count * (self.count - 1) / 2)
        left = 1.0 + (self.count - 1) * cosine
        return self.count * cosine / left if left > SINGULAR else 0.0
