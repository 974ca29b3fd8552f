"""Configurations of mergekit as recipes, where a method here computes the same; everything else is refused by name.

Values follow mergekit's rules: a parameter of a model before a shared one, of a list of values the first whose
``filter`` is part of the tensor's name, and a list of numbers is a gradient over the layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import finite_number, finite_numbers
from ..checkpoint import MERGEABLE, Checkpoint
from ..checkpoint.architecture import read_config
from ..checkpoint.hub_cache import local_path
from ..checkpoint.patterns import patterns_for
from ..checkpoint.quantised import dequantised
from ..errors import ArgumentError, counted
from ..methods.breadcrumbs import Breadcrumbs
from ..methods.model_stock import ModelStock
from ..methods.task_arithmetic import TaskArithmetic
from ..methods.ties import TIES
from .recipe import Recipe, read_yaml
from .selection import LayerWeights

Value = float | tuple[float, ...]  # of all layers, or from the first layer to the last
Rules = tuple[tuple[str, Value], ...]
"""Pairs of a part of tensors' names, empty for any, and a value; the first that matches counts."""

_FIELDS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source")
_REFUSED = {
    "slices": "layers cannot be put together here; list whole models",
    "modules": "parts of a model cannot have methods of their own here; use mergekit-yaml",
    "tokenizer": "vocabularies are not changed here; use --tokenizer-from, or mergekit-yaml",
    "chat_template": "chat templates are not changed here; use --tokenizer-from, or mergekit-yaml",
}
_DROPS = "what it drops is random, and it keeps the sum of magnitudes of the rest instead of the expected value"
_DIFFERENT = {
    "dare_linear": _DROPS,
    "dare_ties": f"{_DROPS}; dare with sign_election is the paper's",
    "slerp": "it is no sum of task vectors; average with scale t is the straight line",
}


@dataclass(frozen=True)
class _Weights:
    """The weights of a tensor's models by its name.

    Attributes:
        rules: of each model.
        rest: of the base, if it counts as a model.
        normalize: whether weights are divided by their sum, with that of the base.
        depth: how many layers the model has, for gradients.
    """

    rules: tuple[Rules, ...]
    rest: Rules
    normalize: bool
    depth: int

    def of(self, name: str) -> tuple[float, ...]:
        """lambda_i of one tensor."""
        weights = [self._value(rules, name) for rules in self.rules]
        if not self.normalize:
            return tuple(weights)
        total = sum(weights) + (self._value(self.rest, name) if self.rest else 0.0)
        if total == 0:
            raise ArgumentError(f"weight: those of {name} sum to zero and cannot be normalized")
        return tuple(weight / total for weight in weights)

    def _value(self, rules: Rules, name: str) -> float:
        for part, value in rules:
            if part in name:
                return self._along(value, name) if isinstance(value, tuple) else value
        raise ArgumentError(f"weight: no value is given for {name}")

    def _along(self, gradient: tuple[float, ...], name: str) -> float:
        """A gradient where the tensor lies, which is at its beginning if it is of no layer."""
        found = re.search(r"\.(\d+)\.", name)
        layer = 0 if found is None else int(found[1])
        if layer >= self.depth:
            raise ArgumentError(
                f"weight: {name} lies beyond the {counted(self.depth, 'layer')} that there is a gradient for"
            )
        last = self.depth - 1
        place = layer / last if last else float(found is not None)  # in mergekit a single layer is the last one
        position = place * (len(gradient) - 1)
        before = int(position)
        after = min(before + 1, len(gradient) - 1)
        return gradient[before] + (position - before) * (gradient[after] - gradient[before])


def read_mergekit(path: str | Path) -> tuple[str, list[str], Recipe]:
    """The base, the models and the recipe of a configuration file of mergekit.

    Raises ArgumentError, naming file and field, for what is no such file or cannot be computed here as mergekit does,
    CheckpointError for a base that cannot be read: weights by names and gradients are found for its tensors.
    """
    try:
        return _Config(read_yaml(Path(path))).parts()
    except ArgumentError as error:
        raise ArgumentError(f"{path}: {error}") from None


class _Config:
    def __init__(self, content: object) -> None:
        stated = _mapping("a configuration", content)
        self._fields = {name: value for name, value in stated.items() if value is not None}  # null is not stated
        for name in self._fields:
            if name in _REFUSED:
                raise ArgumentError(f"{name}: {_REFUSED[name]}")
            if name not in _FIELDS:
                raise ArgumentError(f"{name}: unknown here; a configuration may have {', '.join(_FIELDS)}")
        source = self._fields.get("tokenizer_source", "base")
        if source != "base":
            raise ArgumentError(f"tokenizer_source: {source!r}: {_REFUSED['tokenizer']}")
        self._shared = _mapping("parameters", self._fields.get("parameters") or {})
        listed = self._fields.get("models")
        if not isinstance(listed, list) or not listed:
            raise ArgumentError("models: must be a list of models")
        self._models = [_mapping("models", entry) for entry in listed]
        for name in (name for entry in self._models for name in entry if name not in ("model", "parameters")):
            raise ArgumentError(f"models: {name}: unknown here; a model has model and parameters")
        self._used = {"int8_mask"}  # of memory only
        self._of_models = {"int8_mask"}  # those that a model can have for itself

    def parts(self) -> tuple[str, list[str], Recipe]:
        methods: dict[str, Callable[[list[dict[str, Any]], list[dict[str, Any]]], dict[str, Any]]] = {
            "linear": self._linear,
            "task_arithmetic": self._task_arithmetic,
            "ties": self._ties,
            "breadcrumbs": self._breadcrumbs,
            "model_stock": self._model_stock,
        }
        asked = str(self._fields.get("merge_method"))
        if asked not in methods:
            why = f" ({_DIFFERENT[asked]})" if asked in _DIFFERENT else ""
            raise ArgumentError(
                f"merge_method: {asked!r} is not computed here as mergekit does{why}, only {', '.join(methods)}; "
                "freemerge mergekit-yaml runs it in mergekit"
            )
        names = [_path(entry.get("model")) for entry in self._models]
        base = self._fields.get("base_model")
        if base is None and asked != "linear":
            raise ArgumentError(f"base_model: {asked} needs it")
        self._base = base = names[0] if base is None else _path(base)
        itself = [entry for entry, name in zip(self._models, names, strict=True) if name == base]
        others = [entry for entry, name in zip(self._models, names, strict=True) if name != base]
        if not others:
            raise ArgumentError("models: none but the base")
        recipe = methods[asked](others, itself)
        for entry in (*self._models, {"parameters": self._shared}):
            for name in _mapping("parameters", entry.get("parameters") or {}):
                if name not in self._used:
                    raise ArgumentError(f"parameters: {name} is not known for {asked} here")
                if "model" in entry and name not in self._of_models:
                    raise ArgumentError(f"parameters: {name} is of all models in {asked}, not of one alone")
        dtype = self._fields.get("out_dtype", self._fields.get("dtype"))
        return base, [name for name in names if name != base], Recipe(**recipe, out_dtype=dtype)

    def _linear(self, others: list[dict[str, Any]], itself: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._flag("normalize", True):
            raise ArgumentError("normalize: linear without it does not keep the base, and is not computed here")
        if len(itself) != 1:
            raise ArgumentError("base_model: linear counts it as a model; list it once, with a weight, or leave it out")
        return self._weighted(others, self._rules(itself[0], "weight"), normalize=True, scale=1.0)

    def _task_arithmetic(self, others: list[dict[str, Any]], itself: list[dict[str, Any]]) -> dict[str, Any]:
        return self._weighted(others, (), normalize=self._flag("normalize", False), scale=self._number("lambda", 1.0))

    def _weighted(self, others: list[dict[str, Any]], rest: Rules, *, normalize: bool, scale: float) -> dict[str, Any]:
        rules = tuple(self._rules(entry, "weight") for entry in others)
        gradients = any(isinstance(value, tuple) for each in (*rules, rest) for _, value in each)
        depth = _depth(self._base) if gradients else 0
        weights = _Weights(rules, rest, normalize, depth)
        if not gradients and not any(part for each in (*rules, rest) for part, _ in each):  # the same for every tensor
            return {"method": TaskArithmetic(weights=weights.of("")), "scale": scale}
        most, *fewer = _by_weights(self._base, weights.of)
        layers = [LayerWeights(pattern, own) for own, patterns in fewer for pattern in patterns]
        return {"method": TaskArithmetic(weights=most[0]), "scale": scale, "layers": layers}

    def _ties(self, others: list[dict[str, Any]], itself: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._flag("normalize", True):
            raise ArgumentError("normalize: ties without it is not computed here; freemerge mergekit-yaml runs it")
        self._refuse_rescale("ties")
        weights = tuple(self._constant(entry, "weight") for entry in others)
        if min(weights) < 0 or max(weights) == 0:
            raise ArgumentError("weight: ties has none below zero here, nor zeros alone; mergekit-yaml takes others")
        method = TIES(density=self._common(others, "density", 1.0), scope="tensor")
        equal = len(set(weights)) == 1
        return {"method": method if equal else method.replace(weights=weights), "scale": self._number("lambda", 1.0)}

    def _breadcrumbs(self, others: list[dict[str, Any]], itself: list[dict[str, Any]]) -> dict[str, Any]:
        self._refuse_rescale("breadcrumbs")
        weights = tuple(self._constant(entry, "weight") for entry in others)
        if self._flag("normalize", False):
            if sum(weights) == 0:
                raise ArgumentError("weight: they sum to zero and cannot be normalized")
            weights = tuple(weight / sum(weights) for weight in weights)
        density = self._common(others, "density", 1.0)
        outliers = min(self._common(others, "gamma", 0.01), 1.0 - density)  # in mergekit density goes first
        method = Breadcrumbs(beta=max(0.0, 1.0 - density - outliers), gamma=outliers, weights=weights)
        return {"method": method, "scale": self._number("lambda", 1.0)}

    def _model_stock(self, others: list[dict[str, Any]], itself: list[dict[str, Any]]) -> dict[str, Any]:
        if self._flag("filter_wise", False):
            raise ArgumentError("filter_wise: a ratio for each row is not computed here; mergekit-yaml runs it")
        return {"method": ModelStock(), "scale": 1.0}

    def _refuse_rescale(self, method: str) -> None:
        if self._flag("rescale", False):
            raise ArgumentError(f"rescale: {method} with it is not computed here; freemerge mergekit-yaml runs it")

    def _rules(self, entry: Mapping[str, Any], parameter: str, default: float | None = None) -> Rules:
        """The values of a parameter for one model, its own before the shared ones."""
        self._used.add(parameter)
        self._of_models.add(parameter)
        own = _mapping("parameters", entry.get("parameters") or {})
        found: list[tuple[str, Value]] = []
        for place in (own, self._shared):
            if parameter in place:
                found += _pairs(parameter, place[parameter])
        if default is not None:
            found.append(("", default))
        if not found:
            raise ArgumentError(f"{parameter}: {entry.get('model')} has none")
        last = next((i for i, (part, _) in enumerate(found) if not part), len(found))
        return tuple(found[: last + 1])

    def _constant(self, entry: Mapping[str, Any], parameter: str, default: float | None = None) -> float:
        rules = self._rules(entry, parameter, default)
        if len(rules) != 1 or rules[0][0] or isinstance(rules[0][1], tuple):
            raise ArgumentError(f"{parameter}: one number for all tensors is possible here; mergekit-yaml takes more")
        return rules[0][1]

    def _common(self, entries: Sequence[Mapping[str, Any]], parameter: str, default: float) -> float:
        """One number for all tensors and models."""
        values = {self._constant(entry, parameter, default) for entry in entries}
        if len(values) > 1:
            raise ArgumentError(f"{parameter}: one number for all models is possible here; mergekit-yaml takes more")
        return values.pop()

    def _number(self, name: str, default: float) -> float:
        self._used.add(name)
        number = finite_number(self._shared.get(name, default))
        if number is None:
            raise ArgumentError(f"{name}: must be a number, got {self._shared[name]!r}")
        return number

    def _flag(self, name: str, default: bool) -> bool:
        self._used.add(name)
        value = self._shared.get(name, default)
        if not isinstance(value, bool):
            raise ArgumentError(f"{name}: must be true or false, got {value!r}")
        return value


def _pairs(parameter: str, value: object) -> list[tuple[str, Value]]:
    for_all = _number_or_gradient(value)
    if for_all is not None:
        return [("", for_all)]
    pairs: list[tuple[str, Value]] = []
    for item in value if isinstance(value, list) and value else [value]:
        condition = item if isinstance(item, Mapping) else {}
        number = _number_or_gradient(condition.get("value"))
        if number is None or not condition.keys() <= {"filter", "value"}:
            allowed = "a number, a gradient of numbers, or a list of these with filters"
            raise ArgumentError(f"{parameter}: must be {allowed}, got {item!r}")
        part = condition.get("filter")
        pairs.append(("" if part in (None, "*") else str(part), number))
    return pairs


def _number_or_gradient(value: object) -> Value | None:
    return finite_numbers(value) if isinstance(value, list) else finite_number(value)


def _by_weights(base: str, weights_of: Callable[[str], tuple[float, ...]]) -> list[tuple[tuple[float, ...], list[str]]]:
    """The weights that the base's tensors have, those of most tensors first, with patterns of the tensors' names.

    Filters and gradients of several models become patterns of their common tensors, of which none matches another's.
    """
    with Checkpoint.open(base, argument="base_model") as opened:
        names = [name for name, spec in dequantised(opened).specs.items() if spec.dtype in MERGEABLE]
    if not names:
        raise ArgumentError(f"base_model: {base} holds no tensor to merge")
    found: dict[tuple[float, ...], list[str]] = {}
    for name in names:
        found.setdefault(weights_of(name), []).append(name)
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return [(weights, list(patterns_for(own, names))) for weights, own in ordered]


def _depth(base: str) -> int:
    """How many layers the config of a model says it has."""
    config = read_config(local_path(base))
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, dict) else {}):
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if isinstance(place.get(name), int) and place[name] > 0:
                return int(place[name])
    raise ArgumentError(f"weight: the number of layers, for gradients, is not in the config.json of {base}")


def _mapping(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{name}: must be a mapping, got {value!r}")
    return {str(key): item for key, item in value.items()}


def _path(model: object) -> str:
    if isinstance(model, Mapping):
        model = model.get("path") if set(model) == {"path"} else model
    if not isinstance(model, str) or not model:
        raise ArgumentError(f"model: must be a path or the id of a model, got {model!r}")
    if "+" in model and not Path(model).exists():
        raise ArgumentError(f"model: {model!r} names an adapter; give the path of a merged model")
    if "@" in model and not Path(model).exists():
        raise ArgumentError(f"model: {model!r} names a revision; give the path of its snapshot")
    return model
