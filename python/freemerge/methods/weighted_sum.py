"""What methods have in common that merge sum_i lambda_i v_i and differ in lambda_i alone."""

from __future__ import annotations

from .base import Measured, Merged, Method
from .vectors import Sides, TaskVectors


class WeightedSum(Method):
    """A method that merges ``sum_i lambda_i v_i``."""

    sees_matrices = False
    by_entries = True
    linear = True

    def holds(self, count: int, matrix: Sides | None) -> float:
        return 1

    def merge(self, vectors: TaskVectors, measured: Measured) -> Merged:
        return Merged(vectors.sum(measured.weights))
