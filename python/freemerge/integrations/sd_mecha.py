"""Merging methods of freemerge for sd-mecha: importing this module registers them as ``freemerge_fr`` and so on.

``freemerge_fr(base, a, b, cutoff=0.3)``, of this module or by ``sd_mecha.extensions.merge_methods.resolve``, is a node
of a recipe: base and models are in weight space, and so is the result. Its keywords are the parameters of the method,
and ``scale``. Those that are a number or a word are texts: ``scale="0.8"``, ``weights="0.5,0.5"``. sd-mecha merges
tensor by tensor: what a method measures is measured over each tensor, not over the model.
"""

from __future__ import annotations

import inspect
from typing import Any

import sd_mecha
from torch import Tensor

from ..merging.recipe import Recipe
from ..merging.tensors import merge_tensors, parameters_for_hosts
from ..methods import METHODS, Method
from ..methods.parameters import FLAG, WHOLE_NUMBER, Parameter

PREFIX = "freemerge_"


def _type(parameter: Parameter) -> type:
    """What sd-mecha passes for a parameter."""
    if parameter.choices or parameter.kind is None:
        return str
    return bool if parameter.kind is FLAG else int if parameter.kind is WHOLE_NUMBER else float


def _method(method: type[Method]) -> Any:
    """A merge method of sd-mecha, whose parameters its signature declares."""
    known = parameters_for_hosts(method)

    def merged(base: Tensor, *models: Tensor, key: str, **given: Any) -> Tensor:
        values = {name: given[name] for name in known if given.get(name) is not None}
        typed = {name: known[name].parse(name, v) if isinstance(v, str) else v for name, v in values.items()}
        return merge_tensors(base, models, recipe=Recipe(method=method.name, **typed), name=key)

    weights = sd_mecha.Parameter(Tensor, "weight")
    kinds = inspect.Parameter
    merged.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            kinds("base", kinds.POSITIONAL_OR_KEYWORD, annotation=weights),
            kinds("models", kinds.VAR_POSITIONAL, annotation=weights),
            *(
                kinds(name, kinds.KEYWORD_ONLY, default=None, annotation=sd_mecha.Parameter(_type(parameter), "param"))
                for name, parameter in known.items()
            ),
            kinds("given", kinds.VAR_KEYWORD),
        ],
        return_annotation=sd_mecha.Return(Tensor, "weight"),
    )
    return sd_mecha.merge_method(merged, identifier=PREFIX + method.name)


globals().update({PREFIX + method.name: _method(method) for method in METHODS.values()})
