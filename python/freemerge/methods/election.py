"""TIES-Merging's election of signs (arXiv 2306.01708), one model after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from .rules import relative

if TYPE_CHECKING:
    from torch import Tensor


def elected_sum(each: Iterator[Tensor]) -> Tensor:
    """The sum of the entries that have its sign, from the weighted task vectors of one tensor, model by model."""
    first = next(each)
    election = Election(first)
    for delta in chain([first], each):
        election.add(delta)
    return election.decide()


def agreeing_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of the entries that have its sign, from the task vectors of one tensor and their weights."""
    election = Election(deltas[0])
    for delta, weight in zip(deltas, relative(weights), strict=True):
        election.add(delta, weight)
    return election.decide().mul_(max(map(abs, weights)))


class Election:
    """What the positive and what the negative entries of weighted task vectors of one tensor add up to.

    The sign of their sum is elected; where that is zero, none is, and what was elected is zero.

    Args:
        like: a tensor of the same shape, dtype and device.
        shares: whether the sizes of the weights of either sign are added up, too; :meth:`decide` divides by them then.
    """

    def __init__(self, like: Tensor, *, shares: bool = False) -> None:
        from ..accumulate import new_empty

        self._sums = [new_empty(like.shape, like).zero_() for _ in range(2)]
        self._shares = [new_empty(like.shape, like).zero_() for _ in range(2)] if shares else []

    def add(self, delta: Tensor, weight: float = 1.0, least: float = 0.0) -> None:
        """Add ``weight * delta`` where |delta| is at least ``least``."""
        from ..accumulate import elect

        elect(delta, weight, self._sums, self._shares, least=least)

    def decide(self) -> Tensor:
        """The sum of what has the elected sign, or its mean. It ends the election."""
        from ..accumulate import decide

        return decide(self._sums, self._shares)
