"""FR-Merging (arXiv 2411.16815, section 4.1): task vectors are filtered in the frequency domain, then summed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING, Literal

from ..responses import HighPass, Response
from .base import Measured, Merged, Method
from .election import agreeing_sum
from .filtered import CUTOFF_HELP, checked_response, filter_members, filtered_sums
from .parameters import FLAG, NUMBER, parameter, weights_parameter
from .rules import (
    Weights,
    alignment_factors,
    default_scale,
    energy_factor,
    magnitude_weights,
    weighted_sum,
)
from .vectors import Sides, TaskVectors
from .whole import Whole

if TYPE_CHECKING:
    from torch import Tensor

    from ..accumulate import LateSum


@dataclass(frozen=True)
class FR(Method):
    """FR-Merging: ``theta_0 + scale * sum_i lambda_i filter(v_i)``, by the paper or by the released code.

    The filter is linear, so the weighted sum is made first and filtered once, unless ``align`` or ``sign_election``
    needs every filtered task vector, or its own weights need their means; then K copies of a unit are in memory.

    Attributes:
        response: the frequency response that filters every selected matrix. ``HighPass(0)`` filters nothing.
        weights: lambda_i: ``"magnitude"`` (the paper's E_i / sum E_j, ``E_i = mean |v_i|``; also called ``"paper"``),
            ``"uniform"`` (1/K), ``"sum"`` (1, the released code), or K numbers.
        stats: whether E_i is measured on the ``"raw"`` task vectors (mean over all their elements) or on the
            ``"filtered"`` ones (unweighted mean over tensors, as the released code does).
        scope: whether "magnitude" weights are taken over the whole ``"model"`` or for each ``"tensor"``; a view's stack
            is one.
        renormalize: ``"energy"`` gives every filtered tensor the Frobenius norm back that the weighted sum had before
            the filter, so that one scale suits every cutoff; ``None`` does not.
        align: scale tensor l of task i by max_j m_jl / m_il, m the mean magnitude after the filter (released code);
            tensors that a view stacks are aligned as the one matrix they make.
        sign_election: keep only the entries that agree with the elected sign, TIES-Merging's sum (released LLM script).
        cutoff: instead of a response, or on top of one: the same response with this cutoff, or a high-pass if it has
            no cutoff.
    """

    name = "fr"
    title = "FR-Merging"
    paper = "2411.16815"
    strengthened = 1.2  # what is cut off took some of the tasks along, see docs/methods.md

    response: Response = HighPass(0.4)
    weights: Weights = weights_parameter("magnitude", "uniform", "sum", aliases={"paper": "magnitude"})
    stats: Literal["raw", "filtered"] = parameter(
        "raw", "task vectors whose magnitude makes the weights", choices=("raw", "filtered")
    )
    scope: Literal["model", "tensor"] = parameter(
        "model", "over what the magnitude is taken", choices=("model", "tensor")
    )
    renormalize: Literal["energy"] | None = parameter(
        "energy", "give the filtered sum its norm back", choices=(None, "energy")
    )
    align: bool = parameter(False, "give a tensor the same magnitude in every task", kind=FLAG)
    sign_election: bool = parameter(False, "keep the entries that agree with the sign of the sum", kind=FLAG)
    cutoff: InitVar[float | None] = parameter(None, CUTOFF_HELP, kind=NUMBER)

    def __post_init__(self, cutoff: float | None) -> None:
        object.__setattr__(self, "response", checked_response(self.response, cutoff))
        super().__post_init__()

    @property
    def passes(self) -> int:
        return 1 if self.weights == "magnitude" and self.scope == "model" else 0

    def reads(self, as_matrices: bool) -> int:
        if self._own_weights and not self._filtered_stats(as_matrices):
            return 2
        return 2 if not self._sums_first(as_matrices) and as_matrices and self.renormalize is not None else 1

    def holds(self, count: int, matrix: Sides | None) -> float:
        sums = 1 if self._sums_first(matrix is not None) else count + 5
        return sums if matrix is None else sums + 2  # a stack is copied to be filtered, a single row has a spectrum

    @property
    def by_entries(self) -> bool:
        return not (self.align or self._own_weights)

    @property
    def linear(self) -> bool:
        return self.renormalize is None and not (self.sign_election or self._own_weights)

    @property
    def linear_hint(self) -> str:
        return "" if self.renormalize is None else "give it renormalize none"

    def default_scale(self, count: int) -> float:
        return default_scale(self.weights, count)

    def measure(self, units: Whole[TaskVectors], count: int) -> Measured:
        if self._own_weights:
            return Measured()
        if self.weights != "magnitude":
            return super().measure(units, count)
        totals: list[list[float]] = [[] for _ in range(count)]
        entries = 0

        def sizes_and_means(vectors: TaskVectors) -> list[tuple[int, list[float]]]:
            sizes = vectors.sizes or [tensor.numel for tensor in vectors.tensors]
            return list(zip(sizes, self._means(vectors), strict=True))

        for unit in units.map(sizes_and_means):
            for numel, means in unit:
                weight = 1 if self.stats == "filtered" else numel
                entries += weight
                for total, mean in zip(totals, means, strict=True):
                    total.append(mean * weight)
        return Measured(magnitude_weights([math.fsum(total) / max(1, entries) for total in totals]))

    def merge(self, vectors: TaskVectors, measured: Measured) -> Merged:
        from ..accumulate import norm

        tensors, filters = vectors.tensors, vectors.as_matrices
        norms = filters and self.renormalize is not None
        before = after = 0.0
        sums: Sequence[Tensor | LateSum]
        if self._sums_first(filters):
            weights = self._weights(vectors, measured)
            if filters:
                sums, before, after = filtered_sums(vectors, weights, self.response, norms=norms)
            else:
                sums = vectors.sum(weights)
        else:
            filtered = self._filtered(vectors)
            means = _means(filtered)
            weights = self._weights(vectors, measured, means if self._filtered_stats(filters) else None)
            factors = alignment_factors(_over_unit(vectors, means)) if self.align else [1.0] * len(weights)
            shares = [factor * weight for factor, weight in zip(factors, weights, strict=True)]
            combine = agreeing_sum if self.sign_election else weighted_sum
            sums = combined = [combine(deltas, shares) for deltas in zip(*filtered, strict=True)]
            if norms:
                before = norm(vectors.sum(weights))
                after = norm(combined)
        notes: list[dict[str, object]] = [{"weights": list(weights)} if self._own_weights else {} for _ in tensors]
        if not norms:
            return Merged(sums, notes)
        factor = energy_factor(before, after)
        return Merged(sums, [{**note, "energy_factor": factor} for note in notes], factor)

    @property
    def _own_weights(self) -> bool:
        """Whether every tensor has weights of its own."""
        return self.weights == "magnitude" and self.scope == "tensor"

    def _filtered_stats(self, as_matrices: bool) -> bool:
        return self.stats == "filtered" and as_matrices

    def _sums_first(self, as_matrices: bool) -> bool:
        """Whether the weighted sum is filtered, and not every task vector."""
        measures_filtered = self._own_weights and self._filtered_stats(as_matrices)
        return not (self.align or self.sign_election or measures_filtered)

    def _means(self, vectors: TaskVectors) -> list[list[float]]:
        """For each member the mean magnitude of each model's task vector, raw or filtered as ``stats`` says."""
        if self._filtered_stats(vectors.as_matrices):
            return _means(self._filtered(vectors))
        return vectors.means()

    def _weights(
        self, vectors: TaskVectors, measured: Measured, means: list[list[float]] | None = None
    ) -> tuple[float, ...]:
        """lambda_i: the model's, or the unit's own, from the ``means`` of its members, which are read if not given."""
        if not self._own_weights:
            return measured.weights
        return magnitude_weights(_over_unit(vectors, means or self._means(vectors)))

    def _filtered(self, vectors: TaskVectors) -> list[list[Tensor]]:
        """G_i of each model, one tensor a member."""
        filtered = []
        for deltas in vectors.each():
            if vectors.as_matrices:
                filter_members(vectors, deltas, self.response)
            filtered.append(deltas)
        return filtered


def _over_unit(vectors: TaskVectors, means: Sequence[Sequence[float]]) -> list[float]:
    """The mean magnitude of each model over all members: a stack is the one matrix that it stands for."""
    sizes = [tensor.numel for tensor in vectors.tensors]
    return [
        math.fsum(mean * size for mean, size in zip(column, sizes, strict=True)) / max(1, sum(sizes))
        for column in zip(*means, strict=True)
    ]


def _means(filtered: Sequence[Sequence[Tensor]]) -> list[list[float]]:
    """mean |G_i| of each member and model."""
    from ..accumulate import abs_means

    return [abs_means(deltas[0].new_zeros(()).expand_as(deltas[0]), deltas) for deltas in zip(*filtered, strict=True)]
