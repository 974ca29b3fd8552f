"""Tables whose cells are coloured by their value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from ..measures import Row, Value
from .text import table, text

FLOOR = 0.15  #: how much of its colour the palest cell has
STRONG = 0.6  #: on deeper cells text is light


class Shades:
    """How deep a value's colour is: 0 for the smallest size, 1 for the largest; negative ones have another colour.

    The range is that of the sizes, at least a tenth of the largest. The square root tells weak ones apart beside a
    strong one.
    """

    def __init__(self, values: Iterable[Value]) -> None:
        known = [value for value in values if value is not None]
        self._high = max(map(abs, known), default=0.0)
        self._low = min([0.9 * self._high, *map(abs, known)])
        self.lowest = min([0.0, *map(self.depth, known)])

    def depth(self, value: float) -> float:
        """Of a value, negative as it is."""
        share = (abs(value) - self._low) / ((self._high - self._low) or 1.0)
        return math.copysign(math.sqrt(max(0.0, share)), value)

    def value(self, depth: float) -> float:
        """That has this depth."""
        return math.copysign(self._low + depth * depth * (self._high - self._low), depth)


def heat_map(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Row], show: Callable[[Value], str], *, written: bool
) -> str:
    """One cell a row and a column, coloured by :class:`Shades`, with a legend.

    ``show`` makes a number readable. ``written``: in the cells; otherwise it is seen by pointing at one.
    """

    def cell(value: Value, place: str) -> str:
        if value is None:
            return "<td></td>"
        depth = shades.depth(value)
        kinds = [kind for kind, is_so in (("strong", abs(depth) > STRONG), ("negative", value < 0)) if is_so]
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        percent = 100 * (FLOOR + (1 - FLOOR) * abs(depth))
        shown = show(value)
        return f'<td{kind} style="--v:{percent:.0f}%" title="{text(place)}: {shown}">{shown if written else ""}</td>'

    shades = Shades(value for row in values for value in row)
    head = "".join(f"<th scope=col>{text(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th scope=row>{text(name)}</th>"
        + "".join(cell(value, f"{name}, {column}") for column, value in zip(columns, row, strict=True))
        + "</tr>"
        for name, row in zip(rows, values, strict=True)
    )
    kind = "heat written" if written else "heat"
    return table(kind, f"<tr><th></th>{head}</tr>", body) + _legend(shades, show)


def _legend(shades: Shades, show: Callable[[Value], str]) -> str:
    """A bar of the colours with the values at its ends and in its middle."""
    marks = "".join(f"<span>{show(shades.value(depth))}</span>" for depth in (0.0, 0.5, 1.0))
    negative = "<b>negative</b>" if shades.lowest < 0 else ""
    return f'<div class="shades"><div><i></i>{marks}</div>{negative}</div>'
