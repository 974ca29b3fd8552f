"""Parameters: what they accept, what they say, and how an option's text is read."""

from __future__ import annotations

import pytest

from freemerge.errors import ArgumentError, did_you_mean
from freemerge.methods.parameters import FLAG, NUMBER, NUMBERS, Kind, Parameter, number


def parameter(*choices: str | None, kind: Kind | None = None, **aliases: str) -> Parameter:
    return Parameter("", choices, kind, aliases)


SCALE = parameter("auto", kind=NUMBER)
WEIGHTS = parameter("even", "sum", kind=NUMBERS, equal="even")
ENERGY = parameter(None, "energy")
SHARE = parameter(kind=number(0, 1))


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (SCALE, "auto", "auto"),
        (SCALE, 3, 3.0),
        (WEIGHTS, "equal", "even"),
        (WEIGHTS, [1, 2.5], (1.0, 2.5)),
        (ENERGY, None, None),
        (ENERGY, "energy", "energy"),
        (SHARE, 1, 1.0),
        (parameter(kind=FLAG), False, False),
    ],
)
def test_values(kind: Parameter, value: object, expected: object) -> None:
    checked = kind.check("x", value)
    assert (checked, type(checked)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (SCALE, "high", "x must be 'auto' or a finite number, got 'high'"),
        (SCALE, None, "x must be 'auto' or a finite number, got None"),
        (SCALE, float("nan"), "x must be .* got nan"),
        (SCALE, True, "x must be .* got True"),
        (WEIGHTS, "evn", "x must be 'even', 'sum' or a list of finite numbers, got 'evn'"),
        (WEIGHTS, [], "x must be"),
        (WEIGHTS, [1.0, "2"], "x must be"),
        (WEIGHTS, 1.0, "x must be"),
        (ENERGY, "none", "x must be one of None, 'energy', got 'none'"),
        (ENERGY, 1, "x must be one of None, 'energy', got 1"),
        (SHARE, 1.5, "x must be a number from 0 to 1, got 1.5"),
        (SHARE, -0.1, "x must be a number from 0 to 1"),
        (parameter(kind=FLAG), 1, "x must be true or false, got 1"),
    ],
)
def test_other_values_are_refused_by_name(kind: Parameter, value: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        kind.check("x", value)


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (SCALE, "auto", "auto"),
        (SCALE, "-1e-3", -0.001),
        (WEIGHTS, "equal", "even"),
        (WEIGHTS, "-0.1,0.3", (-0.1, 0.3)),
        (WEIGHTS, "2", (2.0,)),
        (ENERGY, "none", None),
        (ENERGY, "energy", "energy"),
    ],
)
def test_options(kind: Parameter, text: str, expected: object) -> None:
    assert kind.parse("--x", text) == expected


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (SCALE, "big", "--x must be 'auto' or a finite number, got 'big'"),
        (SCALE, "inf", "--x must be"),
        (WEIGHTS, "1;2", "--x must be 'even', 'sum' or a list of finite numbers, got '1;2'"),
        (ENERGY, "None", "--x must be one of 'none', 'energy', got 'None'"),
    ],
)
def test_misspelt_options(kind: Parameter, text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        kind.parse("--x", text)


def test_suggestions() -> None:
    assert did_you_mean("wieghts", ["weights", "scale"]) == "; did you mean 'weights'?"
    assert did_you_mean("x", ["weights", "scale"]) == "; known: weights, scale"
