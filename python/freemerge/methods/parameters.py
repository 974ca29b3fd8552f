"""Parameters of methods and recipes. One declaration checks the value, names it in errors and makes its option."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ..arguments import finite_number, finite_numbers, fraction
from ..errors import ArgumentError, did_you_mean


@dataclass(frozen=True)
class Kind:
    """What a parameter may be besides its choices.

    ``words`` name it in messages and ``metavar`` in the help of an option. ``convert`` returns a value in its canonical
    type, or None if it is not of this kind; ``parse`` reads it from text, or raises ValueError. ``schema`` is the JSON
    schema of its values.
    """

    words: str
    metavar: str
    convert: Callable[[object], object]
    parse: Callable[[str], object]
    schema: Mapping[str, object]


def _parse_numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _whole_number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _boolean(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def number(least: float, most: float) -> Kind:
    """Numbers from ``least`` to ``most``, both included."""

    def convert(value: object) -> float | None:
        checked = finite_number(value)
        return checked if checked is not None and least <= checked <= most else None

    schema = {"type": "number", "minimum": least, "maximum": most}
    return Kind(f"a number from {least:g} to {most:g}", "N", convert, float, schema)


def share(most: float = 1) -> Kind:
    """Shares from 0 to ``most``, both included; an option has them in percent, too: ``0.3`` or ``30%``."""
    return replace(number(0, most), parse=fraction)


_NUMBER = {"type": "number"}
NUMBER = Kind("a finite number", "N", finite_number, float, _NUMBER)
NUMBERS = Kind(
    "a list of finite numbers",
    "N,N,...",
    finite_numbers,
    _parse_numbers,
    {"type": "array", "items": _NUMBER, "minItems": 1},
)
WHOLE_NUMBER = Kind("a whole number >= 0", "N", _whole_number, int, {"type": "integer", "minimum": 0})
FLAG = Kind("true or false", "", _boolean, str, {"type": "boolean"})


@dataclass(frozen=True)
class Parameter:
    """What a parameter means and what it may be: one of ``choices``, or of a ``kind``; ``aliases`` name choices."""

    help: str
    choices: tuple[str | None, ...] = ()
    kind: Kind | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    default: object = None

    def check(self, name: str, value: object) -> Any:
        """The value in its canonical form; ArgumentError naming the parameter if it is not allowed."""
        if value is None or isinstance(value, str):
            chosen = self.aliases.get(value, value) if value is not None else None
            if chosen in self.choices:
                return chosen
        elif self.kind is not None:
            converted = self.kind.convert(value)
            if converted is not None:
                return converted
        raise ArgumentError(f"{name} must be {self._allowed(self.choices)}, got {value!r}{self._hint(value)}")

    def parse(self, name: str, text: str) -> Any:
        """The value that an option's text stands for; "none" is None. ArgumentError as :meth:`check`."""
        value: object = None if text == "none" and None in self.choices else text
        if self.kind is not None and value not in (*self.choices, *self.aliases):
            with suppress(ValueError):  # check() says what is wrong with the text
                value = self.kind.parse(text)
        try:
            return self.check(name, value)
        except ArgumentError:
            typed = [choice or "none" for choice in self.choices]
            raise ArgumentError(f"{name} must be {self._allowed(typed)}, got {text!r}{self._hint(text)}") from None

    def _hint(self, value: object) -> str:
        return did_you_mean(value, [choice for choice in self.choices if choice], listed=True)

    def _allowed(self, choices: Sequence[str | None]) -> str:
        listed = ", ".join(map(repr, choices))
        if self.kind is None:
            return f"one of {listed}"
        return f"{listed} or {self.kind.words}" if listed else self.kind.words


def parameter(
    default: object,
    help: str,
    *,
    choices: tuple[str | None, ...] = (),
    kind: Kind | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Any:
    """A dataclass field that holds a :class:`Parameter`."""
    return field(default=default, metadata={"parameter": Parameter(help, choices, kind, aliases or {}, default)})


def weights_parameter(*rules: str, aliases: Mapping[str, str] | None = None) -> Any:
    """The field ``weights``, lambda_i of each model: one of the rules, the first by default, or K numbers."""
    help = "lambda_i, by a rule or one number a model"
    return parameter(rules[0], help, choices=rules, kind=NUMBERS, aliases=aliases)


def parameters_of(cls: type) -> dict[str, Parameter]:
    """The parameters that a dataclass declares by :func:`parameter`, ``InitVar`` ones included."""
    declared = getattr(cls, "__dataclass_fields__", {})
    return {name: f.metadata["parameter"] for name, f in declared.items() if "parameter" in f.metadata}
