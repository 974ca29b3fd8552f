"""Weight averaging (arXiv 2203.05482)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .parameters import weights_parameter
from .weighted_sum import WeightedSum


@dataclass(frozen=True)
class Average(WeightedSum):
    """Weight averaging: ``theta_0 + sum_i lambda_i v_i``, lambda_i = 1/K or given."""

    name = "average"
    title = "weight averaging"
    paper = "2203.05482"

    weights: Literal["uniform"] | tuple[float, ...] = weights_parameter("uniform")
