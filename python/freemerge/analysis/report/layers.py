"""Measures by module type and depth: maps of the whole model, and a table for each type."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..measures import Measures, Row, Value
from .charts import Axis, logarithmic_axis, spark_line
from .heat import heat_map
from .text import count, mean, number, percent, table, text

if TYPE_CHECKING:
    from ..result import Analysis, TensorMeasures

Summary = Callable[[Measures], Value]

MAPS: dict[str, tuple[Summary, Callable[[Value], str]]] = {
    "change": (lambda m: mean(m.relative_size), percent),
    "cosine": (lambda m: m.mean_cosine, number),
    "same sign": (lambda m: m.mean_sign_agreement, percent),
    "effective rank": (lambda m: mean(tuple(s.effective_rank for s in m.spectra)), percent),
    "overlap": (lambda m: m.mean_overlap, number),
    "lowest frequencies": (lambda m: mean(tuple(s.bands[0] for s in m.spectra)), number),
}


def layer_values(analysis: Analysis) -> tuple[list[str], list[str], dict[str, list[Row]]]:
    """The types of modules, the depths, and for each of MAPS a row a type with a value a depth."""
    kinds = list(analysis.module_types)
    outside = any(tensor.depth is None for tensor in analysis.tensors)
    depths = [*([None] if outside else []), *sorted(analysis.depths)]
    places: dict[tuple[str, int | None], list[TensorMeasures]] = {}
    for tensor in analysis.tensors:
        places.setdefault((tensor.module_type, tensor.depth), []).append(tensor)
    values = {
        label: [
            tuple(mean(tuple(summary(t.measures) for t in places.get((kind, depth), []))) for depth in depths)
            for kind in kinds
        ]
        for label, (summary, _) in MAPS.items()
    }
    return kinds, ["no layer" if depth is None else str(depth) for depth in depths], values


def layer_maps(analysis: Analysis) -> str:
    """A map for each measure, of which one is shown: types of modules down, depth across."""
    kinds, columns, values = layer_values(analysis)
    buttons, maps = [], []
    for i, (label, (_, show)) in enumerate(MAPS.items()):
        chosen = " checked" if i == 0 else ""
        buttons.append(f'<input type="radio" name="map" id="map{i}"{chosen}><label for="map{i}">{text(label)}</label>')
        drawn = heat_map(kinds, columns, values[label], show, written=len(columns) <= 12)
        maps.append(f'<div class="map">{drawn}</div>')
    return f'<div class="maps">{"".join(buttons)}{"".join(maps)}</div>'


def module_details(analysis: Analysis) -> str:
    """For each type of module a line that opens to a table of its tensors."""
    bands = [value for t in analysis.tensors for s in t.measures.spectra for value in s.bands if value]
    y = logarithmic_axis("", [*bands, 1.0])
    labels = list(analysis.total.methods)
    heads = ["tensor", "shape", "change", "cosine", "same sign", "overlap", "effective rank", "stable rank", "spectrum"]
    heads += [f"cosine, {label}" for label in labels]
    head = "".join(f"<th scope=col>{text(label)}</th>" for label in heads)
    drawn = []
    for kind, total in analysis.module_types.items():
        tensors = [tensor for tensor in analysis.tensors if tensor.module_type == kind]
        rows = "".join(_row(tensor, labels, lambda m: _spectrum(m, y)) for tensor in tensors)
        summary = (
            f"<span>{text(kind)}</span><small>{len(tensors)} × {count(total.entries // len(tensors))}</small>"
            f"<small>change {percent(mean(total.relative_size))}</small>"
            f"<small>cosine {number(total.mean_cosine)}</small><i>{_spectrum(total, y)}</i>"
        )
        drawn.append(f"<details><summary>{summary}</summary>{table('sortable', f'<tr>{head}</tr>', rows)}</details>")
    return "".join(drawn)


def _row(tensor: TensorMeasures, labels: list[str], spectrum: Callable[[Measures], str]) -> str:
    m = tensor.measures
    shares: list[tuple[Value, str]] = [
        (value, show(value))
        for value, show in (
            (mean(m.relative_size), percent),
            (m.mean_cosine, number),
            (m.mean_sign_agreement, percent),
            (m.mean_overlap, number),
            (mean(tuple(s.effective_rank for s in m.spectra)), percent),
            (mean(tuple(s.stable_rank for s in m.spectra)), percent),
        )
    ]
    after: list[tuple[Value, str]] = [
        (mean(m.methods[label].cosine), number(mean(m.methods[label].cosine))) for label in labels
    ]

    def cells(values: list[tuple[Value, str]]) -> str:
        return "".join(
            f'<td data-v="{"" if value is None else f"{value:.6g}"}">{shown}</td>' for value, shown in values
        )

    shape = "×".join(map(str, tensor.shape)) or "scalar"
    low = mean(tuple(s.bands[0] for s in m.spectra))
    return (
        f'<tr><th scope=row>{text(tensor.name)}</th><td data-v="{m.entries}">{shape}</td>{cells(shares)}'
        f'<td data-v="{"" if low is None else f"{low:.6g}"}">{spectrum(m)}</td>{cells(after)}</tr>'
    )


def _spectrum(m: Measures, y: Axis) -> str:
    bands = tuple(mean(column) for column in zip(*(s.bands for s in m.spectra), strict=True))
    return spark_line(bands, y, 1.0) if any(value is not None for value in bands) else ""
