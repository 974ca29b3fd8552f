"""Weight averaging (arXiv 2203.05482)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .base import Measured, Merged, Method
from .parameters import weights_parameter
from .vectors import Sides, TaskVectors


@dataclass(frozen=True)
class Average(Method):
    """Weight averaging: ``theta_0 + sum_i lambda_i v_i``, lambda_i = 1/K or given."""

    name = "average"
    title = "weight averaging"
    paper = "2203.05482"
    sees_matrices = False

    weights: Literal["uniform"] | tuple[float, ...] = weights_parameter("uniform")

    def holds(self, count: int, matrix: Sides | None) -> float:
        return 1

    @property
    def by_entries(self) -> bool:
        return True

    @property
    def linear(self) -> bool:
        return True

    def merge(self, vectors: TaskVectors, measured: Measured) -> Merged:
        return Merged(vectors.sum(measured.weights))
