"""The JSON schema of recipes, made from what declares them: editors complete and check recipes by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, get_args, get_origin, get_type_hints

from ..methods import METHODS, Method
from ..methods.fr import FR
from ..methods.parameters import NUMBERS, Parameter, parameters_of
from ..responses.base import RESPONSES, Response
from .recipe import PRESETS, VERSION, Recipe
from .selection import Action

Schema = dict[str, Any]
_NAMES: Schema = {"type": "array", "items": {"type": "string"}}
_PLAIN: Mapping[object, Schema] = {float: {"type": "number"}, int: {"type": "integer"}, str: {"type": "string"}}


def recipe_schema() -> Schema:
    """The schema (draft 2020-12) of a recipe file as :meth:`Recipe.from_yaml` reads it."""
    common = {
        "version": {"const": VERSION, "description": "of this format"},
        "preset": {"enum": list(PRESETS), "description": "the recipe that supplies the defaults"},
        "method": {"enum": sorted(METHODS), "description": "merging method (default fr, or the preset's)"},
        "select": {"type": "array", "items": _named("action", {"enum": list(get_args(Action))})},
        "views": {"type": "array", "items": _view()},
        "layers": {"type": "array", "items": _named("weights", dict(NUMBERS.schema))},
        "rename": {"type": "array", "items": {"anyOf": [_object({"from": _PLAIN[str], "to": _PLAIN[str]}), _pair()]}},
        **{name: _parameter(parameter) for name, parameter in parameters_of(Recipe).items()},
    }
    filtering = _method(FR)
    filtering = {name: filtering[name] for name in ("response", "cutoff")}
    own = {name: {**filtering, **_method(METHODS[name])} for name in sorted(METHODS)}
    everything: Schema = {}
    for properties in own.values():
        for name, schema in properties.items():
            known = everything.setdefault(name, {"anyOf": []})["anyOf"]
            if schema not in known:
                known.append(schema)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "freemerge recipe",
        "type": "object",
        "properties": {**everything, **common},
        "additionalProperties": False,
        "allOf": [
            {
                "if": {"properties": {"method": {"const": name}}, "required": ["method"]},
                "then": {
                    "properties": properties,
                    "propertyNames": {"enum": [*common, *properties]},
                    # Only FR-Merging filters without being asked to.
                    "dependentRequired": {} if METHODS[name]().response else {key: ["filter"] for key in filtering},
                },
            }
            for name, properties in own.items()
        ],
    }


def _method(method: type[Method]) -> Schema:
    declared = {name: _parameter(parameter) for name, parameter in parameters_of(method).items()}
    responses = [f.name for f in fields(method) if isinstance(f.default, Response)]
    response = {"anyOf": [_response(name) for name in sorted(RESPONSES)]}
    return {**dict.fromkeys(responses, response), **declared}


def _parameter(parameter: Parameter) -> Schema:
    allowed: list[Schema] = []
    if parameter.choices:
        allowed.append({"enum": [*parameter.choices, *parameter.aliases]})
    if parameter.kind is not None:
        allowed.append(dict(parameter.kind.schema))
    schema = allowed[0] if len(allowed) == 1 else {"anyOf": allowed}
    return {**schema, "description": parameter.help}


def _response(name: str) -> Schema:
    response = RESPONSES[name]
    hints = get_type_hints(response)
    properties: Schema = {"type": {"const": name}}
    for f in fields(response):
        choices = get_args(hints[f.name])
        properties[f.name] = {"enum": list(choices)} if get_origin(hints[f.name]) and choices else _PLAIN[hints[f.name]]
    required = ["type", *(f.name for f in fields(response) if f.default is MISSING and f.default_factory is MISSING)]
    return _object(properties, required)


def _named(field: str, schema: Schema) -> Schema:
    """A pattern of names and what is said of them, as a mapping or a pair."""
    pair = {"type": "array", "prefixItems": [_PLAIN[str], schema], "minItems": 2, "maxItems": 2}
    return {"anyOf": [_object({"pattern": _PLAIN[str], field: schema}), pair]}


def _view() -> Schema:
    rows = {"type": "integer", "minimum": 1}
    parts = {"anyOf": [rows, {"type": "array", "items": rows, "minItems": 1}]}
    return {"anyOf": [_object({"stack": {**_NAMES, "minItems": 2}}), _object({"split": _PLAIN[str], "parts": parts})]}


def _pair() -> Schema:
    return {**_NAMES, "minItems": 2, "maxItems": 2}


def _object(properties: Schema, required: list[str] | None = None) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }
