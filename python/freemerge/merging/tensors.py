"""The merge of single tensors, for hosts that read and write the checkpoints themselves."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ..checkpoint import MERGEABLE, TensorSpec
from ..dense import dense, overwrite
from ..errors import ArgumentError
from ..methods import Method
from ..methods.parameters import Parameter, parameters_of
from ..overlap import internal_overlap
from .recipe import Recipe, checked_recipe
from .run import merged_in_memory, open_merger
from .selection import Rule, Split, Stack, View
from .units import plan_units, require_equal


def merge_tensors(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    method: str | Method | None = None,
    recipe: Recipe | None = None,
    weights: Sequence[float] | None = None,
    name: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Merge one tensor of K fine-tuned models, exactly as :func:`merge` does within a model.

    Args:
        base: the tensor of the base, of any shape and strides, on any device.
        tensors: the same tensor of K >= 1 models, with its shape.
        method: the name of a method of :mod:`freemerge.methods`, with its defaults, or a method with its parameters.
        recipe: instead of a method, a whole recipe. The default is ``Recipe()``, FR-Merging.
        weights: K coefficients lambda_i instead of those that the method would choose, as :func:`task_weights` finds
            them over the whole model. The scale stays that of the recipe. If not given, statistics over "the whole
            model" are those of this tensor.
        name: the tensor's name in the model. The recipe's rules, splits and defaults go by it; without a name none
            apply.
        out: receives the result: of its shape, dtype and device, with any strides. It may be an input, or share memory
            with inputs: it is written when all is done, and not at all after an error.

    Returns:
        ``out``, or a new contiguous tensor on the base's device, with its dtype (or the recipe's ``out_dtype``). It is
        equal, bit for bit, to what :func:`merge` gives for this tensor of a state dict with these weights. Inputs are
        not modified, and gradients are not recorded.

    Raises:
        ArgumentError: an argument is invalid, or the recipe stacks this tensor with others, or drops it.
        CheckpointError: a value is not finite, or tensors that can only be copied differ.
    """
    return _merge_one("tensors", base, tensors, checked_recipe(recipe, method), weights, name, out)


def parameters_for_hosts(method: type[Method]) -> dict[str, Parameter]:
    """What a host that merges tensor by tensor offers for a method: its parameters, and the scale."""
    return {"scale": parameters_of(Recipe)["scale"], **parameters_of(method)}


def _merge_one(
    argument: str,
    base: Tensor,
    tensors: Sequence[Tensor],
    recipe: Recipe,
    weights: Sequence[float] | None,
    name: str | None,
    out: Tensor | None,
) -> Tensor:
    """What :func:`merge_tensors` returns. ``argument``: what messages call the tensors."""
    _check_shapes(argument, base, tensors)
    if name is not None and not isinstance(name, str):
        raise ArgumentError(f"name must be that of a tensor, got {name!r}")
    if weights is not None:
        scale = recipe.global_scale(len(tensors))
        recipe = recipe.replace(weights=weights, scale=recipe.scale if scale is None else scale)
    key = "tensor" if name is None else name
    spec = TensorSpec(key, tuple(base.shape), base.dtype)
    select, views = _rules_for(spec, recipe) if name is not None else ((), ())
    if out is not None:
        wanted = recipe.out_dtype if base.dtype in MERGEABLE else None
        _check_out(out, base, base.dtype if wanted is None else getattr(torch, wanted))
    layers = [layer for layer in recipe.layers if name is not None and fnmatchcase(name, layer.pattern)]
    recipe = recipe.replace(select=select, views=views, layers=layers, rename=())
    if base.dtype in MERGEABLE:
        with ExitStack() as stack:
            models = [{key: tensor} for tensor in tensors]
            of_models = argument == "tensors"
            merger = open_merger(stack, {key: base}, models, recipe, argument=argument, of_models=of_models)
            merged = merged_in_memory(merger, merger.measure())[key]
    else:  # of which no model consists
        merged = _copied(spec, base, tensors, select)
    if out is None:
        return merged
    return overwrite(out, merged)


def merge_deltas(
    deltas: Sequence[Tensor],
    *,
    method: str | Method | None = None,
    recipe: Recipe | None = None,
    weights: Sequence[float] | None = None,
    name: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Merge one tensor of K task vectors v_i = theta_i - theta_0, for hosts that hold these instead of models.

    Returns ``scale * merged``, which is to be added to theta_0, in the dtype of ``deltas[0]`` (or the recipe's
    ``out_dtype``). All else is as for :func:`merge_tensors`; where v_i is exact in its dtype, so is this method's view
    of it, whatever theta_0 is.
    """
    recipe = checked_recipe(recipe, method)
    _check_sequence("deltas", deltas)
    for i, delta in enumerate(deltas):
        if dense(delta, f"deltas[{i}]").dtype not in MERGEABLE:
            raise ArgumentError(f"deltas[{i}] must be float32, float64, bfloat16 or float16, got {delta.dtype}")
    first = dense(deltas[0], "deltas[0]")
    origin = torch.zeros((), dtype=first.dtype, device=first.device).expand(first.shape)
    return _merge_one("deltas", origin, deltas, recipe, weights, name, out)


def _check_shapes(argument: str, base: Tensor, tensors: object) -> None:
    shape = dense(base, "base").shape
    first = "base" if argument == "tensors" else f"{argument}[0]"
    for i, tensor in enumerate(_check_sequence(argument, tensors)):
        if dense(tensor, f"{argument}[{i}]").shape != shape:
            raise ArgumentError(f"{argument}[{i}] has shape {tuple(tensor.shape)} but {first} has {tuple(shape)}")


def _check_sequence(name: str, tensors: object) -> Sequence[Tensor]:
    if not isinstance(tensors, Sequence) or not tensors:
        raise ArgumentError(f"{name} must be a list of at least one tensor")
    return tensors


def _check_out(out: Tensor, base: Tensor, dtype: torch.dtype) -> None:
    tensor = dense(out, "out")
    if tensor.shape != base.shape or tensor.dtype != dtype or tensor.device != base.device:
        raise ArgumentError(f"out must be a {dtype} tensor of shape {tuple(base.shape)} on {base.device}")
    if internal_overlap(tensor.shape, tensor.stride()):
        raise ArgumentError(f"out may overlap itself in memory (strides {tensor.stride()})")
    if tensor.requires_grad and not tensor.is_leaf:
        raise ArgumentError("out is part of an autograd graph, which writing would break; pass out.detach()")


def _copied(spec: TensorSpec, base: Tensor, tensors: Sequence[Tensor], select: Sequence[Rule]) -> Tensor:
    """What is made within a model of a tensor that can only be copied, such as integers."""
    (unit,) = plan_units({spec.name: spec}, select)
    whole = dense(base, "base").detach()
    for i, tensor in enumerate(tensors if unit.must_agree else ()):
        require_equal(spec.name, whole, dense(tensor, f"tensors[{i}]").to(whole.device), f"tensors[{i}]")
    return whole.clone(memory_format=torch.contiguous_format)


def _rules_for(spec: TensorSpec, recipe: Recipe) -> tuple[tuple[Rule, ...], tuple[View, ...]]:
    """The rules and views of a recipe that are about one tensor."""
    select = tuple(rule for rule in recipe.select if fnmatchcase(spec.name, rule.pattern))
    units = plan_units({spec.name: spec}, select)
    if not units:
        raise ArgumentError(f"select: {spec.name} is left out of the merged model, so there is nothing to return")
    if units[0].action != "filter":
        return select, ()
    for view in recipe.views:
        if isinstance(view, Stack) and any(fnmatchcase(spec.name, pattern) for pattern in view.patterns):
            raise ArgumentError(f"views: {spec.name} is stacked with other tensors; merge them together by merge()")
    return select, tuple(
        view for view in recipe.views if isinstance(view, Split) and fnmatchcase(spec.name, view.pattern)
    )
