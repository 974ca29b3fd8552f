"""The merge of a single tensor, for hosts that read and write the checkpoints themselves."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ..checkpoint import TensorSpec
from ..dense import dense
from ..errors import ArgumentError
from ..methods import Method
from .recipe import Recipe, checked_recipe
from .run import merge
from .selection import Rule, Split, Stack, View
from .units import plan_units


def merge_tensors(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    method: str | Method | None = None,
    recipe: Recipe | None = None,
    weights: Sequence[float] | None = None,
    name: str | None = None,
) -> Tensor:
    """Merge one tensor of K fine-tuned models, exactly as :func:`merge` does within a model.

    Args:
        base: the tensor of the base, of any shape and strides, on any device.
        tensors: the same tensor of K >= 1 models, with its shape.
        method: the name of a method of :mod:`freemerge.methods`, with its defaults, or a method with its parameters.
        recipe: instead of a method, a whole recipe. The default is ``Recipe()``, FR-Merging.
        weights: K coefficients lambda_i instead of those that the method would choose, as those that a
            :class:`Report` names. The scale stays that of the recipe. If not given, statistics over "the whole model"
            are those of this tensor.
        name: the tensor's name in the model. The recipe's rules, splits and defaults go by it; without a name none
            apply.

    Returns:
        A new contiguous tensor on the base's device, with its dtype (or the recipe's ``out_dtype``). It is equal, bit
        for bit, to what :func:`merge` gives for this tensor with these weights. Inputs are not modified.

    Raises:
        ArgumentError: an argument is invalid, or the recipe stacks this tensor with others.
        CheckpointError: a value is not finite, or tensors that can only be copied differ.
    """
    if method is not None and recipe is not None:
        raise ArgumentError("method and recipe exclude each other; name the method in the recipe")
    recipe = Recipe(method=method) if method is not None else checked_recipe(recipe)
    _check_tensors(base, tensors)
    if weights is not None:
        scale = recipe.global_scale(len(tensors))
        recipe = recipe.replace(weights=weights, scale="auto" if scale is None else scale)
    key = "tensor" if name is None else name
    select, views = _rules_for(TensorSpec(key, tuple(base.shape), base.dtype), recipe) if name is not None else ((), ())
    return merge({key: base}, [{key: tensor} for tensor in tensors], recipe.replace(select=select, views=views))[key]


def _check_tensors(base: object, tensors: object) -> None:
    if not isinstance(base, Tensor):
        raise ArgumentError(f"base must be a tensor, got {type(base).__name__}")
    if not isinstance(tensors, Sequence) or not tensors:
        raise ArgumentError("tensors must be a list of at least one tensor")
    dense(base, "base")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentError(f"tensors[{i}] must be a tensor, got {type(tensor).__name__}")
        dense(tensor, f"tensors[{i}]")
        if tensor.shape != base.shape:
            raise ArgumentError(f"tensors[{i}] has shape {tuple(tensor.shape)} but base has {tuple(base.shape)}")


def _rules_for(spec: TensorSpec, recipe: Recipe) -> tuple[tuple[Rule, ...], tuple[View, ...]]:
    """The rules and views of a recipe that are about one tensor."""
    select = tuple(rule for rule in recipe.select if fnmatchcase(spec.name, rule.pattern))
    if plan_units({spec.name: spec}, select)[0].action != "filter":
        return select, ()
    for view in recipe.views:
        if isinstance(view, Stack) and any(fnmatchcase(spec.name, pattern) for pattern in view.patterns):
            raise ArgumentError(f"views: {spec.name} is stacked with other tensors; merge them together by merge()")
    return select, tuple(
        view for view in recipe.views if isinstance(view, Split) and fnmatchcase(spec.name, view.pattern)
    )
