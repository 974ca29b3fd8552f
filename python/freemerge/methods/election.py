"""TIES-Merging's election of signs (arXiv 2306.01708), one model after the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def elected_sum(each: Iterable[list[Tensor]]) -> list[Tensor]:
    """Of each tensor the sum of the entries that have its sign, from weighted task vectors, one list a model."""
    elections: list[Election] = []
    for deltas in each:
        elections = elections or [Election(delta) for delta in deltas]
        for delta, election in zip(deltas, elections, strict=True):
            election.add(delta, 1.0)
    return [election.sum() for election in elections]


class Election:
    """What the positive and what the negative entries of weighted task vectors of one tensor add up to.

    The sign of their sum is elected; where that is zero, none is, and what was elected is zero.

    Args:
        like: a tensor of the same shape, dtype and device.
        shares: whether the sizes of the weights of either sign are added up, too, for :meth:`mean`.
    """

    def __init__(self, like: Tensor, *, shares: bool = False) -> None:
        self._sums = [torch.zeros_like(like) for _ in range(2)]
        self._shares = [torch.zeros_like(like) for _ in range(2)] if shares else []

    def add(self, delta: Tensor, weight: float) -> None:
        """Add ``weight * delta``, which ``delta`` is afterwards."""
        delta.mul_(weight)
        for sign, part in enumerate((delta.clamp(min=0), delta.clamp(max=0))):
            self._sums[sign].add_(part)
            if self._shares:
                self._shares[sign].add_(part != 0, alpha=abs(weight))

    def sum(self) -> Tensor:
        """The sum of what has the elected sign."""
        return self._elected(*self._sums)

    def mean(self) -> Tensor:
        """Its mean: the sum over that of the sizes of the weights."""
        return self._elected(*(total / share for total, share in zip(self._sums, self._shares, strict=True)))

    def _elected(self, positive: Tensor, negative: Tensor) -> Tensor:
        total = self._sums[0] + self._sums[1]
        return torch.where(total > 0, positive, negative).masked_fill_(total == 0, 0.0)
