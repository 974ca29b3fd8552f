"""The charts of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from ..measures import Row
from .charts import Axis, Chart, Line, legend, line_chart, linear_axis, logarithmic_axis
from .heat import heat_map
from .text import mean, number, text

if TYPE_CHECKING:
    from ..result import Analysis

METHOD_STYLES = 6  #: colours of the style sheet, for methods
_SHOWN = 1e-6  # of the energy of noise; less is not drawn
WRITTEN = 8  #: more tasks than this, and the matrix of cosines shows no numbers


@dataclass(frozen=True)
class Grid:
    """A value, or none, for each row and column; the columns have the numbers of the rows."""

    rows: Sequence[str]
    values: Sequence[Row]


@dataclass(frozen=True)
class Figure:
    """A chart or a grid with what it says; ``legend`` has labels and the styles of their lines."""

    title: str
    content: Chart | Grid
    caption: str
    legend: Sequence[tuple[str, str]] = ()


def task_figures(analysis: Analysis) -> list[Figure]:
    """What the task vectors are like, and what they have in common; without those that have nothing to show."""
    return [figure for draw in (_spectrum, _interference, _pairs) if (figure := draw(analysis)) is not None]


def merged_figures(analysis: Analysis) -> list[Figure]:
    """What methods make of them."""
    return [figure for draw in (_singular, _left, _merged) if (figure := draw(analysis)) is not None]


def side_by_side(figures: Sequence[Figure]) -> str:
    """Figures as a part of the page."""
    return '<div class="figures">' + "".join(_figure(figure) for figure in figures) + "</div>"


def method_style(index: int) -> str:
    """The colour of a method; those after the first six have dashed lines."""
    return f"m{index % METHOD_STYLES}" + (" dashed" if index >= METHOD_STYLES else "")


def _spectrum(analysis: Analysis) -> Figure | None:
    spectra = analysis.total.spectra
    values = [value for spectrum in spectra for value in spectrum.bands if value]
    if not values:
        return None
    lines = [Line(task, s.bands, "thin") for task, s in zip(analysis.tasks, spectra, strict=True)]
    lines.append(Line("mean", _columns_mean([s.bands for s in spectra]), "bold"))
    y = logarithmic_axis("energy", values)
    chart = Chart(_radius(analysis), y, _centres(analysis), lines, reference=1)
    rows, columns = (mean(tuple(getattr(s, field) for s in spectra)) for field in ("row_means", "column_means"))
    return Figure(
        "Where the energy is",
        chart,
        "Energy of the task vectors by frequency, to that of white noise: a flat line at 1 has no structure. "
        f"The means of rows alone have {number(rows, 1)} times the energy of noise, those of columns "
        f"{number(columns, 1)} times.",
        [("each task", "thin"), ("mean", "bold"), ("noise", "reference")],
    )


def _interference(analysis: Analysis) -> Figure | None:
    total = analysis.total
    tasks = len(analysis.tasks)
    if tasks < 2 or all(value is None for value in total.band_variance):
        return None
    noise = (1 - math.pi / 4) * (1 - 1 / tasks)
    variance = tuple(value / noise if value is not None else None for value in total.band_variance)
    lines = [Line("cosine", total.band_cosine, "bold"), Line("variance of amplitude", variance, "second")]
    y = linear_axis("", [value for line in lines for value in line.values if value is not None], include=(0, 1))
    return Figure(
        "Interference by frequency",
        Chart(_radius(analysis), y, _centres(analysis), lines, reference=0),
        "Cosine: 1 where tasks agree, 0 where they are unrelated. Variance over tasks of the spectrum's amplitude, to "
        "that of unrelated noise: 0 where the amplitudes are equal.",
        [("cosine between tasks", "bold"), ("variance of amplitude", "second")],
    )


def _pairs(analysis: Analysis) -> Figure | None:
    cosine = analysis.total.cosine
    if len(cosine) < 2:
        return None
    apart = [tuple(None if i == j else value for j, value in enumerate(row)) for i, row in enumerate(cosine)]
    return Figure(
        "Cosine between tasks",
        Grid([f"{i + 1} {task}" for i, task in enumerate(analysis.tasks)], apart),
        "Tasks that change the weights in the same way. Near 1: the same model twice, or nearly so.",
    )


def _singular(analysis: Analysis) -> Figure | None:
    total = analysis.total
    lines = [Line("task vectors, mean", _columns_mean([s.top for s in total.spectra]), "bold")]
    lines += [Line(label, m.spectrum.top, method_style(i)) for i, (label, m) in enumerate(total.methods.items())]
    shown = 1 + sum(any((line.values[r] or 1.0) < 0.9995 for line in lines) for r in range(len(analysis.ranks)))
    lines = [replace(line, values=line.values[:shown]) for line in lines]
    if not any(value is not None for line in lines for value in line.values):
        return None
    ranks = [math.log2(rank) for rank in analysis.ranks[:shown]]
    shares = linear_axis("", [0.0, 1.0])
    x = Axis(0, max(1.0, ranks[-1]), [(rank, str(2 ** int(rank))) for rank in ranks[::2]], "number of directions")
    return Figure(
        "Energy in the strongest directions",
        Chart(x, shares, ranks, lines),
        "Share of the energy in the first singular directions of each matrix. A line far to the left has few strong "
        "directions; one that rises late is spread over all.",
        _labels(lines),
    )


def _left(analysis: Analysis) -> Figure | None:
    methods = analysis.total.methods
    lines = [Line(label, m.bands, method_style(i)) for i, (label, m) in enumerate(methods.items())]
    values = [value for line in lines for value in line.values if value is not None]
    if not values:
        return None
    return Figure(
        "What is left of each task",
        Chart(_radius(analysis), linear_axis("", values, include=(0,)), _centres(analysis), lines, reference=0),
        "Cosine of the merged task vector with each task's own, by frequency, mean over tasks. A gap: the method "
        "leaves nothing there.",
        _labels(lines),
    )


def _merged(analysis: Analysis) -> Figure | None:
    methods = analysis.total.methods
    bands = {label: tuple(v if v and v > _SHOWN else None for v in m.spectrum.bands) for label, m in methods.items()}
    values = [value for row in bands.values() for value in row if value is not None]
    if not values:
        return None
    lines = [Line(label, row, method_style(i)) for i, (label, row) in enumerate(bands.items())]
    return Figure(
        "Where the merged energy is",
        Chart(_radius(analysis), logarithmic_axis("energy", values), _centres(analysis), lines, reference=1),
        "The same as the first chart, for what the methods make of the task vectors.",
        _labels(lines),
    )


def _figure(figure: Figure) -> str:
    content = figure.content
    if isinstance(content, Grid):
        numbers = [str(i + 1) for i in range(len(content.rows))]
        drawn = heat_map(content.rows, numbers, content.values, number, written=len(numbers) <= WRITTEN)
    else:
        drawn = legend(figure.legend) + line_chart(figure.title, content)
    return f"<figure><h3>{text(figure.title)}</h3>{drawn}<figcaption>{text(figure.caption)}</figcaption></figure>"


def _labels(lines: Sequence[Line]) -> list[tuple[str, str]]:
    return [(line.label, line.style) for line in lines]


def _centres(analysis: Analysis) -> list[float]:
    edges = analysis.band_edges
    return [(low + high) / 2 for low, high in pairwise(edges[:-1])] + [edges[-2] + 0.05]


def _radius(analysis: Analysis) -> Axis:
    last = analysis.band_edges[-2]
    ticks = [(tenth / 10, f"{tenth / 10:g}") for tenth in range(round(10 * last))]
    return Axis(0, last + 0.1, [*ticks, (last + 0.05, f"≥ {last:g}")], "frequency, in units of a filter's cutoff")


def _columns_mean(rows: Sequence[Row]) -> Row:
    return tuple(mean(column) for column in zip(*rows, strict=True))
