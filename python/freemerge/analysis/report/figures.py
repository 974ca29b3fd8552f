"""The charts of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from ..measures import Row
from .charts import Axis, Line, legend, line_chart, linear_axis, logarithmic_axis
from .heat import heat_map
from .text import mean, number, text

if TYPE_CHECKING:
    from ..result import Analysis

METHOD_STYLES = 6  #: colours of the style sheet, for methods
_SHOWN = 1e-6  # of the energy of noise; less is not drawn
_WRITTEN = 8  # more tasks than this, and the matrix of cosines shows no numbers


def task_figures(analysis: Analysis) -> str:
    """What the task vectors are like, and what they have in common."""
    return _side_by_side(_spectrum(analysis), _interference(analysis), _pairs(analysis))


def merged_figures(analysis: Analysis) -> str:
    """What methods make of them."""
    return _side_by_side(_singular(analysis), _left(analysis), _merged(analysis))


def method_style(index: int) -> str:
    """The colour of a method."""
    return f"m{index % METHOD_STYLES}"


def _spectrum(analysis: Analysis) -> str:
    spectra = analysis.total.spectra
    values = [value for spectrum in spectra for value in spectrum.bands if value]
    if not values:
        return ""
    lines = [Line(task, s.bands, "thin") for task, s in zip(analysis.tasks, spectra, strict=True)]
    lines.append(Line("mean", _columns_mean([s.bands for s in spectra]), "bold"))
    y = logarithmic_axis("energy", values)
    chart = line_chart("Spectrum", _radius(analysis), y, _centres(analysis), lines, reference=1)
    rows, columns = (mean(tuple(getattr(s, field) for s in spectra)) for field in ("row_means", "column_means"))
    return _figure(
        "Where the energy is",
        legend([("each task", "thin"), ("mean", "bold"), ("noise", "reference")]) + chart,
        "Energy of the task vectors by frequency, to that of white noise: a flat line at 1 has no structure. "
        f"The means of rows alone have {number(rows, 1)} times the energy of noise, those of columns "
        f"{number(columns, 1)} times.",
    )


def _interference(analysis: Analysis) -> str:
    total = analysis.total
    tasks = len(analysis.tasks)
    if tasks < 2 or all(value is None for value in total.band_variance):
        return ""
    noise = (1 - math.pi / 4) * (1 - 1 / tasks)
    variance = tuple(value / noise if value is not None else None for value in total.band_variance)
    lines = [Line("cosine", total.band_cosine, "bold"), Line("variance of amplitude", variance, "second")]
    y = linear_axis("", [value for line in lines for value in line.values if value is not None], include=(0, 1))
    chart = line_chart("Interference by band", _radius(analysis), y, _centres(analysis), lines, reference=0)
    return _figure(
        "Interference by frequency",
        legend([("cosine between tasks", "bold"), ("variance of amplitude", "second")]) + chart,
        "Cosine: 1 where tasks agree, 0 where they are unrelated. Variance over tasks of the spectrum's amplitude, to "
        "that of unrelated noise: 0 where the amplitudes are equal.",
    )


def _pairs(analysis: Analysis) -> str:
    cosine = analysis.total.cosine
    if len(cosine) < 2:
        return ""
    apart = [tuple(None if i == j else value for j, value in enumerate(row)) for i, row in enumerate(cosine)]
    numbers = [str(i + 1) for i in range(len(apart))]
    names = [f"{i + 1} {task}" for i, task in enumerate(analysis.tasks)]
    return _figure(
        "Cosine between tasks",
        heat_map(names, numbers, apart, number, written=len(apart) <= _WRITTEN),
        "Tasks that change the weights in the same way. Near 1: the same model twice, or nearly so.",
    )


def _singular(analysis: Analysis) -> str:
    total = analysis.total
    lines = [Line("task vectors, mean", _columns_mean([s.top for s in total.spectra]), "bold")]
    lines += [Line(label, m.spectrum.top, method_style(i)) for i, (label, m) in enumerate(total.methods.items())]
    shown = 1 + sum(any((line.values[r] or 1.0) < 0.9995 for line in lines) for r in range(len(analysis.ranks)))
    lines = [replace(line, values=line.values[:shown]) for line in lines]
    if not any(value is not None for line in lines for value in line.values):
        return ""
    ranks = [math.log2(rank) for rank in analysis.ranks[:shown]]
    shares = linear_axis("", [0.0, 1.0])
    x = Axis(0, max(1.0, ranks[-1]), [(rank, str(2 ** int(rank))) for rank in ranks[::2]], "number of directions")
    return _figure(
        "Energy in the strongest directions",
        legend([(line.label, line.style) for line in lines]) + line_chart("Directions", x, shares, ranks, lines),
        "Share of the energy in the first singular directions of each matrix. A line far to the left has few strong "
        "directions; one that rises late is spread over all.",
    )


def _left(analysis: Analysis) -> str:
    methods = analysis.total.methods
    lines = [Line(label, m.bands, method_style(i)) for i, (label, m) in enumerate(methods.items())]
    values = [value for line in lines for value in line.values if value is not None]
    if not values:
        return ""
    chart = line_chart(
        "Merged", _radius(analysis), linear_axis("", values, include=(0,)), _centres(analysis), lines, reference=0
    )
    return _figure(
        "What is left of each task",
        legend([(line.label, line.style) for line in lines]) + chart,
        "Cosine of the merged task vector with each task's own, by frequency, mean over tasks. A gap: the method "
        "leaves nothing there.",
    )


def _merged(analysis: Analysis) -> str:
    methods = analysis.total.methods
    bands = {label: tuple(v if v and v > _SHOWN else None for v in m.spectrum.bands) for label, m in methods.items()}
    values = [value for row in bands.values() for value in row if value is not None]
    if not values:
        return ""
    lines = [Line(label, row, method_style(i)) for i, (label, row) in enumerate(bands.items())]
    y = logarithmic_axis("energy", values)
    return _figure(
        "Where the merged energy is",
        legend([(line.label, line.style) for line in lines])
        + line_chart("Merged spectrum", _radius(analysis), y, _centres(analysis), lines, reference=1),
        "The same as the first chart, for what the methods make of the task vectors.",
    )


def _side_by_side(*drawn: str) -> str:
    return '<div class="figures">' + "".join(drawn) + "</div>"


def _figure(title: str, content: str, caption: str) -> str:
    return f"<figure><h3>{text(title)}</h3>{content}<figcaption>{text(caption)}</figcaption></figure>"


def _centres(analysis: Analysis) -> list[float]:
    edges = analysis.band_edges
    return [(low + high) / 2 for low, high in pairwise(edges[:-1])] + [edges[-2] + 0.05]


def _radius(analysis: Analysis) -> Axis:
    last = analysis.band_edges[-2]
    ticks = [(tenth / 10, f"{tenth / 10:g}") for tenth in range(round(10 * last))]
    return Axis(0, last + 0.1, [*ticks, (last + 0.05, f"≥ {last:g}")], "frequency, in units of a filter's cutoff")


def _columns_mean(rows: Sequence[Row]) -> Row:
    return tuple(mean(column) for column in zip(*rows, strict=True))
