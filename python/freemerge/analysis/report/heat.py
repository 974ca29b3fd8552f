"""Tables whose cells are coloured by their value."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..measures import Row, Value
from .text import table, text


def heat_map(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Row], show: Callable[[Value], str], *, written: bool
) -> str:
    """One cell a row and a column, coloured from the smallest to the largest value (0, if all are positive).

    ``show`` makes a number readable. ``written``: in the cells; otherwise it is seen by pointing at one.
    """

    def cell(value: Value, place: str) -> str:
        if value is None:
            return "<td></td>"
        share = (value - low) / ((high - low) or 1.0)
        strong = " class=strong" if share > 0.6 else ""
        shown = show(value)
        return (
            f'<td{strong} style="--v:{100 * share:.0f}%" title="{text(place)}: {shown}">{shown if written else ""}</td>'
        )

    known = [value for row in values for value in row if value is not None]
    low, high = min([0.0, *known]), max([0.0, *known])
    head = "".join(f"<th scope=col>{text(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th scope=row>{text(name)}</th>"
        + "".join(cell(value, f"{name}, {column}") for column, value in zip(columns, row, strict=True))
        + "</tr>"
        for name, row in zip(rows, values, strict=True)
    )
    kind = "heat written" if written else "heat"
    return table(kind, f"<tr><th></th>{head}</tr>", body)
