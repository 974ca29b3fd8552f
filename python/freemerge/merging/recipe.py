"""A merge written down: every choice that changes the result, validated, and readable and writable as YAML."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml

from ..arguments import path_of
from ..errors import ArgumentError, counted, did_you_mean
from ..methods import METHODS, Method
from ..methods.filtered import WHEN, Filter, Filtered, When, checked_response
from ..methods.parameters import NUMBER, parameter, parameters_of
from ..responses import Response, to_config, to_record
from .selection import LayerWeights, Rule, Split, Stack, View, layers_of, listed, renames_of, rules_of

if TYPE_CHECKING:
    import torch

    from ..checkpoint.prefixes import Rename

ComputeDType = Literal["float32", "float64"]
ScaleRule = Literal["auto", "interference"]
OutDType = Literal["float32", "float64", "bfloat16", "float16"]

VERSION = 1  #: of the format of recipes
_PRESET_FOLDER = Path(__file__).with_name("presets")
PRESETS = tuple(sorted(file.stem for file in _PRESET_FOLDER.glob("*.yaml")))  # see docs/presets.md


@dataclass(frozen=True, init=False)
class Recipe:
    """How to merge: a method with its parameters, and what is common to all methods.

    ``Recipe(HighPass(0.2), weights="uniform")`` is FR-Merging with these parameters, ``Recipe(method="average")`` is
    weight averaging. All keywords but those below are parameters of the method; they are attributes of the recipe too.

    Attributes:
        method: a method's name (see :data:`freemerge.methods.METHODS`), or the method itself. The result is
            ``theta_0 + scale * merged``, with the task vector that the method merges.
        scale: a number; ``"auto"`` for the default of the method; or ``"interference"`` for the one at which what is
            merged interferes least with the tasks, which the weights tell (docs/methods.md; they are read twice more).
        filter: a frequency filter of matrices ``"before"`` the method, of every task vector, or ``"after"`` it, of the
            merged one, with ``response`` or ``cutoff`` (the default is ``HighPass(0.4)``). It is kept as a
            :class:`freemerge.methods.filtered.Filter`. FR-Merging has a response of its own instead.
        select: ordered rules or (pattern, action) pairs with action "filter" (treated as matrices, which FR-Merging
            filters), "merge" (entry by entry), "average", "copy" or "drop" (:class:`Rule`); the first match wins. Where
            none matches, matrices and stacks of them are filtered, running statistics averaged, other floats, such as
            vectors and convolution kernels, merged, and all else is copied.
        rename: pairs (old, new): a name of a model that begins with old begins with new instead, where that makes it a
            name of the base. ``[("", "language_model.")]`` fits a language model into a larger one.
        views: stacks and splits of tensors that are treated as matrices (:class:`Stack`, :class:`Split`).
        layers: ordered (pattern, weights) pairs: lambda_i of some tensors, for methods whose ``weights`` are numbers,
            which all other tensors have (:class:`LayerWeights`); the first match wins.
        compute_dtype: arithmetic of the merge, a name or a torch dtype; float64 for what is stored in it.
        out_dtype: dtype of the merged floating-point tensors; ``None`` keeps each tensor's dtype in the base.

    Raises ArgumentError, naming the field, for anything invalid.
    """

    method: Method
    scale: ScaleRule | float = parameter(
        "auto", "strength of the merged task vector", choices=get_args(ScaleRule), kind=NUMBER
    )
    filter: Filter | None = parameter(
        None, "filter matrices before or after a method that does not filter by itself", choices=(None, *WHEN)
    )
    select: tuple[Rule, ...] = ()
    views: tuple[View, ...] = ()
    layers: tuple[LayerWeights, ...] = ()
    rename: tuple[Rename, ...] = ()
    compute_dtype: ComputeDType = parameter("float32", "arithmetic of the merge", choices=get_args(ComputeDType))
    out_dtype: OutDType | None = parameter(None, "dtype of the merged weights", choices=(None, *get_args(OutDType)))

    def __init__(
        self,
        /,
        response: Response | None = None,
        *,
        method: str | Method = "fr",
        scale: ScaleRule | float = "auto",
        filter: When | Filter | None = None,
        select: Sequence[Any] = (),
        views: Sequence[Any] = (),
        layers: Sequence[Any] = (),
        rename: Sequence[Any] = (),
        compute_dtype: ComputeDType | torch.dtype = "float32",
        out_dtype: OutDType | torch.dtype | None = None,
        **parameters: Any,
    ) -> None:
        if isinstance(response, str | Method):
            raise ArgumentError(f"response must be a frequency response, got {response!r}; give a method as method=")
        if response is not None:
            parameters["response"] = response
        responses = {name: parameters.pop(name) for name in ("response", "cutoff") if filter and name in parameters}
        values: dict[str, Any] = {
            "method": _method(method, parameters),
            "scale": scale,
            "filter": filter.when if isinstance(filter, Filter) else filter,
            "select": rules_of(select),
            "views": tuple(map(_view, listed("views", views))),
            "layers": layers_of(layers),
            "rename": renames_of(rename),
            "compute_dtype": _dtype_name(compute_dtype),
            "out_dtype": _dtype_name(out_dtype),
        }
        values |= {name: common.check(name, values[name]) for name, common in parameters_of(Recipe).items()}
        if filter is not None:
            if values["method"].response is not None:
                raise ArgumentError(f"filter: method {values['method'].name} filters by itself, with its own response")
            values["filter"] = (filter if isinstance(filter, Filter) else Filter(filter)).replace(**responses)
        if values["layers"]:
            _check_layers(values["layers"], values["method"])
            if values["scale"] == "interference":
                raise ArgumentError("layers: scale must be a number or auto, 'interference' sees one weight a model")
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        """The parameters of the method."""
        if name.startswith("_") or name == "method":  # not set yet while a recipe is copied or unpickled
            raise AttributeError(name)
        if name not in (f.name for f in fields(self.method)):
            raise AttributeError(f"a recipe of method {self.method.name} has no field {name!r}")
        return getattr(self.method, name)

    @property
    def merging(self) -> Method:
        """The method, with the filter around it if there is one."""
        return self.method if self.filter is None else Filtered(self.method, self.filter)

    def global_scale(self, count: int) -> float | None:
        """The scale of a merge of ``count`` models; None if the method has to find it from the weights."""
        if self.scale == "interference":
            return None
        return self.method.default_scale(count) if self.scale == "auto" else self.scale

    @classmethod
    def preset(cls, name: str) -> Recipe:
        """A published setting by name, one of docs/presets.md: the YAML files in this package's folder ``presets``."""
        if not isinstance(name, str) or name not in PRESETS:
            raise ArgumentError(
                f"preset must be one of {', '.join(PRESETS)}, got {name!r}{did_you_mean(name, PRESETS, listed=True)}"
            )
        return cls.from_yaml(_PRESET_FOLDER / f"{name}.yaml")

    def replace(self, /, **changes: Any) -> Recipe:
        """A copy with some fields changed, validated again. Another ``method`` starts from its own defaults."""
        common = {f.name: changes.pop(f.name, getattr(self, f.name)) for f in fields(self)}
        if common["method"] == self.method.name:
            common["method"] = self.method
        if isinstance(common["filter"], str) and self.filter is not None:
            common["filter"] = self.filter.replace(when=common["filter"])
        if "response" in changes:  # None is none here, not the default
            changes["response"] = checked_response(changes["response"], None)
        return Recipe(**common, **changes)

    def to_config(self) -> dict[str, Any]:
        """The recipe as plain data for YAML or JSON. A custom response cannot be written down: ArgumentError."""
        return self._config(to_config)

    def to_record(self) -> dict[str, Any]:
        """:meth:`to_config` for a manifest: a custom response is identified instead of refused."""
        return self._config(to_record)

    def _config(self, write: Callable[[Response], dict[str, object]]) -> dict[str, Any]:
        config: dict[str, Any] = {"method": self.method.name}
        for f in fields(self.method):
            value = getattr(self.method, f.name)
            config[f.name] = write(value) if isinstance(value, Response) else value
            if isinstance(value, tuple):
                config[f.name] = list(value)
        if self.filter is not None:
            config |= {"filter": self.filter.when, "response": write(self.filter.response)}
        config["scale"] = self.scale
        config["select"] = [{"pattern": rule.pattern, "action": rule.action} for rule in self.select]
        config["views"] = [_view_config(view) for view in self.views]
        if self.layers:
            config["layers"] = [{"pattern": layer.pattern, "weights": list(layer.weights)} for layer in self.layers]
        if self.rename:
            config["rename"] = [{"from": old, "to": new} for old, new in self.rename]
        return config | {"compute_dtype": self.compute_dtype, "out_dtype": self.out_dtype}

    @classmethod
    def from_config(cls, config: object) -> Recipe:
        """The inverse of :meth:`to_config`; missing fields keep their defaults, unknown ones are errors.

        A ``preset`` key names the recipe that supplies the defaults; ``version`` is that of the format.
        """
        if not isinstance(config, Mapping):
            raise ArgumentError(f"a recipe must be a mapping of fields, got {type(config).__name__}")
        options = {str(key): value for key, value in config.items()}
        version = options.pop("version", VERSION)
        if version != VERSION or isinstance(version, bool):
            raise ArgumentError(f"version must be {VERSION}, the only one that this freemerge knows, got {version!r}")
        start = cls.preset(options.pop("preset")) if "preset" in options else cls()
        return start.replace(**options)

    def to_yaml(self) -> str:
        """The recipe as YAML text."""
        return to_yaml({"version": VERSION, **self.to_config()})

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe file. Raises ArgumentError naming the file."""
        path = path_of("path", path)
        try:
            return cls.from_config(read_yaml(path))
        except ArgumentError as error:
            raise ArgumentError(f"recipe {path}: {error}") from None


def _method(method: object, parameters: Mapping[str, Any]) -> Method:
    """The method with these parameters; ArgumentError for a name that neither it nor the recipe has."""
    if not isinstance(method, Method):
        if not isinstance(method, str) or method not in METHODS:
            hint = did_you_mean(method, METHODS, listed=True)
            raise ArgumentError(f"method must be one of {', '.join(sorted(METHODS))}, got {method!r}{hint}")
        method = METHODS[method]()
    known = [*signature(type(method)).parameters, *(f.name for f in fields(Recipe))]
    for name in parameters:
        if name in ("response", "cutoff") and name not in known:
            hint = "filter='before' or filter='after' filters beside it"
            raise ArgumentError(f"{name}: method {method.name} has no filter of its own; {hint}")
        if name not in known:
            raise ArgumentError(f"a recipe of method {method.name} has no field {name!r}{did_you_mean(name, known)}")
    return method.replace(**parameters) if parameters else method


def _check_layers(layers: Sequence[LayerWeights], method: Method) -> None:
    if not isinstance(method.weights, tuple):
        raise ArgumentError(f"layers: method {method.name} needs weights as numbers, for all other tensors")
    for layer in layers:
        if len(layer.weights) != len(method.weights):
            found = counted(len(layer.weights), "weight")
            raise ArgumentError(f"layers: {layer.pattern!r} has {found}, the method {len(method.weights)}")


def checked_recipe(recipe: object, method: str | Method | None = None) -> Recipe:
    """A recipe that is one, or that of a method, of which only one may be given; the default for None."""
    if method is not None and recipe is not None:
        raise ArgumentError("method and recipe exclude each other; name the method in the recipe")
    if method is not None:
        return Recipe(method=method)
    if recipe is None:
        return Recipe()
    if not isinstance(recipe, Recipe):
        hint = "; give a method as method=" if isinstance(recipe, str | Method) else ""
        hint += ", or Recipe.preset(NAME) or Recipe.from_yaml(PATH)" if isinstance(recipe, str) else ""
        raise ArgumentError(f"recipe must be a Recipe, got {type(recipe).__name__}{hint}")
    return recipe


def to_yaml(config: Mapping[str, object]) -> str:
    """Plain data as YAML text, in its own order."""
    return yaml.safe_dump(dict(config), sort_keys=False)


def read_yaml(path: Path) -> object:
    """The content of a YAML file; ArgumentError saying what is wrong with it."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except OSError as error:
        raise ArgumentError(str(error.strerror)) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of no UTF-8, a date that is none, a number too long
        raise ArgumentError(str(error)) from None
    except RecursionError:
        raise ArgumentError("nested too deeply") from None


class StrictLoader(yaml.SafeLoader):
    """YAML without the silent choice among equal keys, and with 1e-1 as a number, as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ArgumentError(f"{key!r} is given twice")
        return super().construct_mapping(node, deep)


StrictLoader.add_implicit_resolver(  # PyYAML's own wants a point, and a sign in the exponent
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def _dtype_name(dtype: object) -> object:
    """A torch dtype by its name; anything else as it is."""
    name = str(dtype)
    return name.removeprefix("torch.") if name.startswith("torch.") and not isinstance(dtype, str) else dtype


def _view(view: object) -> View:
    if isinstance(view, Stack | Split):
        return view
    if isinstance(view, Mapping) and set(view) == {"stack"}:
        return Stack(view["stack"])
    if isinstance(view, Mapping) and set(view) == {"split", "parts"}:
        return Split(view["split"], view["parts"])
    raise ArgumentError(f"views: expected {{stack: [patterns]}} or {{split: pattern, parts: n}}, got {view!r}")


def _view_config(view: View) -> dict[str, Any]:
    if isinstance(view, Stack):
        return {"stack": list(view.patterns)}
    return {"split": view.pattern, "parts": view.parts if isinstance(view.parts, int) else list(view.parts)}
