"""A recipe as YAML with comments, to start from."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from ..methods import METHODS
from ..methods.filtered import Filter
from ..methods.parameters import parameters_of
from .recipe import VERSION, Recipe, to_yaml

_OTHERS = {
    "method": f"one of {', '.join(sorted(METHODS))}",
    "response": "the filter of the matrices, by the name of a class of freemerge.responses and its arguments",
    "select": "what happens to tensors, by name; the first rule that fits counts, without one matrices are filtered "
    "and the rest is merged: filter, merge, average, copy, drop",
    "layers": "weights of some tensors, by name; the first pattern that fits counts",
    "views": "tensors that are seen as one matrix, or as several: {stack: [PATTERN, ...]}, {split: PATTERN, parts: 3}",
    "rename": "prefixes of names of models, and those of the base that they stand for",
}


def commented_recipe(recipe: Recipe, head: Sequence[str] = ()) -> str:
    """The recipe as :meth:`Recipe.to_yaml` writes it, each field under what it means and what it may be.

    ``head``: lines of a comment at its beginning.
    """
    known = {**parameters_of(type(recipe.method)), **parameters_of(Recipe)}
    if recipe.filter is not None:
        known = {**parameters_of(Filter), **known}
    lines = [f"# {line}".rstrip() for line in head]
    lines += ["", to_yaml({"version": VERSION}).rstrip()]
    for name, value in _fields(recipe).items():
        if name in known:
            parameter = known[name]
            kinds = [] if parameter.kind is None else [parameter.kind.words]
            choices = ["null" if choice is None else choice for choice in parameter.choices]
            meaning = f"{parameter.help}: {' or '.join([', '.join(choices), *kinds] if choices else kinds)}"
        else:
            meaning = _OTHERS[name]
        lines += ["", *(f"# {line}" for line in wrap(meaning, 100)), to_yaml({name: value}).rstrip()]
    return "\n".join(lines).lstrip("\n") + "\n"


def _fields(recipe: Recipe) -> dict[str, object]:
    """:meth:`Recipe.to_config`, and what that leaves out where it is the default."""
    absent: dict[str, object] = {"rename": []}
    if recipe.method.response is None:
        absent["filter"] = None
    if isinstance(recipe.method.weights, tuple):
        absent["layers"] = []
    config = recipe.to_config()
    last = {name: config.pop(name) for name in ("compute_dtype", "out_dtype")}
    return {**config, **{name: value for name, value in absent.items() if name not in config}, **last}
