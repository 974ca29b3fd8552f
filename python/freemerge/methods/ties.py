"""TIES-Merging (arXiv 2306.01708): trim, elect signs, average what agrees."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal

from .base import Measured, Merged, Method
from .election import Election
from .order import Numbers, check_comparable, kth_largest
from .parameters import parameter, share, weights_parameter
from .rules import relative
from .vectors import Deltas, Sides, TaskVectors
from .whole import Whole

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Thresholds(Measured):
    """For each model the magnitude from which on an entry is kept; empty where every tensor has its own."""

    thresholds: tuple[float, ...] = ()


@dataclass(frozen=True)
class TIES(Method):
    """TIES-Merging: the mean of those entries of the trimmed v_i whose sign is that of their sum.

    Trimming keeps the largest entries of each v_i, and all that are equal to the smallest of them. Where the trimmed
    entries sum to zero, no sign is elected, and the merged entry is zero.

    With ``weights``, which the paper has not, signs are elected by ``sum_i lambda_i v_i``, and the mean is the weighted
    one: the sum of those lambda_i v_i that agree over that of their ``|lambda_i|``. It is the same for any multiple of
    the weights, so that equal ones are the paper's; a negative one stands for the opposite task vector.

    Attributes:
        density: share of each v_i that is kept, one entry at least.
        scope: whether that share is of the ``"model"``, as in the paper, which takes two passes of its own over all
            weights, or of each ``"tensor"``.
        weights: lambda_i, equal or given.
    """

    name = "ties"
    title = "TIES-Merging"
    paper = "2306.01708"
    strengthened = 1.2  # what is cut off took some of the tasks along, see docs/methods.md
    sees_matrices = False

    density: float = parameter(0.2, "share of each task vector that is kept", kind=share())
    scope: Literal["model", "tensor"] = parameter(
        "model", "of what the largest entries are kept", choices=("model", "tensor")
    )
    weights: Literal["uniform"] | tuple[float, ...] = weights_parameter("uniform")

    @property
    def passes(self) -> int:
        return 2 if self.scope == "model" else 0

    def reads(self, as_matrices: bool) -> int:
        return 1 if self.scope == "model" else 3

    def holds(self, count: int, matrix: Sides | None) -> float:
        return 1

    @property
    def by_entries(self) -> bool:
        return self.scope == "model"

    @property
    def left_out(self) -> str:
        return "" if self.density else "density: at 0 nothing of the task vectors is kept"

    def measure(self, units: Whole[TaskVectors], count: int) -> Measured:
        alone = super().measure(units, count)
        if self.scope == "tensor":
            return alone

        def numbers(vectors: TaskVectors) -> Iterable[Numbers]:
            return chain.from_iterable(map(_numbers, vectors.tensors))

        return Thresholds(alone.weights, thresholds=tuple(kth_largest(units.through(numbers), count, self.density)))

    def merge(self, vectors: TaskVectors, measured: Measured) -> Merged:
        return Merged([self._merged(tensor, measured) for tensor in vectors.tensors])

    def _merged(self, tensor: Deltas, measured: Measured) -> Tensor:
        weights = relative(measured.weights)
        if isinstance(measured, Thresholds):
            thresholds: Sequence[float] = measured.thresholds
        else:
            thresholds = kth_largest(Whole(lambda: [_numbers(tensor)]), len(weights), self.density)

        def elected(piece: Deltas) -> Tensor:
            election: Election | None = None
            for delta, weight, least in zip(piece.each(), weights, thresholds, strict=True):
                check_comparable(piece.name, delta)
                election = election or Election(delta, shares=True)
                election.add(delta, weight, least)
            assert election is not None
            return election.decide()

        return tensor.by_pieces(elected)


def _numbers(tensor: Deltas) -> Iterator[Numbers]:
    """The task vectors of a tensor, of which the largest entries are looked for."""
    return ((i, model, base) for i, (model, base) in enumerate(tensor.pairs()))
