"""EMR-Merging's elected task vector (arXiv 2405.17461): the sign of the sum, the largest magnitude that has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..lazy import torch
from .base import Measured, Merged, Method
from .vectors import Sides, TaskVectors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class EMR(Method):
    """EMR: of each entry the largest ``|v_i|`` among those whose sign is that of ``sum_i v_i``, with that sign.

    Experts with ``values="mask"`` select each task's entries from it; without them it is too long, and a scale below 1
    is better. Where the sum is zero, so is the merged entry.
    """

    name = "emr"
    title = "EMR-Merging"
    paper = "2405.17461"
    sees_matrices = False

    def holds(self, count: int, matrix: Sides | None) -> float:
        return 6

    @property
    def by_entries(self) -> bool:
        return True

    def merge(self, vectors: TaskVectors, measured: Measured) -> Merged:
        sums: list[Tensor] = []
        highest: list[Tensor] = []
        lowest: list[Tensor] = []
        for deltas in vectors.each():
            if not sums:
                sums = [torch.zeros_like(delta) for delta in deltas]
                highest, lowest = ([torch.zeros_like(delta) for delta in deltas] for _ in range(2))
            for delta, total, high, low in zip(deltas, sums, highest, lowest, strict=True):
                total.add_(delta)
                torch.maximum(high, delta, out=high)
                torch.minimum(low, delta, out=low)
        elected = []
        for total, high, low in zip(sums, highest, lowest, strict=True):
            elected.append(torch.where(total > 0, high, low).masked_fill_(total == 0, 0.0))
        return Merged(elected)
