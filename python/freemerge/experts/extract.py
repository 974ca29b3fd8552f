"""Light experts from checkpoints, one tensor in memory at a time (arXiv 2411.16815, section 4.2)."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from ..accumulate import abs_means, norm, task_vector_sum
from ..checkpoint import MERGEABLE, Checkpoint, TensorSpec, open_inputs
from ..checkpoint.compare import compare
from ..checkpoint.prefixes import Rename
from ..errors import ArgumentError, CheckpointError
from ..merging.selection import Action, Rule, check_rules, left_alone, renames_of, rules_of
from ..merging.statistics_buffers import is_statistic
from ..methods.rules import Scope
from .budget import share_of
from .expert import Expert, check_task_name
from .leading import spectral_norm
from .low_rank import LowRankExtraction
from .rescale import RULES, Statistics, TensorStatistics, check_rescale, factors_of
from .select import ModelSelector, Selection, rows_of, select_largest
from .values import ExpertTensor, LowRankTensor, SparseTensor, coding_of

Model = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module


def extract_experts(
    base: Model,
    models: Mapping[str, Model] | Sequence[Model],
    *,
    density: float | None = None,
    scope: Scope = "tensor",
    rescale: str | float = "auto",
    values: str | None = None,
    trim: float = 0.0,
    backbone: Model | None = None,
    budget: float | str | None = None,
    rank: int | None = None,
    select: Sequence[Rule | tuple[str, Action]] = (),
    rename: Sequence[Rename] = (),
) -> dict[str, Expert]:
    """The light expert of each model: its task vector's largest entries, times a factor mu; or, with a ``budget`` or a
    ``rank``, the strongest singular vectors of what a merged model lacks of it.

    The experts of all models are held in memory; :func:`iter_experts` yields them one by one instead.

    Args:
        base: state dict, module, or path of a checkpoint.
        models: fine-tuned models of that base with the same tensors, or directories of LoRA or IA3 adapters that PEFT
            trained on it; a mapping names the tasks. In a sequence, models on disk are named after their directory or
            file, others ``task0``, ``task1`` and so on by position.
        density: d, .01 by default. A scope of n entries keeps its k = max(1, floor(d n)) largest, or all its non-zero
            ones where they are fewer. Equal magnitudes are taken by tensor name, then by index, lowest first.
        scope: count by tensor; by row (one index of a tensor's first dimension; the released code); or over the whole
            model (the paper).
        rescale: the rule for mu, or mu itself. With M the kept entries before rounding, E a mean of magnitudes:

            * ``"released"``: ``-mean|M| over kept entries * log10(d) / E(v_i)``
            * ``"paper"``: ``-E(M) over all entries * ln(d) / (lambda_i E(v_i))``, lambda_i = E(v_i) / sum_j E(v_j)
            * ``"auto"``: the released mu, except where it would add more to a tensor than a quarter of what the tensor
              is: ``min(released, max(1, ||theta_0|| / (4 ||M||)))``, with spectral norms, for each matrix; all vectors
              share one mu, by their Frobenius norms together. On the large networks that were looked at it is the
              released mu; on small ones, where that does harm, it is lower
            * ``"projection"``: the mu for which ``<theta_hat - theta_0, v_i> = ||v_i||^2``, where theta_hat is
              ``backbone`` plus the expert: along v_i, the sum is as long as the fine-tuned model
            * ``"least_squares"``: ``max(0, <M, theta_i - theta_m> / <M, M>)`` with theta_m the ``backbone``

            Sums run over all tensors that experts are made of. mu is 0 where v_i is.
        values: how entries are stored: "fp32", "bf16" (the default), "fp16", "int8" (a scale per row), "sign" (a scale
            per tensor); or how singular vectors are: "svd2" (two bits an entry, the default), "svd16" (float16).
        trim: the share of largest entries to leave out: the k after the first floor(trim n) of a scope are kept.
        backbone: the merged model theta_m, for the rules that need it, and for ``budget`` and ``rank``.
        budget: makes experts of theta_i - theta_m and is the share of the bytes of the model's tensors in float16 that
            an expert file may have, such as "0.3%" or 0.003. All of the file counts. Each tensor is a matrix (with a
            row for each index of the first dimension; a vector is one row), kept as its first singular vectors; bytes
            are given, as long as there are any, to the component with the most energy a bit, over all tensors.
            ``density``, ``scope``, ``trim`` and ``rescale`` do not apply. Two passes read one tensor at a time.
        rank: instead of a budget, the number of components of each matrix; vectors have none. With
            ``values="svd16"``, what Twin-Merging (arXiv 2406.15479) keeps for each task.
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
            budget=budget,
            rank=rank,
            select=select,
            rename=rename,
        )
    )


def iter_experts(
    base: Model,
    models: Mapping[str, Model] | Sequence[Model],
    *,
    density: float | None = None,
    scope: Scope = "tensor",
    rescale: str | float = "auto",
    values: str | None = None,
    trim: float = 0.0,
    backbone: Model | None = None,
    budget: float | str | None = None,
    rank: int | None = None,
    select: Sequence[Rule | tuple[str, Action]] = (),
    rename: Sequence[Rename] = (),
) -> Iterator[tuple[str, Expert]]:
    """Task names and experts one after the other, holding one expert and a few tensors at a time.

    As :func:`extract_experts`; all arguments and checkpoints are checked before the first expert is made.
    """
    coding = coding_of(values if values is not None else "bf16" if budget is None and rank is None else "svd2")
    low_rank = issubclass(coding, LowRankTensor)
    if not low_rank and not issubclass(coding, SparseTensor):
        raise ArgumentError(f"values: {values} does not code single entries, which density keeps")
    if (budget is not None) + (rank is not None) != low_rank:
        raise ArgumentError(
            'budget or rank must be given for values="svd2" or "svd16", one of them, and for these only'
        )
    criterion = _Criterion(0.01 if density is None else density, scope, trim)
    if low_rank:
        if (density, scope, trim, rescale) != (None, "tensor", 0, "auto"):
            raise ArgumentError("density, scope, trim and rescale are for single entries: budget and rank exclude them")
        if backbone is None:
            raise ArgumentError("backbone must be given for budget and rank: experts hold what it lacks")
        if rank is not None and rank < 1:
            raise ArgumentError(f"rank must be at least 1, got {rank}")
    else:
        check_rescale(rescale, backbone=backbone is not None)
    share = None if budget is None else share_of(budget)
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
        tuned = inputs.models[: len(named)]
        extraction: _Extraction | LowRankExtraction
        if merged is not None and issubclass(coding, LowRankTensor):
            extraction = LowRankExtraction(merged, tuned, names, coding, share, rank)
        else:
            assert issubclass(coding, SparseTensor)
            extraction = _Extraction(inputs.base, tuned, names, merged, criterion, rescale, coding)
        stack = stack.pop_all()
    return _generate(extraction, list(named), stack)


def _generate(
    extraction: _Extraction | LowRankExtraction, names: Sequence[str], stack: ExitStack
) -> Iterator[tuple[str, Expert]]:
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

    def _statistics(self, name: str, tensor: SparseTensor, selection: Selection, sums: _Sums) -> TensorStatistics:
        kept = float(selection.values.abs().double().numpy().sum())
        found = TensorStatistics(tensor.numel, sums.magnitude, tensor.entries, kept, sums.shortfall)
        if self.backbone is not None:
            stored, v = tensor.values().double().numpy(), selection.values.double().numpy()
            product, square = float((stored * v).sum()), float((stored * stored).sum())
            found = dataclasses.replace(found, kept_product=product, kept_square=square)
        if self.rescale in RULES and RULES[self.rescale].needs_norms:
            dense = torch.zeros(tensor.numel)
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


def _argument(models: Mapping[str, Model] | Sequence[Model], name: str) -> str:
    """What a message calls a model in memory."""
    if isinstance(models, Mapping):
        return f"models[{name!r}]"
    return f"models[{list(_named(models)).index(name)}]"


def _norm(tensor: Tensor) -> float:
    """Spectral norm of the matrix of a tensor's rows; the Frobenius norm of a vector."""
    return spectral_norm(tensor.reshape(rows_of(tensor.shape))) if tensor.ndim > 1 else norm([tensor])


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
