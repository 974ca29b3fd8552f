"""Task arithmetic (arXiv 2212.04089)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .parameters import weights_parameter
from .rules import default_scale
from .weighted_sum import WeightedSum


@dataclass(frozen=True)
class TaskArithmetic(WeightedSum):
    """Task arithmetic: ``theta_0 + scale * sum_i lambda_i v_i``, lambda_i = 1 at scale 0.4, or given at scale 1."""

    name = "task_arithmetic"
    title = "Task Arithmetic"
    paper = "2212.04089"

    weights: Literal["sum"] | tuple[float, ...] = weights_parameter("sum")

    def default_scale(self, count: int) -> float:
        return default_scale(self.weights, count)
