"""Text and numbers as they stand in the page."""

from __future__ import annotations

from html import escape

from ..measures import Row, Value

NONE = "–"


def text(value: object) -> str:
    """Escaped for HTML, attributes included; see :func:`printable`."""
    return escape(printable(value))


def printable(value: object) -> str:
    """Characters that show nothing or change the direction are spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def sentence(words: str) -> str:
    """Text to be read, escaped; a number keeps its unit and its sign."""
    return text(words).replace(" %", "&nbsp;%").replace(" -", " −")


def number(value: Value, digits: int = 2) -> str:
    """A number with ``digits`` decimals, fewer where it is large."""
    if value is None:
        return NONE
    decimals = digits if abs(value) < 10 else 1 if abs(value) < 100 else 0
    shown = f"{value:.{decimals}f}"
    return shown.removeprefix("-") if float(shown) == 0 else shown.replace("-", "−")


def percent(value: Value) -> str:
    """A share as a percentage."""
    if value is None:
        return NONE
    share = 100 * value
    return (
        f"{share:.0f} %" if abs(share) >= 9.95 or share == 0 else f"{share:.1f} %" if abs(share) >= 0.1 else "< 0.1 %"
    )


def count(value: int) -> str:
    """A large count, rounded."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def mean(row: Row) -> Value:
    """The mean of the values that there are."""
    known = [value for value in row if value is not None]
    return sum(known) / len(known) if known else None


def table(kind: str, head: str, body: str) -> str:
    """A table that scrolls by itself where the page is too narrow; ``head`` and ``body`` are rows in HTML."""
    rows = f"<thead>{head}</thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{rows}</table></div>'
