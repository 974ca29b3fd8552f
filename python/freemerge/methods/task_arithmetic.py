"""Task arithmetic (arXiv 2212.04089)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .base import Measured, Merged, Method
from .parameters import weights_parameter
from .rules import default_scale
from .vectors import Sides, TaskVectors


@dataclass(frozen=True)
class TaskArithmetic(Method):
    """Task arithmetic: ``theta_0 + scale * sum_i lambda_i v_i``, lambda_i = 1 at scale 0.4, or given at scale 1."""

    name = "task_arithmetic"
    title = "Task Arithmetic"
    paper = "2212.04089"
    sees_matrices = False

    weights: Literal["sum"] | tuple[float, ...] = weights_parameter("sum")

    def default_scale(self, count: int) -> float:
        return default_scale(self.weights, count)

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
