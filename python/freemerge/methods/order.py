"""The k-th largest of the numbers of a whole model, seen piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from ..lazy import torch
from .whole import Whole

if TYPE_CHECKING:
    from torch import Tensor


LOW_BITS = 15  # of the 31 bits of a float32's magnitude: 16 bits in the first pass, 15 in the second


Numbers = tuple[int, "Tensor", "Tensor | None"]  #: a model, some of its numbers, and what is to be subtracted first


def kth_largest(whole: Whole[Iterable[Numbers]], count: int, share: float) -> list[float]:
    """For each of ``count`` models the round(share * n)-th largest magnitude of its n numbers, as float32.

    The largest where that is the 0-th, so that small tensors keep something, too; infinity where share or n is 0.
    Exact, in two looks at the whole and the memory of a histogram for each model.
    """
    return _largest(whole, count, lambda n: [max(1, round(share * n)) if share > 0 and n else 0])[0]


def kth_of(values: Tensor, ranks: Sequence[int]) -> list[float]:
    """The k-th largest magnitude of one tensor alone for each k of ``ranks``, in one look and one more for each."""
    return [found for (found,) in _largest(Whole(lambda: [[(0, values, None)]]), 1, lambda n: ranks)]


def check_comparable(name: str, delta: Tensor) -> None:
    """CheckpointError if an entry of a float64 task vector, though finite, is too large to be compared as float32."""
    if delta.dtype == torch.float64 and delta.numel():
        size = max(abs(float(end)) for end in torch.aminmax(delta))
        if torch.finfo(torch.float32).max < size < math.inf:
            raise CheckpointError(f"tensor {name!r}: magnitudes are compared in float32, which {size:.3g} overflows")


def _largest(
    whole: Whole[Iterable[Numbers]], count: int, ranks_of: Callable[[int], Sequence[int]]
) -> list[list[float]]:
    """For each rank of n numbers that ``ranks_of(n)`` names, that of each model; infinity for rank 0."""
    from ..accumulate import count_magnitudes

    def counted(above: Sequence[int], bins: int, shift: int) -> Tensor:
        def add(pieces: Iterable[Numbers], counts: Tensor) -> None:
            for model, piece, base in pieces:
                count_magnitudes(piece, base, counts[model], shift, above[model])

        return whole.total(add, torch.zeros(count, bins, dtype=torch.int64, device="cpu"))

    upper = counted([0] * count, 1 << 16, LOW_BITS)
    largest = []
    for ranks in zip(*(ranks_of(int(counts.sum())) for counts in upper), strict=True):
        found = [_rank_from_top(counts, rank) for counts, rank in zip(upper, ranks, strict=True)]
        lower = counted([high for high, _ in found], 1 << LOW_BITS, 0)
        largest.append(
            [
                _float((high << LOW_BITS) + _rank_from_top(counts, rank)[0]) if k else math.inf
                for (high, rank), counts, k in zip(found, lower, ranks, strict=True)
            ]
        )
    return largest


def _float(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int32, device="cpu").view(torch.float32))


def _rank_from_top(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the number of a rank, counted from the largest, and its rank within the bin."""
    above = counts.flip(0).cumsum(0)
    index = min(int((above < rank).sum()), len(counts) - 1)
    return len(counts) - 1 - index, rank - int(above[index] - counts.flip(0)[index])
