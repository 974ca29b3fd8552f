"""The merge of one unit at a time: base and K models in, merged tensors out.

Wherever the filter's linearity allows, the K weighted task vectors are summed first and filtered once. Statistics over
the whole model need a pass of their own before any unit is merged; per-tensor ones do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..accumulate import abs_means, add_round, norm, task_vector_sum
from ..backends.registry import named
from ..checkpoint import MERGEABLE, Checkpoint, TensorSpec
from ..checkpoint.compare import check_finite, compare
from ..errors import CheckpointError
from ..filter import filter_
from ..methods.rules import alignment_factors, elect_and_sum, energy_factor, merging_scale, merging_weights
from .inspection import Decision, Inspection, decide, warnings
from .recipe import DTYPES, Recipe
from .units import Unit, filtered_matrices, plan_units, require_equal, taken_from_base, unstack


class Merger:
    """A base, K models and a recipe, checked to fit together; :meth:`merged` does the work.

    Attributes:
        units: what is merged together, in the order of the tensors' names.
        tied: second name -> first name of the base's tensors that are one tensor of the model; they follow the first.
        written: the names that an output file holds: second names only where the base's files hold a copy of their own.
        scale: the global scale, a number.
        energy_factors: for each renormalised tensor the factor it got, filled in as units are merged.
        on_read: called with a unit and the bytes just read of it, after each pass over it.
    """

    def __init__(self, base: Checkpoint, models: Sequence[Checkpoint], recipe: Recipe, backend: str = "auto") -> None:
        self._chosen = named(backend)
        if self._chosen is not None:
            self._chosen.require()
        self.base, self.models, self.recipe, self.backend = base, tuple(models), recipe, backend

        def takes_part(name: str) -> bool:
            return not taken_from_base(base.tied.get(name, name), recipe.select)

        comparison = compare(base, models, merged=takes_part)
        self.tied = {name: first for name, first in (base.tied | comparison.tied).items() if name in base.specs}
        self.written = [name for name in base.specs if name not in base.tied]
        self.specs = {name: spec for name, spec in base.specs.items() if name not in self.tied}
        self.units = plan_units(self.specs, recipe.select, recipe.views)
        self.scale = merging_scale(recipe.scale, recipe.weights, len(self.models))
        self.energy_factors: dict[str, float] = {}
        self.on_read: Callable[[Unit, int], None] = lambda unit, read_bytes: None
        self._weights: list[float] | None = None

    @property
    def needs_statistics_pass(self) -> bool:
        """Whether the weights depend on all tensors, so that everything is read twice."""
        return self.recipe.weights == "paper" and self.recipe.scope == "model"

    def out_spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a merged tensor."""
        spec = self.base.specs[name]
        wanted = self.recipe.out_dtype
        return spec.with_dtype(DTYPES[wanted]) if wanted is not None and spec.dtype in MERGEABLE else spec

    def _merge_bytes(self, unit: Unit) -> int:
        """Bytes of tensor data that merging a unit reads, statistics of the whole model apart."""
        return self._unit_bytes(unit) * (2 if unit.action != "copy" and self._reads_twice(unit) else 1)

    def _unit_bytes(self, unit: Unit) -> int:
        sources = (self.base,) if taken_from_base(unit.names[0], self.recipe.select) else (self.base, *self.models)
        return sum(source.specs[name].nbytes for name in unit.names for source in sources)

    def inspect(self) -> Inspection:
        """Say what will happen, without reading any data."""
        decisions: list[Decision] = []
        for unit in self.units:
            dtype = self._compute_dtype(unit.names[0])
            device = self._device(unit.names[0])
            decisions += decide(unit, self.specs, self.recipe.response, dtype, device, self.backend)
        passes = 2 if self.needs_statistics_pass else 1
        read = sum(self._merge_bytes(unit) for unit in self.units)
        if self.needs_statistics_pass:
            read += sum(self._unit_bytes(unit) for unit in self.units if unit.action != "copy")
        written = sum(self.out_spec(name).nbytes for name in self.written)
        return Inspection(tuple(decisions), tuple(warnings(decisions)), read, written, passes)

    def weights(self) -> list[float] | None:
        """lambda_i over the whole model, measured on first use; None where every tensor has its own."""
        if self._own_weights:
            return None
        if self._weights is None:
            means = self._model_means() if self.needs_statistics_pass else [0.0] * len(self.models)
            self._weights = merging_weights(self.recipe.weights, means)
        return self._weights

    def merged(self, unit: Unit) -> Iterator[tuple[str, Tensor]]:
        """The merged tensors of a unit, new ones in their output dtype, under every name of :attr:`written`."""
        for name, tensor in self._merged(unit):
            yield name, tensor
            copies = (second for second, first in self.tied.items() if first == name and second in self.written)
            yield from ((second, tensor) for second in copies)
        self.on_read(unit, self._merge_bytes(unit))

    def _merged(self, unit: Unit) -> Iterator[tuple[str, Tensor]]:
        if unit.action == "copy":
            for name in unit.names:
                yield name, self._copied(name, must_agree=unit.must_agree)
            return
        for name, delta in zip(unit.names, self._combined(unit), strict=True):
            spec = self.out_spec(name)
            merged = add_round(self.base.read(name).to(delta.device), delta, self.scale, spec.dtype)
            # Finite inputs can still leave the range of float16, or of anything at a large scale.
            check_finite(name, merged, f"merged model at scale {self.scale:g} in {spec.dtype_name}")
            yield name, merged.to(self.base.device(name))

    # Statistics

    def _model_means(self) -> list[float]:
        """E_i of each model: mean over all elements (raw), or over tensors of each one's mean (filtered)."""
        totals: list[list[float]] = [[] for _ in self.models]
        count = 0
        for unit in self.units:
            if unit.action == "copy":
                continue
            for name, means in zip(unit.names, self._unit_means(unit), strict=True):
                weight = 1 if self.recipe.stats == "filtered" else self.specs[name].numel
                count += weight
                for total, mean in zip(totals, means, strict=True):
                    total.append(mean * weight)
            self.on_read(unit, self._unit_bytes(unit))
        return [math.fsum(total) / max(1, count) for total in totals]

    def _unit_means(self, unit: Unit) -> list[list[float]]:
        """For each member, the mean magnitude of each model's task vector, raw or filtered as the recipe says."""
        if self._filtered_statistics(unit):
            return self._filtered(unit)[1]
        means = []
        for name in unit.names:
            base, models = self._read(name)
            means.append(self._checked(name, abs_means(base, models)))
        return means

    # Merging

    def _copied(self, name: str, *, must_agree: bool) -> Tensor:
        base = self.base.read(name)
        if must_agree:
            for model in self.models:
                require_equal(name, base, model.read(name).to(base.device), model.label)
        spec = self.out_spec(name)
        copied = base.to(spec.dtype, copy=True, memory_format=torch.contiguous_format)
        if copied.dtype != base.dtype and int(copied.isinf().sum()) != int(base.isinf().sum()):
            raise CheckpointError(f"{self.base.origin(name)}: tensor {name!r} does not fit into {spec.dtype_name}")
        return copied

    def _combined(self, unit: Unit) -> list[Tensor]:
        """sum_i lambda_i G_i for each member: filtered, aligned, elected and renormalised as the recipe says."""
        common = self.weights()
        if self._linear(unit):
            sums = self._weighted_sums(unit, self._unit_weights(unit, common))
            if unit.action == "filter":
                before = norm(sums) if self.recipe.renormalize is not None else 0.0
                self._filter(unit, sums)
                self._renormalize(unit, sums, before)
            return sums

        filtered, means = self._filtered(unit)
        weights = self._unit_weights(unit, common, means if self._filtered_statistics(unit) else None)
        factors = self._alignment(unit, means) if self.recipe.align else [1.0] * len(self.models)
        sums = []
        for member in range(len(unit.names)):
            scaled = [factor * weight for factor, weight in zip(factors, weights[member], strict=True)]
            deltas = [task[member] for task in filtered]
            sums.append(elect_and_sum(deltas, scaled) if self.recipe.sign_election else _weighted_sum(deltas, scaled))
        if unit.action == "filter" and self.recipe.renormalize is not None:
            self._renormalize(unit, sums, norm(self._weighted_sums(unit, weights)))
        return sums

    @property
    def _own_weights(self) -> bool:
        """Whether every tensor has weights of its own."""
        return self.recipe.weights == "paper" and self.recipe.scope == "tensor"

    def _filtered_statistics(self, unit: Unit) -> bool:
        return self.recipe.stats == "filtered" and unit.action == "filter"

    def _reads_twice(self, unit: Unit) -> bool:
        """Whether merging a unit reads it twice: for weights of its own, or for the norm of an unfiltered sum."""
        if self._own_weights and not self._filtered_statistics(unit):
            return True
        return not self._linear(unit) and unit.action == "filter" and self.recipe.renormalize is not None

    def _linear(self, unit: Unit) -> bool:
        """Whether the sum of a unit's task vectors can be filtered in their stead."""
        return self.recipe.linear and not (self._own_weights and self._filtered_statistics(unit))

    def _unit_weights(
        self, unit: Unit, common: list[float] | None, means: list[list[float]] | None = None
    ) -> list[list[float]]:
        """lambda_i for each member, from its own ``means`` (measured if not given) where there are no common ones."""
        if common is not None:
            return [common] * len(unit.names)
        return [merging_weights("paper", member) for member in means or self._unit_means(unit)]

    def _alignment(self, unit: Unit, means: Sequence[Sequence[float]]) -> list[float]:
        """The factor of each model; a stack is aligned as the one matrix it stands for."""
        sizes = [self.specs[name].numel for name in unit.names]
        return alignment_factors(
            [
                math.fsum(mean * size for mean, size in zip(column, sizes, strict=True)) / max(1, sum(sizes))
                for column in zip(*means, strict=True)
            ]
        )

    def _weighted_sums(self, unit: Unit, weights: Sequence[Sequence[float]]) -> list[Tensor]:
        """sum_i lambda_i v_i of each member, unfiltered, in the compute dtype."""
        sums = []
        for name, member_weights in zip(unit.names, weights, strict=True):
            base, models = self._read(name)
            total, means = task_vector_sum(base, models, member_weights)
            self._checked(name, means)
            sums.append(total)
        return sums

    def _filtered(self, unit: Unit) -> tuple[list[list[Tensor]], list[list[float]]]:
        """G_i of each model and member, and mean |G_i| of each member and model. Holds K copies of the unit."""
        bases = [self._read_base(name) for name in unit.names]
        filtered = []
        for model in self.models:
            deltas = []
            for name, base in zip(unit.names, bases, strict=True):
                delta, mean = task_vector_sum(base, [model.read(name).to(base.device)], [1.0])
                self._checked(name, mean)
                deltas.append(delta)
            if unit.action == "filter":
                self._filter(unit, deltas)
            filtered.append(deltas)
        means = []
        for member in range(len(unit.names)):
            tasks = [task[member] for task in filtered]
            means.append(abs_means(tasks[0].new_zeros(()).expand_as(tasks[0]), tasks))
        return filtered, means

    def _filter(self, unit: Unit, deltas: Sequence[Tensor]) -> None:
        matrices = filtered_matrices(unit, deltas)
        filter_(matrices, self.recipe.response, backend=self.backend)
        unstack(matrices, deltas)

    def _renormalize(self, unit: Unit, sums: Sequence[Tensor], norm_before: float) -> None:
        if self.recipe.renormalize is None:
            return
        factor = energy_factor(norm_before, norm(sums))
        for name, tensor in zip(unit.names, sums, strict=True):
            tensor.mul_(factor)
            self.energy_factors[name] = factor

    # Reading

    def _compute_dtype(self, name: str) -> torch.dtype:
        stored = [source.specs[name].dtype for source in (self.base, *self.models) if name in source.specs]
        return torch.float64 if torch.float64 in stored else DTYPES[self.recipe.compute_dtype]

    def _device(self, name: str) -> torch.device:
        """Where a tensor is merged: where the base holds it, unless the backend asked for needs another device."""
        device = self.base.device(name)
        return device if self._chosen is None else self._chosen.device(device)

    def _read(self, name: str) -> tuple[Tensor, list[Tensor]]:
        base = self._read_base(name)
        return base, [model.read(name).to(base.device) for model in self.models]

    def _read_base(self, name: str) -> Tensor:
        base = self.base.read(name).to(self._device(name))
        return base.double() if self._compute_dtype(name) == torch.float64 else base  # arithmetic follows the widest

    def _checked(self, name: str, means: list[float]) -> list[float]:
        """A non-finite mean |theta_i - theta_0| betrays a non-finite value; find out whose it is."""
        if not all(map(math.isfinite, means)):
            for source in (self.base, *self.models):
                check_finite(name, source.read(name), source.origin(name))
            raise CheckpointError(f"tensor {name!r}: the difference of a model and the base overflows")
        return means


def _weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    return total
