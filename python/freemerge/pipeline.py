"""The only place where reader, task vectors, filter, merging rules and writer meet.

One unit (a tensor, or a few that a view stacks) is in memory at a time: base and K models are read, their weighted task
vectors summed, filtered once, scaled, added to the base and handed on. Statistics over the whole model need a pass of
their own before that; per-tensor ones do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .accumulate import abs_means, add_round, task_vector_sum
from .checkpoint import Checkpoint, CheckpointWriter, TensorSpec, compare
from .errors import ArgumentError, CheckpointError
from .merging import alignment_factors, elect_and_sum, energy_factor, merging_scale, merging_weights
from .progress import Progress
from .recipe import DTYPES, Recipe
from .responses import Response
from .spectral import Plan, explain, filter_
from .task_vector import MERGEABLE, Action, Unit, filtered_matrices, plan_units, require_equal, unstack

Model = str | Path | Mapping[str, Tensor] | nn.Module

REMOVED_TOO_LITTLE = 1e-3  # below this share of the spectrum a filter hardly does anything
REMOVED_TOO_MUCH = 0.9


@dataclass(frozen=True)
class Decision:
    """What happens to one tensor. ``removed`` is the share of its spectrum that the filter takes away."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    action: Action
    seen_as: tuple[tuple[int, ...], ...] = ()  # shapes of the matrices that are filtered
    stacked_with: tuple[str, ...] = ()
    removed: float | None = None
    backend: str | None = None
    form: str | None = None


@dataclass(frozen=True)
class Inspection:
    """Everything that is known about a merge before it starts."""

    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]
    read_bytes: int
    write_bytes: int
    passes: int


@dataclass(frozen=True)
class Report:
    """What a merge did: the weight of each model (``None`` where weights differ from tensor to tensor) and scale."""

    weights: tuple[float, ...] | None
    scale: float
    inspection: Inspection
    energy_factors: dict[str, float] = field(default_factory=dict)
    out: Path | None = None


def merge(base: Model, models: Sequence[Model], recipe: Recipe | None = None, *, backend: str = "auto") -> dict[str, Tensor]:
    """Merge fine-tuned models of one base in memory: ``theta_0 + scale * sum_i lambda_i filter(theta_i - theta_0)``.

    Args:
        base: state dict, module, or path of a checkpoint.
        models: K >= 1 of the same, with the same tensor names and shapes.
        recipe: how to merge; the default is FR-Merging with settings that suit most models, see :class:`Recipe`.
        backend: "auto", or the name of the backend that must filter (see :func:`freemerge.backends`).

    Returns:
        A new state dict in the base's names, shapes and (unless ``recipe.out_dtype``) dtypes. Inputs are not modified,
        and no returned tensor shares memory with them.

    Raises:
        ArgumentError, CheckpointError: for a bad recipe, mismatched or non-finite inputs; the message names the tensor.
        BackendError: if the backend asked for cannot run.

    Source: arXiv 2411.16815, FR-Merging.
    """
    with ExitStack() as stack:
        merger = _open(stack, base, models, recipe, backend)
        return {name: tensor for unit in merger.units for name, tensor in merger.merged(unit)}


def merge_checkpoints(
    base: Model,
    models: Sequence[Model],
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    backend: str = "auto",
    force: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    progress: bool = True,
) -> Report:
    """Merge checkpoints into the directory (or ``.safetensors`` file) ``out``, holding a few tensors at a time.

    Everything is checked before the first byte is written, and ``out`` appears at once when it is complete; an error or
    an interruption leaves what was there before. Config, tokenizer and code files of the base directory are carried
    over, and a model card and a manifest (``freemerge.json``) are written. The same inputs and recipe give the same
    bytes, whatever the number of threads.

    Args:
        base, models, recipe, backend: as for :func:`merge`.
        out: must not exist, unless ``force`` allows to replace it.
        max_shard_bytes: size above which the output is sharded.
        progress: show a progress bar on standard error.

    Raises:
        RefusedError: ``out`` exists and ``force`` is not given. Otherwise as :func:`merge`.
    """
    with ExitStack() as stack:
        merger = _open(stack, base, models, recipe, backend)
        inspection = merger.inspect()
        specs = [merger.out_spec(name) for unit in merger.units for name in unit.names]
        writer = stack.enter_context(
            CheckpointWriter(Path(out), specs, max_shard_bytes=max_shard_bytes, overwrite=force)
        )
        bar = stack.enter_context(Progress(inspection.read_bytes, enabled=progress))
        merger.progress = bar
        for unit in merger.units:
            for name, tensor in merger.merged(unit):
                writer.write(name, tensor)
        report = merger.report(inspection, Path(out))
        writer.describe(report_config(merger, report))
    return report


def inspect(base: Model, models: Sequence[Model], recipe: Recipe | None = None, *, backend: str = "auto") -> Inspection:
    """Check the inputs of a merge and say what would happen to every tensor, without reading or writing any data."""
    with ExitStack() as stack:
        return _open(stack, base, models, recipe, backend).inspect()


def _open(stack: ExitStack, base: Model, models: Sequence[Model], recipe: Recipe | None, backend: str) -> _Merger:
    recipe = recipe or Recipe()
    if isinstance(models, str | Path | Mapping | nn.Module):
        raise ArgumentError("models must be a list of models, got a single one")
    if not models:
        raise ArgumentError("models must name at least one fine-tuned model")
    if isinstance(recipe.weights, tuple) and len(recipe.weights) != len(models):
        raise ArgumentError(f"weights has {len(recipe.weights)} numbers for {len(models)} models")
    opened = [stack.enter_context(Checkpoint.open(model)) for model in (base, *models)]
    compare(opened[0], opened[1:])
    return _Merger(opened[0], opened[1:], recipe, backend)


class _Merger:
    """One merge: the inputs, what to do with each unit, and the weights once they are known."""

    def __init__(self, base: Checkpoint, models: Sequence[Checkpoint], recipe: Recipe, backend: str) -> None:
        self.base, self.models, self.recipe, self.backend = base, models, recipe, backend
        self.units = plan_units(base.specs, recipe.select, recipe.views)
        self.scale = merging_scale(recipe.scale, recipe.weights, len(models))
        self.progress: Progress | None = None
        self.energy_factors: dict[str, float] = {}
        self._weights: list[float] | None = None

    # What is known without reading a tensor

    @property
    def needs_statistics_pass(self) -> bool:
        return self.recipe.weights == "paper" and self.recipe.scope == "model"

    def out_spec(self, name: str) -> TensorSpec:
        spec = self.base.specs[name]
        if self.recipe.out_dtype is None or spec.dtype not in MERGEABLE:
            return spec
        return TensorSpec(name, spec.shape, DTYPES[self.recipe.out_dtype])

    def compute_dtype(self, name: str) -> torch.dtype:
        if any(source.specs[name].dtype == torch.float64 for source in (self.base, *self.models)):
            return torch.float64
        return DTYPES[self.recipe.compute_dtype]

    def inspect(self) -> Inspection:
        decisions = [decision for unit in self.units for decision in self._decide(unit)]
        read = sum(source.specs[name].nbytes for source in (self.base, *self.models) for name in source.specs)
        passes = 2 if self.needs_statistics_pass else 1
        write = sum(self.out_spec(name).nbytes for name in self.base.specs)
        return Inspection(tuple(decisions), tuple(_warnings(decisions)), read * passes, write, passes)

    def _decide(self, unit: Unit) -> Iterator[Decision]:
        shapes = self._filtered_shapes(unit) if unit.action == "filter" else ()
        plan = self._plan(shapes[0], unit) if shapes else None
        removed = _mean_removed(self.recipe.response, shapes) if shapes else None
        for name in unit.names:
            spec = self.base.specs[name]
            yield Decision(
                name,
                spec.shape,
                str(spec.dtype).removeprefix("torch."),
                unit.action,
                shapes if shapes != (spec.shape,) else (),
                unit.names if len(unit.names) > 1 else (),
                removed,
                plan.backend if plan else None,
                plan.form if plan else None,
            )

    def _filtered_shapes(self, unit: Unit) -> tuple[tuple[int, ...], ...]:
        shape = self.base.specs[unit.names[0]].shape
        if len(unit.names) > 1:
            return ((sum(self.base.specs[name].shape[0] for name in unit.names), shape[1]),)
        return tuple((rows, *shape[1:]) for rows in unit.parts) or (shape,)

    def _plan(self, shape: tuple[int, ...], unit: Unit) -> Plan:
        return explain(shape, self.recipe.response, dtype=self.compute_dtype(unit.names[0]), backend=self.backend)

    def report(self, inspection: Inspection, out: Path) -> Report:
        weights = None if self.recipe.weights == "paper" and self.recipe.scope == "tensor" else tuple(self.weights())
        return Report(weights, self.scale, inspection, dict(self.energy_factors), out)

    # Statistics

    def weights(self) -> list[float]:
        """lambda_i over the whole model, measured on first use."""
        if self._weights is None:
            means = self._model_means() if self.needs_statistics_pass else [0.0] * len(self.models)
            self._weights = merging_weights(self.recipe.weights, means)
        return self._weights

    def _model_means(self) -> list[float]:
        """E_i of each model: over all elements (raw), or the mean over tensors of each tensor's mean (filtered)."""
        totals: list[list[float]] = [[] for _ in self.models]
        counts: list[int] = []
        for unit in self.units:
            if unit.action == "copy":
                self._advance(unit)
                continue
            per_tensor = self._filtered(unit)[1] if self._measures_filtered(unit) else self._raw_means(unit)
            for name, means in zip(unit.names, per_tensor, strict=True):
                count = 1 if self.recipe.stats == "filtered" else math.prod(self.base.specs[name].shape)
                counts.append(count)
                for total, mean in zip(totals, means, strict=True):
                    total.append(mean * count)
            self._advance(unit)
        return [math.fsum(total) / max(1, sum(counts)) for total in totals]

    def _measures_filtered(self, unit: Unit) -> bool:
        return self.recipe.stats == "filtered" and unit.action == "filter"

    def _raw_means(self, unit: Unit) -> list[list[float]]:
        """mean |v_i| of each member and model."""
        means = []
        for name in unit.names:
            base, models = self._read(name)
            means.append(abs_means(base, models))
            self._check_finite(name, means[-1])
        return means

    # Merging one unit

    def merged(self, unit: Unit) -> Iterator[tuple[str, Tensor]]:
        """The merged tensors of a unit, in their output dtype."""
        if unit.action == "copy":
            for name in unit.names:
                base, models = self._read(name)
                if unit.must_agree:
                    for source, model in zip(self.models, models, strict=True):
                        require_equal(name, base, model, source.label)
                out_dtype = self.out_spec(name).dtype
                yield name, base.to(out_dtype, copy=True, memory_format=torch.contiguous_format)
        else:
            for name, delta in zip(unit.names, self._combined(unit), strict=True):
                base = self.base.read(name)
                yield name, add_round(base, delta, self.scale, self.out_spec(name).dtype)
        self._advance(unit)

    def _combined(self, unit: Unit) -> list[Tensor]:
        """sum_i lambda_i G_i for each member: filtered, aligned, elected and renormalised as the recipe says."""
        weights = self._unit_weights(unit)
        if self.recipe.linear or unit.action == "merge" and not self.recipe.sign_election and not self.recipe.align:
            sums = self._weighted_sums(unit, weights)
            if unit.action == "filter":
                before = norm(sums)
                self._filter(unit, sums)
                self._renormalize(unit, sums, before)
            return sums
        filtered, means = self._filtered(unit)
        sums = []
        for member, member_means in enumerate(means):
            factors = alignment_factors(member_means) if self.recipe.align else [1.0] * len(self.models)
            scaled = [factor * weight for factor, weight in zip(factors, weights[member], strict=True)]
            deltas = [task[member] for task in filtered]
            sums.append(elect_and_sum(deltas, scaled) if self.recipe.sign_election else _weighted_sum(deltas, scaled))
        if unit.action == "filter" and self.recipe.renormalize == "energy":
            self._renormalize(unit, sums, norm(self._weighted_sums(unit, weights)))
        return sums

    def _unit_weights(self, unit: Unit) -> list[list[float]]:
        """lambda_i for each member of a unit."""
        if self.recipe.weights != "paper" or self.recipe.scope == "model":
            return [self.weights()] * len(unit.names)
        per_tensor = self._filtered(unit)[1] if self._measures_filtered(unit) else self._raw_means(unit)
        return [merging_weights("paper", means) for means in per_tensor]

    def _weighted_sums(self, unit: Unit, weights: Sequence[Sequence[float]]) -> list[Tensor]:
        """sum_i lambda_i v_i of each member, unfiltered, in the compute dtype."""
        sums = []
        for name, member_weights in zip(unit.names, weights, strict=True):
            base, models = self._read(name)
            total, means = task_vector_sum(base, models, member_weights, dtype=self.compute_dtype(name))
            self._check_finite(name, means)
            sums.append(total)
        return sums

    def _filtered(self, unit: Unit) -> tuple[list[list[Tensor]], list[list[float]]]:
        """G_i of each model and member, and mean |G_i| of each member and model. Holds K copies of the unit."""
        filtered = []
        for index in range(len(self.models)):
            one_hot = [[float(i == index) for i in range(len(self.models))]] * len(unit.names)
            deltas = self._weighted_sums(unit, one_hot)
            if unit.action == "filter":
                self._filter(unit, deltas)
            filtered.append(deltas)
        means = [
            [mean_abs(None, [task[member]])[0] for task in filtered] for member in range(len(unit.names))
        ]
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

    def _read(self, name: str) -> tuple[Tensor, list[Tensor]]:
        return self.base.read(name), [model.read(name) for model in self.models]

    def _check_finite(self, name: str, means: Sequence[float]) -> None:
        """A non-finite mean |theta_i - theta_0| betrays a non-finite value; find out whose it is."""
        if all(map(math.isfinite, means)):
            return
        for source in (self.base, *self.models):
            tensor = source.read(name)
            bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            if bad:
                raise CheckpointError(f"{source.label}: tensor {name} has {bad} non-finite values of {tensor.numel()}")
        raise CheckpointError(f"tensor {name}: the difference of model and base overflows {self.compute_dtype(name)}")

    def _advance(self, unit: Unit) -> None:
        if self.progress is not None:
            sources = (self.base, *self.models)
            self.progress.advance(sum(source.specs[name].nbytes for name in unit.names for source in sources))


def _weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    return total


@lru_cache(maxsize=256)
def _removed(response: Response, shape: tuple[int, ...]) -> float:
    return response.removed_fraction(shape)


def _mean_removed(response: Response, shapes: Sequence[tuple[int, ...]]) -> float:
    """Share of the spectrum removed over several matrices, weighted by their elements."""
    sizes = [math.prod(shape) for shape in shapes]
    removed = [_removed(response, shape[-2:]) for shape in shapes]
    return math.fsum(r * n for r, n in zip(removed, sizes, strict=True)) / max(1, sum(sizes))


def _warnings(decisions: Sequence[Decision]) -> Iterator[str]:
    filtered = [d for d in decisions if d.removed is not None]
    much = [d.name for d in filtered if d.removed is not None and d.removed > REMOVED_TOO_MUCH]
    little = [d.name for d in filtered if d.removed is not None and d.removed < REMOVED_TOO_LITTLE]
    for names, text in ((much, f"more than {REMOVED_TOO_MUCH:.0%}"), (little, f"less than {REMOVED_TOO_LITTLE:.1%}")):
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            yield f"the filter removes {text} of the spectrum of {listed}"


def report_config(merger: _Merger, report: Report) -> dict[str, Any]:
    """The report as plain data for the manifest."""
    return {
        "recipe": merger.recipe.to_config(),
        "weights": list(report.weights) if report.weights is not None else "per tensor",
        "scale": report.scale,
        "tensors": {
            decision.name: {
                "action": decision.action,
                **({"backend": decision.backend, "form": decision.form} if decision.backend else {}),
                **({"removed": decision.removed} if decision.removed is not None else {}),
                **({"energy_factor": report.energy_factors[decision.name]} if decision.name in report.energy_factors else {}),
            }
            for decision in report.inspection.decisions
        },
    }
