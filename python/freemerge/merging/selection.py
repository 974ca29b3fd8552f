"""What a recipe says about tensors by their names: rules, views as matrices, and other prefixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from ..errors import ArgumentError, counted
from ..methods.parameters import NUMBERS

if TYPE_CHECKING:
    from ..checkpoint.prefixes import Rename

Action = Literal["filter", "merge", "average", "copy", "drop"]


def _check_pattern(field: str, pattern: object) -> None:
    if not isinstance(pattern, str):
        raise ArgumentError(f"{field}: a pattern must be a string, got {pattern!r}")


@dataclass(frozen=True)
class Stack:
    """Filter several tensors as one matrix, their rows one below the other, for instance separate q, k and v.

    ``patterns`` hold one ``*`` each, which stands for the same text in all: ``Stack(("*.q_proj.weight",
    "*.k_proj.weight", "*.v_proj.weight"))``.
    """

    patterns: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.patterns, (list, tuple)):
            object.__setattr__(self, "patterns", tuple(self.patterns))
        if not isinstance(self.patterns, tuple) or not all(isinstance(pattern, str) for pattern in self.patterns):
            raise ArgumentError(f"views: a stack is a list of patterns, got {self.patterns!r}")
        if len(self.patterns) < 2 or any(pattern.count("*") != 1 for pattern in self.patterns):
            raise ArgumentError(f"views: a stack needs at least two patterns with one '*' each, got {self.patterns!r}")


@dataclass(frozen=True)
class Split:
    """Filter one tensor as several matrices, split along its rows, for instance a fused qkv weight.

    A stack of matrices, as the experts of a model in memory are, is split in each of them. ``parts``: the number of
    equal parts, or the number of rows of each.
    """

    pattern: str
    parts: int | tuple[int, ...]

    def __post_init__(self) -> None:
        _check_pattern("views", self.pattern)
        if isinstance(self.parts, (list, tuple)):
            object.__setattr__(self, "parts", tuple(self.parts))
        sizes = self.parts if isinstance(self.parts, tuple) else (self.parts,)
        if not sizes or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in sizes):
            raise ArgumentError(f"views: parts must be a positive integer or a list of them, got {self.parts!r}")

    def rows(self, name: str, height: int) -> tuple[int, ...]:
        """Rows of each part of the tensor ``name``, which has ``height`` rows."""
        if isinstance(self.parts, tuple):
            if sum(self.parts) != height:
                raise ArgumentError(
                    f"views: {name} has {counted(height, 'row')}, but its parts {self.parts} have {sum(self.parts)}"
                )
            return self.parts
        if height % self.parts:
            rows = counted(height, "row")
            raise ArgumentError(f"views: {name} does not split into {self.parts} equal parts: it has {rows}")
        return (height // self.parts,) * self.parts


View = Stack | Split


@dataclass(frozen=True)
class Rule:
    """Tensors whose name matches ``pattern`` (shell style, case-sensitive) are treated by ``action``.

    The names are those of all inputs. "filter": as matrices, which FR-Merging filters. "merge": entry by entry.
    "average": within the range of the inputs, as running statistics are anyway. "copy": the base's tensor is taken; one
    that the base lacks is left out. "drop": left out.
    """

    pattern: str
    action: Action

    def __post_init__(self) -> None:
        _check_pattern("select", self.pattern)
        if self.action not in get_args(Action):
            raise ArgumentError(f"select: action must be one of {', '.join(get_args(Action))}, got {self.action!r}")


@dataclass(frozen=True)
class LayerWeights:
    """lambda_i of the tensors whose name matches ``pattern`` (as of a :class:`Rule`), instead of the method's."""

    pattern: str
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_pattern("layers", self.pattern)
        numbers = NUMBERS.convert(self.weights)
        if numbers is None:
            raise ArgumentError(f"layers: weights must be {NUMBERS.words}, got {self.weights!r}")
        object.__setattr__(self, "weights", numbers)


Named = TypeVar("Named", Rule, LayerWeights)


def rules_of(select: object) -> tuple[Rule, ...]:
    """Rules, pairs of a pattern and an action, or mappings of the two, as they are written in recipes."""
    expected = "select: a rule is {pattern: ..., action: ...}"
    return tuple(_named(Rule, rule, expected) for rule in listed("select", select))


def layers_of(layers: object) -> tuple[LayerWeights, ...]:
    """The same for the weights of layers."""
    expected = "layers: expected {pattern: ..., weights: ...}"
    return tuple(_named(LayerWeights, layer, expected) for layer in listed("layers", layers))


def _named(kind: type[Named], given: object, expected: str) -> Named:
    if isinstance(given, kind):
        return given
    if isinstance(given, Mapping) and set(given) == {field.name for field in fields(kind)}:
        return kind(**given)
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2:
        return kind(*given)
    raise ArgumentError(f"{expected}, got {given!r}")


def listed(field: str, value: object) -> Sequence[Any]:
    """The list that a field of a recipe is; ArgumentError for anything else."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ArgumentError(f"{field} must be a list, got {value!r}")
    return value


def rule_of(names: Sequence[str], rules: Sequence[Named]) -> Named | None:
    """The first rule that matches one of a tensor's names: its own, or one that a module has for it."""
    for rule in rules:
        if any(fnmatchcase(name, rule.pattern) for name in names):
            return rule
    return None


def left_alone(names: Sequence[str], select: Sequence[Rule]) -> bool:
    """Whether the rules copy or drop a tensor, so that the models' own need not fit, nor even exist."""
    rule = rule_of(names, select)
    return rule is not None and rule.action in ("copy", "drop")


def drops(names: Sequence[str], select: Sequence[Rule]) -> bool:
    """Whether the rules leave a tensor out of the merged model."""
    rule = rule_of(names, select)
    return rule is not None and rule.action == "drop"


def check_rules(
    select: Sequence[Rule], names: Mapping[str, Sequence[str]], second: Mapping[str, str] | None = None
) -> None:
    """Raise ArgumentError for a rule that matches no tensor of any input: a misspelt pattern must not pass.

    ``second``: second name -> first name of tied tensors. They go by the first one, so a rule of no other is as
    misspelt.
    """
    second = second or {}
    own = [all_names for name, all_names in names.items() if name not in second]
    for rule in select:
        if not any(rule_of(all_names, [rule]) for all_names in own):
            tied = next((name for name in second if rule_of([name], [rule])), None)
            hint = "" if tied is None else f"; {tied} is tied to {second[tied]}, whose name a rule has to match"
            raise ArgumentError(f"select: pattern {rule.pattern!r} matches no tensor of the base or the models{hint}")


def renames_of(renames: object) -> tuple[Rename, ...]:
    """Pairs of prefixes, or mappings of ``from`` and ``to``, as they are written in recipes."""
    pairs = []
    for given in listed("rename", renames):
        pair = (given["from"], given["to"]) if isinstance(given, Mapping) and set(given) == {"from", "to"} else given
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ArgumentError(f"rename: expected two prefixes, from and to, got {given!r}")
        pairs.append((pair[0], pair[1]))
    return tuple(pairs)
