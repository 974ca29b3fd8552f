"""Experts from checkpoints, one tensor in memory at a time: of single entries, of low rank, masks or gains."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from ..arguments import after, check_models, share_of, whole_number
from ..checkpoint import MERGEABLE, Checkpoint, Source, TensorSpec, open_inputs
from ..checkpoint.compare import compare
from ..checkpoint.finite import check_finite
from ..checkpoint.locate import told_apart
from ..checkpoint.prefixes import Rename
from ..checkpoint.tied import second_everywhere
from ..errors import ArgumentError
from ..merging.selection import Action, Rule, check_rules, left_alone, renames_of, rules_of
from ..merging.statistics_buffers import check_variance, is_of_norm, is_statistic
from ..workers import ALONE, Workers
from .entries import Criterion, EntryExtraction
from .expert import Expert, check_task_name
from .gains import GainExtraction
from .low_rank import LowRankExtraction
from .masks import MaskExtraction
from .names import Scope, Values
from .rescale import check_rescale
from .values import ExpertTensor, LowRankTensor, SparseTensor, coding_of
from .values.gains import Gains

_Extraction: TypeAlias = EntryExtraction | LowRankExtraction | MaskExtraction | GainExtraction


def iter_experts(
    base: Source,
    models: Mapping[str, Source] | Sequence[Source],
    *,
    density: float | str | None = None,
    scope: Scope = "tensor",
    rescale: str | float = "auto",
    values: Values | None = None,
    trim: float = 0.0,
    backbone: Source | None = None,
    budget: float | str | None = None,
    rank: int | None = None,
    select: Sequence[Rule | tuple[str, Action]] = (),
    rename: Sequence[Rename] = (),
    workers: Workers = ALONE,
) -> Iterator[tuple[str, Expert]]:
    """Task names and experts one after the other, holding one expert (with gains: all) and a few tensors at a time.

    As :func:`extract_experts`; all arguments and checkpoints are checked before the first expert is made.
    """
    given = {
        "density": density is not None,
        "scope": scope != "tensor",
        "trim": trim != 0,
        "rescale": rescale != "auto",
        "budget": budget is not None,
        "rank": rank is not None,
        "backbone": backbone is not None,
    }
    coding = _coding(values, [name for name, present in given.items() if present])
    share = None if budget is None else share_of("budget", budget)
    if rank is not None:
        rank = whole_number("rank", rank, 1)
    criterion = Criterion(0.01 if density is None else share_of("density", density), scope, trim)
    if issubclass(coding, SparseTensor):
        check_rescale(rescale, backbone=backbone is not None)
    check_models(models, named=True)
    rules, renames = rules_of(select), renames_of(rename)
    stack = ExitStack()
    with stack:
        named = _named(models)
        places = map(repr, named) if isinstance(models, Mapping) else range(len(named))
        sources = {f"models[{place}]": model for place, model in zip(places, named.values(), strict=True)}
        inputs = open_inputs(
            stack,
            base,
            sources if backbone is None else {**sources, "backbone": backbone},
            merged=lambda names: not left_alone(names, rules),
            renames=renames,
        )
        check_rules(rules, inputs.names, second_everywhere((inputs.base, *inputs.models)))
        comparison = compare(inputs.base, inputs.models, merged=lambda name: not left_alone(inputs.names[name], rules))
        made = (name for name in comparison.names if has_expert(inputs.base.specs[name]))
        names = [name for name in made if name not in inputs.base.buffers]
        statistics = [name for name in comparison.names if _kept_whole(inputs.base.specs[name])]
        merged = None if backbone is None else inputs.models[-1]
        tuned = inputs.models[: len(named)]
        chosen = range(workers.rank, len(named), workers.size)
        extraction: _Extraction
        if issubclass(coding, SparseTensor):
            extraction = EntryExtraction(inputs.base, tuned, names, merged, criterion, rescale, coding)
        else:
            assert merged is not None
            if issubclass(coding, LowRankTensor):
                extraction = LowRankExtraction(merged, tuned, names, coding, share, rank, statistics)
            elif issubclass(coding, Gains):
                _check_unrounded(merged, names)
                extraction = GainExtraction(inputs.base, merged, tuned, names, share, chosen, statistics)
            else:
                extraction = MaskExtraction(inputs.base, merged, tuned, names)
        stack = stack.pop_all()
    return _generate(extraction, list(named), chosen, tuned, statistics, stack)


@after(iter_experts)
def extract_experts(experts: Iterator[tuple[str, Expert]]) -> dict[str, Expert]:
    """The light expert of each model: its task vector's largest entries, times a factor mu; or, with a ``budget`` or a
    ``rank``, the strongest singular vectors of what a merged model lacks of it.

    The experts of all models are held in memory; :func:`iter_experts` yields them one by one instead.

    Args:
        base: state dict, module, or path of a checkpoint.
        models: fine-tuned models of that base with the same tensors, or directories of LoRA or IA3 adapters that PEFT
            trained on it; a mapping names the tasks. In a sequence, models on disk are named after their directory or
            file, and what it is in where two have the same name (``math-model``, ``code-model``), others ``task0``,
            ``task1`` and so on by position.
        density: d, a share such as 0.01, the default, or "1%". A scope of n entries keeps its k = max(1, floor(d n))
            largest, or all its non-zero ones where they are fewer. Equal magnitudes are taken by tensor name, then by
            index, lowest first.
        scope: count by tensor; by row (one index of a tensor's first dimension; the released code); or over the whole
            model (the paper).
        rescale: the rule for mu, or mu itself. With M the kept entries before rounding, E a mean of magnitudes:

            * ``"released"``: ``-mean|M| over kept entries * log10(d) / E(v_i)``
            * ``"paper"``: ``-E(M) over all entries * ln(d) / (lambda_i E(v_i))``, lambda_i = E(v_i) / sum_j E(v_j)
            * ``"auto"``: the released mu, except where it would add more to a tensor than 15 % of what the tensor
              is: ``min(released, max(1, .15 ||theta_0|| / ||M||))``, with spectral norms, for each matrix; all vectors
              share one mu, by their Frobenius norms together. On the large networks that were looked at it is the
              released mu; on small ones, where that does harm, it is lower
            * ``"projection"``: the mu for which ``<theta_hat - theta_0, v_i> = ||v_i||^2``, where theta_hat is
              ``backbone`` plus the expert: along v_i, the sum is as long as the fine-tuned model
            * ``"least_squares"``: ``max(0, <M, theta_i - theta_m> / <M, M>)`` with theta_m the ``backbone``

            Sums run over all tensors that experts are made of. mu is 0 where v_i is.
        values: how entries are stored: "fp32", "bf16" (the default), "fp16", "int8" (a scale per row), "sign" (a scale
            per tensor); or how singular vectors are: "svd2" (two bits an entry, the default), "svd16" (float16). Or
            "mask" (one bit for every entry of the model): with M_i = [v_i (theta_m - theta_0) > 0] and one scale,
            ``sum |v_i| / sum |M_i (theta_m - theta_0)|``, theta_m becomes ``theta_0 + scale M_i (theta_m - theta_0)``.
            With a ``backbone`` by the method "emr" this is EMR-Merging (arXiv 2405.17461). Only ``backbone``,
            ``select`` and ``rename`` apply. Or "gains" (four bits for each singular direction of the merged matrices):
            with U diag(s) V^T = theta_m - theta_0, theta_m becomes ``theta_0 + U diag(g) V^T``, g in proportion to the
            diagonal of U^T v_i V and so long that the matrix has the norm of v_i. It takes a ``backbone`` whose
            directions belong to single tasks, as by the method "jsv", not rounded to 16 bits. With a ``budget``,
            singular vectors of what that leaves are kept as in "svd2". An expert that would tell less than a third
            of the energy of v_i has no gains. All experts are made in one pass.
        trim: the share of largest entries to leave out: the k after the first floor(trim n) of a scope are kept.
        backbone: the merged model theta_m, for the rules that need it, for ``budget`` and ``rank``, masks and gains.
        budget: makes experts of theta_i - theta_m and is the share of the bytes of the model's tensors in float16 that
            an expert file may have, such as "0.3%" or 0.003. All of the file counts. Each tensor is a matrix (with a
            row for each index of the first dimension; a vector is one row), kept as its first singular vectors; bytes
            are given, as long as there are any, to the component with the most energy a bit, over all tensors.
            ``density``, ``scope``, ``trim`` and ``rescale`` do not apply. Two passes read one tensor at a time.
        rank: instead of a budget, the number of components of each matrix; vectors have none. With
            ``values="svd16"``, what Twin-Merging (arXiv 2406.15479) keeps for each task.
        select: rules as of a recipe: tensors with action "copy" or "drop" have no experts, and models may lack them.
        rename: changes of prefixes in the models' names, as in a recipe.
        workers: processes that share the models out: number r of n makes the experts of models r, r + n, r + 2 n, ...

    Returns:
        Experts by task name. They cover every floating tensor that has at least one dimension, except running
        statistics; scalars, integers and second names of tied tensors have none. Running means and variances of norms,
        such as batch norm's, are kept whole, in bfloat16.

    Raises:
        ArgumentError: a bad argument; the message names it.
        CheckpointError: tensors that do not match or are not finite; the message names model and tensor.
    """
    return dict(experts)


def _coding(values: Values | None, given: Sequence[str]) -> type[ExpertTensor]:
    """The coding that is asked for, by name or by the options that are ``given``, if they and it go together."""
    coding = coding_of(values if values is not None else "svd2" if {"budget", "rank"} & {*given} else "bf16")
    if not coding.takes:
        raise ArgumentError(f"values: {coding.coding} does not code single entries, nor what a merged model lacks")
    name = f"values {coding.coding}" + (", which budget and rank choose" if values is None else "")
    for option in given:
        if option not in coding.takes:
            raise ArgumentError(f"{option} is not for {name}; for these there are {', '.join(coding.takes)}")
    if coding.of_backbone and "backbone" not in given:
        raise ArgumentError(f"backbone must be given for {name}: {coding.of_backbone}")
    if issubclass(coding, LowRankTensor) and len({"budget", "rank"} & {*given}) != 1:
        raise ArgumentError(f"budget or rank must be given for {name}, one of the two")
    return coding


def _check_unrounded(backbone: Checkpoint, names: Iterable[str]) -> None:
    """Singular directions whose values are nearly equal are others where the matrix is rounded to 16 bits."""
    for name in names:
        spec = backbone.specs[name]
        if spec.dtype.itemsize < 4 and len(spec.shape) == 2:
            raise ArgumentError(
                f"backbone: {name} is stored in {spec.dtype_name}; gains need the merged model as it was before "
                "it was rounded: merge with out_dtype float32"
            )


def _generate(
    extraction: _Extraction,
    names: Sequence[str],
    chosen: Iterable[int],
    models: Sequence[Checkpoint],
    statistics: Sequence[str],
    stack: ExitStack,
) -> Iterator[tuple[str, Expert]]:
    with stack:
        for i in chosen:
            kept = {name: _statistic(models[i], name) for name in statistics}
            yield names[i], replace(extraction.expert(i), statistics=kept)


def has_expert(spec: TensorSpec) -> bool:
    """Whether experts are made of a tensor: a float of one dimension or more that is not a running statistic."""
    return spec.dtype in MERGEABLE and len(spec.shape) > 0 and spec.numel > 0 and not is_statistic(spec.name)


def _kept_whole(spec: TensorSpec) -> bool:
    return spec.dtype in MERGEABLE and len(spec.shape) == 1 and spec.numel > 0 and is_of_norm(spec.name)


def _statistic(model: Checkpoint, name: str) -> Tensor:
    tensor = model.read(name).detach().to("cpu", torch.bfloat16)
    check_finite(name, tensor, model.label)
    check_variance(name, tensor, [(model.label, tensor)])
    return tensor


def _named(models: Mapping[str, Source] | Sequence[Source]) -> dict[str, Source]:
    if not models:
        raise ArgumentError("models must hold at least one model")
    if isinstance(models, Mapping):
        return {check_task_name(name): model for name, model in models.items()}
    paths = {i: Path(model).resolve() for i, model in enumerate(models) if isinstance(model, str | os.PathLike)}
    named: dict[str, Source] = {}
    for i, model in enumerate(models):
        name = check_task_name(told_apart(paths[i], paths.values())) if i in paths else f"task{i}"
        if name in named:
            raise ArgumentError(f"models: two are called {name!r}; each needs a path of its own, or a name")
        named[name] = model
    return named
