"""Experts of single entries: the largest of a task vector, times mu (arXiv 2411.16815, section 4.2)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, get_args

import torch
from torch import Tensor

from ..accumulate import abs_means, norm, task_vector_sum
from ..arguments import number
from ..checkpoint import Checkpoint
from ..checkpoint.finite import check_finite
from ..errors import ArgumentError, CheckpointError
from ..lazy import cached_property
from .expert import Expert
from .leading import spectral_norm
from .names import Scope
from .rescale import RULES, Statistics, TensorStatistics, factors_of
from .select import ModelSelector, Selection, rows_of, select_largest
from .values import ExpertTensor, SparseTensor


def kept_entries(n: int, density: float) -> int:
    """k = max(1, floor(d n)), without the rounding error of the product: 0.29 * 100 = 28.999999999999996 gives 29."""
    return max(1, math.floor(round(density * n, 9)))


@dataclass(frozen=True)
class Criterion:
    """Which entries are kept."""

    density: float
    scope: Scope
    trim: float

    def __post_init__(self) -> None:
        if not 0 <= number(self.trim) < 1:
            raise ArgumentError(f"trim must be at least 0 and less than 1, got {self.trim!r}")
        if self.scope not in list(get_args(Scope)):
            raise ArgumentError(f"scope must be one of {', '.join(get_args(Scope))}, got {self.scope!r}")

    def counts(self, n: int) -> tuple[int, int]:
        """For a scope of n entries: how many to select, and how many of them to leave out again."""
        trimmed = math.floor(round(self.trim * n, 9))
        return kept_entries(n, self.density) + trimmed, trimmed


@dataclass(frozen=True)
class _Sums:
    """Of one tensor: sum |v|, and ||v||^2 - <theta_m - theta_0, v> if there is a backbone theta_m."""

    magnitude: float
    shortfall: float


@dataclass
class EntryExtraction:
    """Experts of the tensors ``names``, one model at a time."""

    base: Checkpoint
    models: Sequence[Checkpoint]
    names: Sequence[str]
    backbone: Checkpoint | None
    criterion: Criterion
    rescale: str | float
    coding: type[SparseTensor]
    _base_norms: dict[str, float] = field(default_factory=dict)

    def expert(self, i: int) -> Expert:
        """The expert of model i."""
        kept: list[tuple[str, SparseTensor, Tensor]] = []
        statistics = []
        for name, selection, sums in self._selections(i):
            tensor = self.coding.encode(self.base.specs[name].shape, selection)
            statistics.append(self._statistics(name, tensor, selection, sums))
            kept.append((name, tensor, selection.values))
        density, scope = self.criterion.density, self.criterion.scope
        mu, shares = factors_of(
            self.rescale, Statistics(statistics, density, lambda: self.model_means, lambda: self._overlap(kept))
        )
        tensors: dict[str, ExpertTensor] = {}
        for (name, tensor, values), share in zip(kept, shares, strict=True):
            if tensor.entries:
                weaker = Selection(tensor.indices, values * share)
                tensors[name] = tensor if share == 1 else self.coding.encode(tensor.shape, weaker)
        rescale = self.rescale if isinstance(self.rescale, str) else "number"
        return Expert(tensors, mu, density, scope, rescale, self.coding.coding)

    def _selections(self, i: int) -> Iterator[tuple[str, Selection, _Sums]]:
        """The kept entries and sums of every tensor of model i. Each is read once, or twice for scope "model"."""
        if self.criterion.scope == "model":
            yield from self._model_selections(i)
            return
        by_row = self.criterion.scope == "row"
        for name in self.names:
            base, model = self._read(i, name)
            wanted, trimmed = self.criterion.counts(rows_of(base.shape)[1] if by_row else base.numel())
            selection = select_largest(model, base, wanted, by_row=by_row)
            self._check(i, name, selection)
            if trimmed:
                selection = selection.without(select_largest(model, base, trimmed, by_row=by_row))
            yield name, selection, self._sums(i, name, base, model)

    def _model_selections(self, i: int) -> Iterator[tuple[str, Selection, _Sums]]:
        wanted, trimmed = self.criterion.counts(sum(self.base.specs[name].numel for name in self.names))
        selector, sums = ModelSelector(), []
        for name in self.names:
            base, model = self._read(i, name)
            selector.count(model, base)
            sums.append(self._sums(i, name, base, model))
        for name in self.names:
            base, model = self._read(i, name)
            selector.collect(model, base, wanted)
        selections = selector.finish(wanted)
        largest = selector.finish(trimmed) if trimmed else None
        for j, (name, selection) in enumerate(zip(self.names, selections, strict=True)):
            self._check(i, name, selection)
            yield name, selection.without(largest[j]) if largest else selection, sums[j]

    def _read(self, i: int, name: str) -> tuple[Tensor, Tensor]:
        base = self.base.read(name)
        return base, self.models[i].read(name).to(base.device)

    def _check(self, i: int, name: str, selection: Selection) -> None:
        # Non-finite entries order above all others, so one that exists is selected.
        if not selection.values.isfinite().all():
            self._refuse(i, name)

    def _refuse(self, i: int, name: str) -> NoReturn:
        for source in (self.base, self.models[i]):
            check_finite(name, source.read(name), source.origin(name))
        raise CheckpointError(f"{self.models[i].label}: the task vector of {name!r} is not finite")

    def _sums(self, i: int, name: str, base: Tensor, model: Tensor) -> _Sums:
        mean = abs_means(base, [model])[0]
        if not math.isfinite(mean):
            self._refuse(i, name)
        shortfall = 0.0
        if self.backbone is not None:
            merged = self.backbone.read(name).to(base.device)
            # ||v||^2 - <m, v> = (||v||^2 + ||v - m||^2 - ||m||^2) / 2 with v and m counted from theta_0.
            squares = [_square(base, model), _square(merged, model), _square(base, merged)]
            if not all(math.isfinite(square) for square in squares):
                raise CheckpointError(f"{self.backbone.label}: tensor {name!r} is not finite")
            shortfall = (squares[0] + squares[1] - squares[2]) / 2
        return _Sums(mean * base.numel(), shortfall)

    def _statistics(self, name: str, tensor: SparseTensor, selection: Selection, sums: _Sums) -> TensorStatistics:
        kept = float(selection.values.abs().double().numpy().sum())
        found = TensorStatistics(tensor.numel, sums.magnitude, tensor.entries, kept, sums.shortfall)
        if self.backbone is not None:
            stored, v = tensor.values().double().numpy(), selection.values.double().numpy()
            product, square = float((stored * v).sum()), float((stored * stored).sum())
            found = dataclasses.replace(found, kept_product=product, kept_square=square)
        if self.rescale in RULES and RULES[self.rescale].needs_norms:
            dense = torch.zeros(tensor.numel, dtype=torch.float32, device="cpu")
            dense[selection.indices] = selection.values
            found = dataclasses.replace(
                found,
                vector=len(tensor.shape) == 1,
                base_norm=self._base_norm(name),
                kept_norm=_norm(dense.view(tensor.shape)),
            )
        return found

    def _overlap(self, kept: Sequence[tuple[str, SparseTensor, Tensor]]) -> float:
        """<M as it is stored, theta_m - theta_0>, in one pass over base and backbone."""
        assert self.backbone is not None
        products = []
        for name, tensor, _ in kept:
            base = self.base.read(name)
            merged = task_vector_sum(base, [self.backbone.read(name).to(base.device)], [1.0])[0].view(-1)
            there = merged[tensor.indices.long().to(base.device)].cpu()
            products.append(float((tensor.values().double() * there.double()).numpy().sum()))
        return math.fsum(products)

    def _base_norm(self, name: str) -> float:
        """||theta_0|| of a tensor; models share it."""
        if name not in self._base_norms:
            self._base_norms[name] = _norm(self.base.read(name))
        return self._base_norms[name]

    @cached_property
    def model_means(self) -> list[float]:
        """E(v_j) of every model, in one pass over all of them."""
        totals: list[list[float]] = [[] for _ in self.models]
        entries = 0
        for name in self.names:
            base = self.base.read(name)
            means = abs_means(base, [model.read(name).to(base.device) for model in self.models])
            for total, mean in zip(totals, means, strict=True):
                total.append(mean * base.numel())
            entries += base.numel()
        return [math.fsum(total) / entries for total in totals]


def _norm(tensor: Tensor) -> float:
    """Spectral norm of the matrix of a tensor's rows; the Frobenius norm of a vector."""
    return spectral_norm(tensor.reshape(rows_of(tensor.shape))) if tensor.ndim > 1 else norm([tensor])


def _square(origin: Tensor, tensor: Tensor) -> float:
    return norm([task_vector_sum(origin, [tensor], [1.0])[0]]) ** 2
