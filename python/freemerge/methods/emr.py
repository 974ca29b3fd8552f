"""EMR-Merging's elected task vector (arXiv 2405.17461): the sign of the sum, the largest magnitude that has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..lazy import torch
from .base import Measured, Merged, Method
from .vectors import Deltas, Sides, TaskVectors

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
    by_entries = True

    def holds(self, count: int, matrix: Sides | None) -> float:
        return 1

    def merge(self, vectors: TaskVectors, measured: Measured) -> Merged:
        return Merged([tensor.by_pieces(_elected) for tensor in vectors.tensors])


def _elected(tensor: Deltas) -> Tensor:
    """The sum of the task vectors, and what is largest on either side of zero, of which its sign elects one."""
    each = tensor.each()
    total = next(each)
    high, low = total.clamp(min=0), total.clamp(max=0)
    for delta in each:
        total.add_(delta)
        torch.maximum(high, delta, out=high)
        torch.minimum(low, delta, out=low)
    return torch.where(total > 0, high, low).masked_fill_(total == 0, 0.0)
