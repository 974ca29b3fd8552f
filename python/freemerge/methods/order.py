"""The k-th largest of the numbers of a whole model, seen piece by piece."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..lazy import torch
from .whole import Whole

if TYPE_CHECKING:
    from torch import Tensor


LOW_BITS = 15  # of the 31 bits of a float32's magnitude: 16 bits in the first pass, 15 in the second


Numbers = tuple[int, "Tensor", "Tensor | None"]  #: a model, some of its numbers, and what is to be subtracted first


def kth_largest(whole: Whole[Iterable[Numbers]], count: int, share: float) -> list[float]:
    """For each of ``count`` models the round(share * n)-th largest magnitude of its n numbers, as float32.

    Infinity if that is the 0-th. Exact, in two looks at the whole and the memory of a histogram for each model.
    """
    from ..accumulate import count_magnitudes

    def add_upper(pieces: Iterable[Numbers], counts: Tensor) -> None:
        for model, piece, base in pieces:
            count_magnitudes(piece, base, counts[model], LOW_BITS, 0)

    def add_lower(pieces: Iterable[Numbers], counts: Tensor) -> None:
        for model, piece, base in pieces:
            count_magnitudes(piece, base, counts[model], 0, found[model][0])

    upper = whole.total(add_upper, torch.zeros(count, 1 << 16, dtype=torch.int64, device="cpu"))
    ranks = [round(share * int(counts.sum())) for counts in upper]
    found = [_rank_from_top(counts, rank) for counts, rank in zip(upper, ranks, strict=True)]
    lower = whole.total(add_lower, torch.zeros(count, 1 << LOW_BITS, dtype=torch.int64, device="cpu"))
    return [
        _float((high << LOW_BITS) + _rank_from_top(counts, rank)[0]) if k else float("inf")
        for (high, rank), counts, k in zip(found, lower, ranks, strict=True)
    ]


def kth_of(values: Tensor, share: float) -> float:
    """The same of one tensor alone."""
    return kth_largest(Whole(lambda: [[(0, values, None)]]), 1, share)[0]


def _float(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int32, device="cpu").view(torch.float32))


def _rank_from_top(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the number of a rank, counted from the largest, and its rank within the bin."""
    above = counts.flip(0).cumsum(0)
    index = min(int((above < rank).sum()), len(counts) - 1)
    return len(counts) - 1 - index, rank - int(above[index] - counts.flip(0)[index])
