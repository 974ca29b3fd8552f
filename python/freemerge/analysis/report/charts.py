"""Line charts, and how they become SVG text in the colours of the page's style sheet, which follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..measures import Row
from .text import number, text

WIDTH, HEIGHT = 400, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 10, 10, 40


@dataclass(frozen=True)
class Line:
    """Values at the positions of a chart, None where there is a gap; ``style`` is a class of the style sheet."""

    label: str
    values: Row
    style: str


@dataclass(frozen=True)
class Axis:
    """A scale from ``low`` to ``high`` with labelled ticks."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    title: str
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Chart:
    """Lines over common positions, with a dot at each value. ``reference`` is the height of a dashed line."""

    x: Axis
    y: Axis
    positions: Sequence[float]
    lines: Sequence[Line]
    reference: float | None = None


def linear_axis(title: str, values: Sequence[float], *, include: Sequence[float] = ()) -> Axis:
    """An axis over values with about five round ticks."""
    low, high = min([*values, *include], default=0.0), max([*values, *include], default=1.0)
    span = (high - low) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    decimals = max(0, -math.floor(math.log10(step)))
    ticks = [(i * step, f"{i * step:.{decimals}f}".replace("-", "−")) for i in range(first, last + 1)]
    return Axis(first * step, last * step, ticks, title)


def logarithmic_axis(title: str, values: Sequence[float]) -> Axis:
    """An axis over positive values, from a power of two to another one, around 1."""
    exponents = [math.log2(value) for value in values if value > 0]
    low, high = math.floor(min([*exponents, -1])), math.ceil(max([*exponents, 1]))
    step = max(1, math.ceil((high - low) / 6))
    powers = [power for power in range(low, high + 1) if power % step == 0]
    ticks = [(2.0**power, str(2**power) if power >= 0 else f"1/{2**-power}") for power in powers]
    return Axis(2.0**low, 2.0**high, ticks, title, logarithmic=True)


def line_chart(title: str, chart: Chart) -> str:
    """A chart as SVG; ``title`` is what a screen reader says."""
    x, y = chart.x, chart.y

    def across(value: float) -> float:
        return _LEFT + x.place(value) * (WIDTH - _LEFT - _RIGHT)

    def down(value: float) -> float:
        return HEIGHT - _BOTTOM - y.place(value) * (HEIGHT - _TOP - _BOTTOM)

    drawn = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}">']
    for value, label in y.ticks:
        drawn.append(f'<path class="grid" d="M{_LEFT} {down(value):.1f}H{WIDTH - _RIGHT}"/>')
        drawn.append(f'<text class="y" x="{_LEFT - 6}" y="{down(value) + 4:.1f}">{text(label)}</text>')
    for value, label in x.ticks:
        drawn.append(f'<text class="x" x="{across(value):.1f}" y="{HEIGHT - _BOTTOM + 16}">{text(label)}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    drawn.append(f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 6}">{text(x.title)}</text>')
    if chart.reference is not None:
        drawn.append(f'<path class="reference" d="M{_LEFT} {down(chart.reference):.1f}H{WIDTH - _RIGHT}"/>')
    drawn += [_drawn(line, chart.positions, across, down) for line in chart.lines]
    return "".join([*drawn, "</svg>"])


def spark_line(values: Row, y: Axis, reference: float) -> str:
    """A small line chart without labels."""
    width, height = 96, 22
    points = [
        (1 + (width - 2) * i / max(1, len(values) - 1), height - 1 - (height - 2) * y.place(value))
        for i, value in enumerate(values)
        if value is not None
    ]
    level = height - 1 - (height - 2) * y.place(reference)
    path = "L".join(f"{across:.1f} {down:.1f}" for across, down in points)
    title = ", ".join(number(value) for value in values)
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" role="img"><title>{title}</title>'
        f'<path class="reference" d="M1 {level:.1f}H{width - 1}"/>'
        + (f'<path class="line bold" d="M{path}"/>' if points else "")
        + "</svg>"
    )


def legend(lines: Sequence[tuple[str, str]]) -> str:
    """Labels and the styles of their lines."""
    return (
        '<p class="legend">' + "".join(f'<span class="{style}">{text(name)}</span>' for name, style in lines) + "</p>"
    )


def _drawn(
    line: Line, positions: Sequence[float], across: Callable[[float], float], down: Callable[[float], float]
) -> str:
    runs: list[list[tuple[float, float, float]]] = [[]]
    for position, value in zip(positions, line.values, strict=True):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((across(position), down(value), value))
    paths = "".join("M" + "L".join(f"{left:.1f} {top:.1f}" for left, top, _ in run) for run in runs if run)
    if not paths:
        return ""
    dots = "".join(
        f'<circle cx="{left:.1f}" cy="{top:.1f}" r="2.4"><title>{text(line.label)}: {number(value, 3)}</title></circle>'
        for run in runs
        for left, top, value in run
    )
    return f'<g class="{line.style}"><path class="line" d="{paths}"/>{dots}</g>'
