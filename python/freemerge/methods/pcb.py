"""PCB-Merging (arXiv 2410.02396): entries compete within a task and agree between tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal

from ..errors import CheckpointError
from ..lazy import torch
from .base import Measured, Merged, Method
from .order import Numbers, kth_largest
from .parameters import number, parameter
from .vectors import Sides, TaskVectors
from .whole import Whole

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_SPAN = 1e-30  # of products, so that equal ones are not divided by zero


@dataclass(frozen=True, eq=False, kw_only=True)
class Competition(Measured):
    """What the scores of entries are relative to, for each pair of models, and the least score of each that is kept.

    ``least`` and ``span`` are of the products v_i v_j; ``inter`` is the mean of exp(norm(v_i v_j)), ``intra`` of
    exp(K norm(v_i v_i) - K): softmax without a factor that is common to all scores.
    """

    least: Tensor
    span: Tensor
    inter: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.float64, device="cpu"))
    intra: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.float64, device="cpu"))
    thresholds: tuple[float, ...] = ()

    def normal(self, deltas: Sequence[Tensor], i: int, j: int) -> Tensor:
        """norm(v_i v_j) of one tensor."""
        return (deltas[i] * deltas[j]).sub_(float(self.least[i, j])).div_(float(self.span[i, j]))

    def score(self, deltas: Sequence[Tensor], i: int) -> Tensor:
        """beta_i of one tensor, before any is dropped."""
        agreement = torch.zeros_like(deltas[i])
        for j in range(len(deltas)):
            agreement.add_(self.normal(deltas, i, j).exp_(), alpha=1.0 / float(self.inter[i, j]))
        return self.normal(deltas, i, i).sub_(1.0).mul_(len(deltas)).exp_().mul_(agreement).div_(float(self.intra[i]))


@dataclass(frozen=True)
class PCB(Method):
    """PCB-Merging: ``sum_i beta_i v_i / sum_i beta_i``, entry by entry, with the largest entries of each beta_i.

    beta_i = softmax(K norm(v_i v_i)) * sum_j softmax(norm(v_i v_j)), as in section 3 of the paper; norm maps all
    entries to [0, 1]. Kept are also all entries that are equal to the smallest one kept. K task vectors of a tensor are
    in memory.

    Attributes:
        density: share of each beta_i that is kept.
        scope: whether softmax, norm and density are over the whole ``"model"``, as in the paper, which takes four
            passes of its own over all weights, or over each ``"tensor"``.
    """

    name = "pcb"
    title = "PCB-Merging"
    paper = "2410.02396"
    strengthened = 1.3  # what is cut off took some of the tasks along, see docs/methods.md
    sees_matrices = False

    density: float = parameter(0.1, "share of each task vector's scores that is kept", kind=number(0, 1))
    scope: Literal["model", "tensor"] = parameter(
        "model", "over what the scores of entries are compared", choices=("model", "tensor")
    )

    @property
    def passes(self) -> int:
        return 4 if self.scope == "model" else 0

    def holds(self, count: int, matrix: Sides | None) -> float:
        return 2 * count + 5  # those of the tensor before are let go when the next are there

    def measure(self, units: Whole[TaskVectors], count: int) -> Measured:
        if self.scope == "tensor":
            return Measured()

        def tensors(vectors: TaskVectors) -> Iterator[list[Tensor]]:
            return (deltas for deltas in map(list, zip(*vectors.each(), strict=True)) if deltas[0].numel())

        return self._competition(units.through(tensors), count)

    def merge(self, vectors: TaskVectors, measured: Measured) -> Merged:
        return Merged([self._merged(list(deltas), measured) for deltas in zip(*vectors.each(), strict=True)])

    def _merged(self, deltas: list[Tensor], measured: Measured) -> Tensor:
        if not deltas[0].numel():
            return deltas[0]
        if not isinstance(measured, Competition):
            measured = self._competition(Whole(lambda: [[deltas]]), len(deltas))
        total, weight = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
        for i, (delta, threshold) in enumerate(zip(deltas, measured.thresholds, strict=True)):
            score = measured.score(deltas, i)
            score.masked_fill_(score.float() < threshold, 0.0)
            total.addcmul_(score, delta)
            weight.add_(score)
        return total.div_(weight).masked_fill_(weight == 0, 0.0)

    def _competition(self, units: Whole[Iterable[Sequence[Tensor]]], count: int) -> Competition:
        """Four looks at the task vectors: ranges, sums of exponentials, and two for the thresholds.

        Each unit gives the K task vectors of one tensor after the other.
        """
        from ..accumulate import norm

        pairs = [(i, j) for i in range(count) for j in range(i, count)]

        def products(tensors: Iterable[Sequence[Tensor]]) -> list[tuple[int, list[tuple[float, float]]]]:
            """The entries of each tensor, and for each pair the range of their products."""
            found = []
            for deltas in tensors:
                extremes = [torch.aminmax(deltas[i] * deltas[j]) for i, j in pairs]
                found.append((deltas[0].numel(), [(float(low), float(high)) for low, high in extremes]))
            return found

        least = torch.full((count, count), float("inf"), dtype=torch.float64, device="cpu")
        most = -least
        entries = 0
        for numel, extremes in chain.from_iterable(units.map(products)):
            entries += numel
            for (i, j), (low, high) in zip(pairs, extremes, strict=True):
                least[i, j] = least[j, i] = min(float(least[i, j]), low)
                most[i, j] = most[j, i] = max(float(most[i, j]), high)
        if entries and not torch.isfinite(most - least).all():
            raise CheckpointError("pcb multiplies task vectors with each other: their products overflow")
        ranges = Competition(least=least, span=(most - least).clamp(min=SMALLEST_SPAN))

        def exponentials(tensors: Iterable[Sequence[Tensor]]) -> list[list[tuple[float, float]]]:
            """For each tensor and pair the shares in ``inter`` and ``intra``, the same for any number of threads."""
            found = []
            for deltas in tensors:
                sums = []
                for i, j in pairs:
                    half = ranges.normal(deltas, i, j).div_(2)
                    between = norm([half.exp()]) ** 2 / entries
                    within = norm([half.sub_(0.5).mul_(count).exp_()]) ** 2 / entries if i == j else 0.0
                    sums.append((between, within))
                found.append(sums)
            return found

        inter, intra = torch.zeros_like(least), torch.zeros(count, dtype=torch.float64, device="cpu")
        for sums in chain.from_iterable(units.map(exponentials)):
            for (i, j), (between, within) in zip(pairs, sums, strict=True):
                inter[i, j] += between
                inter[j, i] = inter[i, j]
                intra[i] += within
        scored = dataclasses.replace(ranges, inter=inter, intra=intra)

        def scores(tensors: Iterable[Sequence[Tensor]]) -> Iterator[Numbers]:
            return ((i, scored.score(deltas, i), None) for deltas in tensors for i in range(count))

        return dataclasses.replace(scored, thresholds=tuple(kth_largest(units.through(scores), count, self.density)))
