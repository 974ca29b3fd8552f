"""PCB-Merging (arXiv 2410.02396): entries compete within a task and agree between tasks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal

from ..errors import CheckpointError
from ..lazy import torch
from .base import Measured, Merged, Method
from .order import Numbers, kth_largest
from .parameters import parameter, share
from .vectors import Deltas, Sides, TaskVectors
from .whole import Whole

if TYPE_CHECKING:
    from torch import Tensor


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

    def scores(self, deltas: Sequence[Tensor]) -> list[Tensor]:
        """log beta_1, ..., log beta_K, before any entry is dropped, plus what makes all of them positive.

        beta_i itself falls to exp(-K), which many models make less than any float32.
        """
        agreements = [torch.zeros_like(delta) for delta in deltas]
        for i, j in pairs_of(len(deltas)):
            shared = self.normal(deltas, i, j).exp_()
            for k in {i, j}:
                agreements[k].add_(shared, alpha=1.0 / float(self.inter[i, j]))
        for i, agreement in enumerate(agreements):  # at least K / e, and intra at most 1
            within = self.normal(deltas, i, i).mul_(len(deltas))
            agreement.log_().add_(within).add_(1.0 - math.log(float(self.intra[i]))).clamp_(min=0.0)
        return agreements

    def merged(self, piece: Deltas) -> Tensor:
        """sum_i beta_i v_i / sum_i beta_i, with the entries of each beta_i that are kept."""
        deltas = list(piece.each())
        scores, largest = self.scores(deltas), torch.full_like(deltas[0], -math.inf)
        for score, threshold in zip(scores, self.thresholds, strict=True):
            score.masked_fill_(score.float() < threshold, -math.inf)
            torch.maximum(largest, score, out=largest)
        largest.clamp_(min=0.0)  # where nothing is kept
        total, weight = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
        for delta, score in zip(deltas, scores, strict=True):
            score.sub_(largest).exp_()
            total.addcmul_(score, delta)
            weight.add_(score)
        return total.div_(weight).masked_fill_(weight == 0, 0.0)


@dataclass(frozen=True)
class PCB(Method):
    """PCB-Merging: ``sum_i beta_i v_i / sum_i beta_i``, entry by entry, with the largest entries of each beta_i.

    beta_i = softmax(K norm(v_i v_i)) * sum_j softmax(norm(v_i v_j)), as in section 3 of the paper; norm maps all
    entries to [0, 1]. Kept are also all entries that are equal to the smallest one kept.

    Attributes:
        density: share of each beta_i that is kept, one entry at least.
        scope: whether softmax, norm and density are over the whole ``"model"``, as in the paper, which takes four
            passes of its own over all weights, or over each ``"tensor"``.
    """

    name = "pcb"
    title = "PCB-Merging"
    paper = "2410.02396"
    strengthened = 1.4  # what is cut off took some of the tasks along, see docs/methods.md
    sees_matrices = False

    density: float = parameter(0.1, "share of each task vector's scores that is kept", kind=share())
    scope: Literal["model", "tensor"] = parameter(
        "model", "over what the scores of entries are compared", choices=("model", "tensor")
    )

    @property
    def passes(self) -> int:
        return 4 if self.scope == "model" else 0

    def reads(self, as_matrices: bool) -> int:
        return 1 if self.scope == "model" else 5

    def holds(self, count: int, matrix: Sides | None) -> float:
        return 1

    def holds_of_piece(self, count: int) -> int:
        return 2 * count + 5

    @property
    def by_entries(self) -> bool:
        return self.scope == "model"

    @property
    def left_out(self) -> str:
        return "" if self.density else "density: at 0 nothing of the task vectors is kept"

    def measure(self, units: Whole[TaskVectors], count: int) -> Measured:
        if self.scope == "tensor":
            return Measured()
        return self._competition(units.through(lambda unit: chain.from_iterable(map(_pieces, unit.tensors))), count)

    def merge(self, vectors: TaskVectors, measured: Measured) -> Merged:
        return Merged([self._merged(tensor, measured) for tensor in vectors.tensors])

    def _merged(self, tensor: Deltas, measured: Measured) -> Tensor:
        if not tensor.numel:
            return next(tensor.each())
        if not isinstance(measured, Competition):
            measured = self._competition(Whole(lambda: [_pieces(tensor)]), len(tensor.models))
        return tensor.by_pieces(measured.merged, _at_once(tensor))

    def _competition(self, units: Whole[Iterable[Sequence[Tensor]]], count: int) -> Competition:
        """Four looks at the task vectors: ranges, sums of exponentials, and two for the thresholds.

        Each unit gives the K task vectors of one piece after the other.
        """
        from ..accumulate import norm

        pairs = pairs_of(count)

        def products(pieces: Iterable[Sequence[Tensor]]) -> tuple[int, list[float], list[float]]:
            """The entries of a unit, and for each pair the least and the largest of their products."""
            numel, low, high = 0, [math.inf] * len(pairs), [-math.inf] * len(pairs)
            for deltas in pieces:
                numel += deltas[0].numel()
                for pair, (i, j) in enumerate(pairs):
                    smallest, largest = torch.aminmax(deltas[i] * deltas[j])
                    low[pair] = min(low[pair], float(smallest))
                    high[pair] = max(high[pair], float(largest))
            return numel, low, high

        least = torch.full((count, count), math.inf, dtype=torch.float64, device="cpu")
        most = -least
        entries = 0
        for numel, low, high in units.map(products):
            entries += numel
            for pair, (i, j) in enumerate(pairs):
                least[i, j] = least[j, i] = min(float(least[i, j]), low[pair])
                most[i, j] = most[j, i] = max(float(most[i, j]), high[pair])
        if entries and not torch.isfinite(most - least).all():
            raise CheckpointError("pcb multiplies task vectors with each other: their products overflow")
        varies, size = most > least, most.abs().clamp(min=1.0)  # equal products are all 1
        ranges = Competition(least=least.where(varies, least - size), span=(most - least).where(varies, size))

        def exponentials(pieces: Iterable[Sequence[Tensor]]) -> tuple[list[float], list[float]]:
            """A unit's shares in ``inter``, for each pair, and in ``intra``; the same for any number of threads."""
            between, within = [0.0] * len(pairs), [0.0] * count
            for deltas in pieces:
                for pair, (i, j) in enumerate(pairs):
                    half = ranges.normal(deltas, i, j).div_(2)
                    between[pair] += norm([half.exp()]) ** 2 / entries
                    if i == j:
                        within[i] += norm([half.sub_(0.5).mul_(count).exp_()]) ** 2 / entries
            return between, within

        inter, intra = torch.zeros_like(least), torch.zeros(count, dtype=torch.float64, device="cpu")
        for between, within in units.map(exponentials):
            for pair, (i, j) in enumerate(pairs):
                inter[i, j] += between[pair]
                inter[j, i] = inter[i, j]
            intra += torch.tensor(within, dtype=torch.float64, device="cpu")
        scored = dataclasses.replace(ranges, inter=inter, intra=intra)

        def scores(pieces: Iterable[Sequence[Tensor]]) -> Iterator[Numbers]:
            return ((i, score, None) for deltas in pieces for i, score in enumerate(scored.scores(deltas)))

        return dataclasses.replace(scored, thresholds=tuple(kth_largest(units.through(scores), count, self.density)))


def pairs_of(count: int) -> list[tuple[int, int]]:
    """The pairs of models, each of which agrees with itself, too."""
    return [(i, j) for i in range(count) for j in range(i, count)]


def _pieces(tensor: Deltas) -> Iterator[list[Tensor]]:
    """The K task vectors of each piece of a tensor."""
    return (list(piece.each()) for piece in tensor.pieces(_at_once(tensor)) if piece.numel)


def _at_once(tensor: Deltas) -> int:
    """Four task vectors of a piece still stay in cache, and shorter pieces take threads longer to wake up for."""
    return -(-len(tensor.models) // 4)
