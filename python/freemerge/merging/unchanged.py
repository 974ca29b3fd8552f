"""Merges whose result is one of the inputs: the base, which is refused, or the only model, which is told."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ArgumentError
from ..methods.rules import weights_by_rule
from ..methods.weighted_sum import WeightedSum
from .inspection import Decision
from .recipe import Recipe


def refuse_unchanged(recipe: Recipe, decisions: Sequence[Decision]) -> None:
    """ArgumentError for values by which the base, or its matrices, would be written as a merge."""
    if recipe.scale == 0:
        raise ArgumentError("scale: at 0 the merged model is the base")
    weights = recipe.method.weights
    if isinstance(weights, tuple) and not any(map(any, (weights, *(layer.weights for layer in recipe.layers)))):
        raise ArgumentError("weights: with nothing but zeros the merged model is the base")
    if recipe.method.left_out:
        raise ArgumentError(f"{recipe.method.left_out}; the merged model is the base")
    if all(decision.action == "copy" for decision in decisions):
        raise ArgumentError("select: every tensor is copied or left out, and the merged model is the base")
    removed = [decision.removed for decision in decisions if decision.removed is not None]
    if removed and min(removed) == 1:
        raise ArgumentError(
            "cutoff: the filter removes the whole spectrum of every matrix; a square one ends at a radius of 0.71"
        )


def gives_back(recipe: Recipe, count: int) -> bool:
    """Whether the merge of ``count`` models is the only one of them."""
    method = recipe.method
    if count != 1 or recipe.filter is not None or recipe.layers or not isinstance(method, WeightedSum):
        return False
    return method.weights is not None and weights_by_rule(method.weights, 1) == (1.0,) and recipe.global_scale(1) == 1
