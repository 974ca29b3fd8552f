"""Light experts from checkpoints, one tensor in memory at a time (arXiv 2411.16815, section 4.2)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args

from torch import Tensor, nn

from ..accumulate import abs_means, norm, task_vector_sum
from ..checkpoint import MERGEABLE, Checkpoint, TensorSpec, open_inputs
from ..checkpoint.compare import compare
from ..checkpoint.prefixes import Rename
from ..errors import ArgumentError, CheckpointError
from ..merging.selection import Action, Rule, check_rules, left_alone, renames_of, rules_of
from ..merging.statistics_buffers import is_statistic
from ..methods.rules import Scope
from .expert import Expert, check_task_name
from .rescale import Statistics, TensorStatistics, check_rescale, mu_of
from .select import ModelSelector, Selection, rows_of, select_largest
from .values import ExpertTensor, SparseTensor, coding_of

Model = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module


def extract_experts(
    base: Model,
    models: Mapping[str, Model] | Sequence[Model],
    *,
    density: float = 0.01,
    scope: Scope = "tensor",
    rescale: str | float = "released",
    values: str = "bf16",
    trim: float = 0.0,
    backbone: Model | None = None,
    select: Sequence[Rule | tuple[str, Action]] = (),
    rename: Sequence[Rename] = (),
) -> dict[str, Expert]:
    """The light expert of each model: its task vector's largest entries, times a factor mu.

    The experts of all models are held in memory; :func:`iter_experts` yields them one by one instead.

    Args:
        base: state dict, module, or path of a checkpoint.
        models: fine-tuned models of that base with the same tensors, or directories of LoRA or IA3 adapters that PEFT
            trained on it; a mapping names the tasks. In a sequence, models on disk are named after their directory or
            file, others ``task0``, ``task1`` and so on by position.
        density: d. A scope of n entries keeps its k = max(1, floor(d n)) largest, or all its non-zero ones where they
            are fewer. Equal magnitudes are taken by tensor name, then by index, lowest first.
        scope: count by tensor; by row (one index of a tensor's first dimension; the released code); or over the whole
            model (the paper).
        rescale: the rule for mu, or mu itself. With M the kept entries before rounding, E a mean of magnitudes:

            * ``"released"``: ``-mean|M| over kept entries * log10(d) / E(v_i)``
            * ``"paper"``: ``-E(M) over all entries * ln(d) / (lambda_i E(v_i))``, lambda_i = E(v_i) / sum_j E(v_j)
            * ``"projection"``: the mu for which ``<theta_hat - theta_0, v_i> = ||v_i||^2``, where theta_hat is
              ``backbone`` plus the expert: along v_i, the sum is as long as the fine-tuned model

            Sums run over all tensors that experts are made of. mu is 0 where v_i is.
        values: how values are stored: "fp32", "bf16", "fp16", "int8" (a scale per row), "sign" (a scale per tensor).
        trim: the share of largest entries to leave out: the k after the first floor(trim n) of a scope are kept.
        backbone: the merged model, for ``rescale="projection"`` only.
        select: rules as of a recipe: tensors with action "copy" or "drop" have no experts, and models may lack them.
        rename: changes of prefixes in the models' names, as in a recipe.

    Returns:
        Experts by task name. They cover every floating tensor that has at least one dimension, except running
        statistics; scalars, integers and second names of tied tensors have none.

    Raises:
        ArgumentError: a bad argument; the message names it.
        CheckpointError: tensors that do not match or are not finite; the message names model and tensor.
    """
    return dict(
        iter_experts(
            base,
            models,
            density=density,
            scope=scope,
            rescale=rescale,
            values=values,
            trim=trim,
            backbone=backbone,
            select=select,
            rename=rename,
        )
    )


def iter_experts(
    base: Model,
    models: Mapping[str, Model] | Sequence[Model],
    *,
    density: float = 0.01,
    scope: Scope = "tensor",
    rescale: str | float = "released",
    values: str = "bf16",
    trim: float = 0.0,
    backbone: Model | None = None,
    select: Sequence[Rule | tuple[str, Action]] = (),
    rename: Sequence[Rename] = (),
) -> Iterator[tuple[str, Expert]]:
    """Task names and experts one after the other, holding one expert and a few tensors at a time.

    As :func:`extract_experts`; all arguments and checkpoints are checked before the first expert is made.
    """
    criterion, coding = _Criterion(density, scope, trim), coding_of(values)
    if not issubclass(coding, SparseTensor):
        raise ArgumentError(f"values: {values} does not code single entries, which density keeps")
    check_rescale(rescale, backbone=backbone is not None)
    rules, renames = rules_of(select), renames_of(rename)
    stack = ExitStack()
    with stack:
        named = _named(models)
        sources = {_argument(models, name): model for name, model in named.items()}
        inputs = open_inputs(
            stack,
            base,
            sources if backbone is None else {**sources, "backbone": backbone},
            merged=lambda names: not left_alone(names, rules),
            renames=renames,
        )
        check_rules(rules, inputs.names)
        comparison = compare(inputs.base, inputs.models, merged=lambda name: not left_alone(inputs.names[name], rules))
        made = (name for name in comparison.names if has_expert(inputs.base.specs[name]))
        names = [name for name in made if name not in inputs.base.buffers]
        merged = None if backbone is None else inputs.models[-1]
        extraction = _Extraction(inputs.base, inputs.models[: len(named)], names, merged, criterion, rescale, coding)
        stack = stack.pop_all()
    return _generate(extraction, list(named), stack)


def _generate(extraction: _Extraction, names: Sequence[str], stack: ExitStack) -> Iterator[tuple[str, Expert]]:
    with stack:
        for i, name in enumerate(names):
            yield name, extraction.expert(i)


def has_expert(spec: TensorSpec) -> bool:
    """Whether experts are made of a tensor: a float of one dimension or more that is not a running statistic."""
    return spec.dtype in MERGEABLE and len(spec.shape) > 0 and spec.numel > 0 and not is_statistic(spec.name)


def kept_entries(n: int, density: float) -> int:
    """k = max(1, floor(d n)), without the rounding error of the product: 0.29 * 100 = 28.999999999999996 gives 29."""
    return max(1, math.floor(round(density * n, 9)))


@dataclass(frozen=True)
class _Criterion:
    """Which entries are kept."""

    density: float
    scope: Scope
    trim: float

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise ArgumentError(f"density must be between 0 and 1, both excluded, got {self.density!r}")
        if not 0 <= self.trim < 1:
            raise ArgumentError(f"trim must be at least 0 and less than 1, got {self.trim!r}")
        if self.scope not in get_args(Scope):
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
class _Extraction:
    base: Checkpoint
    models: Sequence[Checkpoint]
    names: Sequence[str]
    backbone: Checkpoint | None
    criterion: _Criterion
    rescale: str | float
    coding: type[SparseTensor]

    def expert(self, i: int) -> Expert:
        """The expert of model i."""
        tensors: dict[str, ExpertTensor] = {}
        statistics = []
        for name, selection, sums in self._selections(i):
            tensor = self.coding.encode(self.base.specs[name].shape, selection)
            statistics.append(self._statistics(tensor, selection, sums))
            if tensor.entries:
                tensors[name] = tensor
        density, scope = self.criterion.density, self.criterion.scope
        mu = mu_of(self.rescale, Statistics(statistics, density, lambda: self.model_means))
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
            raise CheckpointError(f"{self.models[i].label}: the task vector of {name!r} is not finite")

    def _sums(self, i: int, name: str, base: Tensor, model: Tensor) -> _Sums:
        mean = abs_means(base, [model])[0]
        if not math.isfinite(mean):
            raise CheckpointError(f"{self.models[i].label}: the task vector of {name!r} is not finite")
        shortfall = 0.0
        if self.backbone is not None:
            merged = self.backbone.read(name).to(base.device)
            # ||v||^2 - <m, v> = (||v||^2 + ||v - m||^2 - ||m||^2) / 2 with v and m counted from theta_0.
            squares = [_square(base, model), _square(merged, model), _square(base, merged)]
            if not all(math.isfinite(square) for square in squares):
                raise CheckpointError(f"{self.backbone.label}: tensor {name!r} is not finite")
            shortfall = (squares[0] + squares[1] - squares[2]) / 2
        return _Sums(mean * base.numel(), shortfall)

    def _statistics(self, tensor: SparseTensor, selection: Selection, sums: _Sums) -> TensorStatistics:
        product = 0.0
        if self.backbone is not None:
            product = float((tensor.values().double() * selection.values.double()).numpy().sum())
        kept = float(selection.values.abs().double().numpy().sum())
        return TensorStatistics(tensor.numel, sums.magnitude, tensor.entries, kept, sums.shortfall, product)

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


def _argument(models: Mapping[str, Model] | Sequence[Model], name: str) -> str:
    """What a message calls a model in memory."""
    if isinstance(models, Mapping):
        return f"models[{name!r}]"
    return f"models[{list(_named(models)).index(name)}]"


def _square(origin: Tensor, tensor: Tensor) -> float:
    return norm([task_vector_sum(origin, [tensor], [1.0])[0]]) ** 2


def _named(models: Mapping[str, Model] | Sequence[Model]) -> dict[str, Model]:
    if not models:
        raise ArgumentError("models must hold at least one model")
    if isinstance(models, Mapping):
        return {check_task_name(name): model for name, model in models.items()}
    named: dict[str, Model] = {}
    for i, model in enumerate(models):
        on_disk = isinstance(model, (str, os.PathLike))
        name = check_task_name(Path(str(model)).resolve().name.removesuffix(".safetensors") if on_disk else f"task{i}")
        if name in named:
            raise ArgumentError(f"models: two are called {name!r}; name them with a mapping")
        named[name] = model
    return named
