"""A merge written down: every choice that changes the result, validated, and readable and writable as YAML."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import yaml

from ..errors import ArgumentError
from ..methods.rules import Weights
from ..responses import HighPass, Response, finite_number, from_config, to_config, to_record
from .units import Rule, Split, Stack, View

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
ComputeDType = Literal["float32", "float64"]
OutDType = Literal["float32", "float64", "bfloat16", "float16"]


_PRESET_FOLDER = Path(__file__).with_name("presets")
PRESETS = tuple(sorted(file.stem for file in _PRESET_FOLDER.glob("*.yaml")))  # see docs/presets.md


@dataclass(frozen=True)
class Recipe:
    """How to merge: ``theta = theta_0 + scale * sum_i lambda_i filter(theta_i - theta_0)``.

    Attributes:
        response: the frequency response that filters every selected matrix. ``HighPass(0)`` filters nothing.
        weights: lambda_i: ``"paper"`` (E_i / sum E_j, E_i = mean |v_i|), ``"uniform"`` (1/K), ``"sum"`` (1, the
            released code), or K numbers.
        stats: whether E_i is measured on the ``"raw"`` task vectors (mean over all their elements) or on the
            ``"filtered"`` ones (unweighted mean over tensors, as the released code does).
        scope: whether "paper" weights are taken over the whole ``"model"`` or for each ``"tensor"``.
        scale: a number, or ``"auto"``: 0.4 K for "paper" and "uniform" weights, 0.4 for "sum", 1 for given numbers.
        renormalize: ``"energy"`` gives every filtered tensor the Frobenius norm back that the weighted sum had before
            the filter, so that one scale suits every cutoff; ``None`` does not.
        align: scale tensor l of task i by max_j m_jl / m_il, m the mean magnitude after the filter (released code);
            tensors that a view stacks are aligned as the one matrix they make.
        sign_election: keep only the entries that agree with the elected sign, TIES-Merging's sum (released LLM script).
        select: ordered rules or (pattern, action) pairs with action "filter", "merge" (unfiltered) or "copy"; the first
            match wins, and tensors that match none follow :func:`freemerge.merging.units.default_action`.
        views: stacks and splits of tensors for the filter (:class:`Stack`, :class:`Split`).
        compute_dtype: arithmetic of the merge; float64 is used anyway for tensors stored in float64.
        out_dtype: dtype of the merged floating-point tensors; ``None`` keeps each tensor's dtype in the base.

    Raises ArgumentError, naming the field, for anything invalid.
    """

    response: Response = HighPass(0.4)
    weights: Weights = "paper"
    stats: Literal["raw", "filtered"] = "raw"
    scope: Literal["model", "tensor"] = "model"
    scale: Literal["auto"] | float = "auto"
    renormalize: Literal["energy"] | None = "energy"
    align: bool = False
    sign_election: bool = False
    select: tuple[Rule, ...] = field(default=())
    views: tuple[View, ...] = field(default=())
    compute_dtype: ComputeDType = "float32"
    out_dtype: OutDType | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.response, Response):
            raise ArgumentError(f"response must be a frequency response, got {self.response!r}")
        _set(self, "weights", _weights(self.weights))
        _check_choice("stats", self.stats, ("raw", "filtered"))
        _check_choice("scope", self.scope, ("model", "tensor"))
        _set(self, "scale", _scale(self.scale))
        _check_choice("renormalize", self.renormalize, (None, "energy"))
        for name in ("align", "sign_election"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"{name} must be true or false, got {getattr(self, name)!r}")
        _set(self, "select", tuple(_rule(rule) for rule in _sequence("select", self.select)))
        _set(self, "views", tuple(_view(view) for view in _sequence("views", self.views)))
        _check_choice("compute_dtype", self.compute_dtype, get_args(ComputeDType))
        _check_choice("out_dtype", self.out_dtype, (None, *get_args(OutDType)))

    @property
    def linear(self) -> bool:
        """Whether one filter of the weighted sum replaces one filter per model."""
        return not self.align and not self.sign_election

    @classmethod
    def preset(cls, name: str) -> Recipe:
        """A published setting by name: one of :data:`PRESETS`, the YAML files in this package's folder ``presets``."""
        if not isinstance(name, str) or name not in PRESETS:
            raise ArgumentError(
                f"preset must be one of {', '.join(PRESETS)}, got {name!r}{_did_you_mean(str(name), PRESETS)}"
            )
        return cls.from_yaml(_PRESET_FOLDER / f"{name}.yaml")

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)

    def to_config(self) -> dict[str, Any]:
        """The recipe as plain data for YAML or JSON. A custom response cannot be written down: ArgumentError."""
        return self._config(to_config(self.response))

    def to_record(self) -> dict[str, Any]:
        """:meth:`to_config` for a manifest: a custom response is identified instead of refused."""
        return self._config(to_record(self.response))

    def _config(self, response: dict[str, object]) -> dict[str, Any]:
        config: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        config["response"] = response
        if isinstance(self.weights, tuple):
            config["weights"] = list(self.weights)
        config["select"] = [{"pattern": rule.pattern, "action": rule.action} for rule in self.select]
        config["views"] = [_view_config(view) for view in self.views]
        return config

    @classmethod
    def from_config(cls, config: object) -> Recipe:
        """The inverse of :meth:`to_config`; missing fields keep their defaults, unknown ones are errors.

        A ``preset`` key names the recipe that supplies the defaults.
        """
        if not isinstance(config, Mapping):
            raise ArgumentError(f"a recipe must be a mapping of fields, got {type(config).__name__}")
        options = dict(config)
        start = cls.preset(options.pop("preset")) if "preset" in options else cls()
        known = [f.name for f in fields(cls)]
        for key in options:
            if key not in known:
                raise ArgumentError(f"recipe has no field {key!r}{_did_you_mean(str(key), known)}")
        if "response" in options:
            options["response"] = from_config(options["response"])
        return start.replace(**options)

    def to_yaml(self) -> str:
        """The recipe as YAML text."""
        return to_yaml(self.to_config())

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe file. Raises ArgumentError naming the file."""
        try:
            return cls.from_config(yaml.load(Path(path).read_text(encoding="utf-8"), _StrictLoader))
        except OSError as error:
            raise ArgumentError(f"recipe {path}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError, ArgumentError) as error:
            raise ArgumentError(f"recipe {path}: {error}") from None
        except RecursionError:
            raise ArgumentError(f"recipe {path}: nested too deeply") from None


def _set(recipe: Recipe, name: str, value: object) -> None:
    object.__setattr__(recipe, name, value)


def to_yaml(config: Mapping[str, object]) -> str:
    """Plain data as YAML text, in its own order."""
    return yaml.safe_dump(dict(config), sort_keys=False)


class _StrictLoader(yaml.SafeLoader):
    """YAML without the silent choice among equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ArgumentError(f"{key!r} is given twice")
        return super().construct_mapping(node, deep)


def _scale(scale: object) -> Literal["auto"] | float:
    if scale == "auto":
        return "auto"
    number = finite_number(scale)
    if number is None:
        raise ArgumentError(f"scale must be 'auto' or a finite number, got {scale!r}")
    return number


def _did_you_mean(word: str, known: Sequence[str] | Mapping[str, object]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _sequence(name: str, value: object) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ArgumentError(f"{name} must be a list, got {value!r}")
    return value


def _weights(weights: object) -> Weights:
    if isinstance(weights, str) and weights in get_args(get_args(Weights)[0]):
        return cast(Weights, weights)
    if isinstance(weights, str) or not isinstance(weights, Sequence) or not weights:
        raise ArgumentError(f"weights must be 'paper', 'uniform', 'sum' or a list of numbers, got {weights!r}")
    numbers = tuple(number for number in map(finite_number, weights) if number is not None)
    if len(numbers) < len(weights):
        raise ArgumentError(f"weights must be finite numbers, got {list(weights)!r}")
    return numbers


def _rule(rule: object) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, Mapping) and set(rule) == {"pattern", "action"}:
        return Rule(rule["pattern"], rule["action"])
    if isinstance(rule, Sequence) and not isinstance(rule, str) and len(rule) == 2:
        return Rule(*rule)
    raise ArgumentError(f"select: a rule is a pattern and an action, got {rule!r}")


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
