"""The figures of the report as PNG files, drawn by matplotlib, with the light colours of the page."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError
from .charts import Chart
from .figures import WRITTEN, Figure, Grid, merged_figures, task_figures
from .heat import FLOOR, STRONG, Shades
from .layers import MAPS, layer_values
from .text import number, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure as Picture

    from ..measures import Row, Value
    from ..result import Analysis

DPI = 150
_HIGHEST = 40.0  # inches, of the picture of the layers
_STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
_COLOURS = dict(re.findall(r"--(\w+): (#\w{6})", _STYLE.split("}", 1)[0]))
_LINES: dict[str, dict[str, Any]] = {
    "bold": {"color": _COLOURS["accent"], "linewidth": 2.2},
    "second": {"color": _COLOURS["second"], "linewidth": 1.6},
    "thin": {"color": _COLOURS["soft"], "linewidth": 0.8, "alpha": 0.55, "markersize": 2},
    "reference": {"color": _COLOURS["soft"], "linewidth": 0.9, "linestyle": "--", "marker": ""},
}
_SETTINGS: dict[Any, Any] = {
    "text.parse_math": False,  # names may hold dollars
    "font.size": 9.0,
    "axes.edgecolor": _COLOURS["line"],
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelcolor": _COLOURS["soft"],
    "text.color": _COLOURS["ink"],
    "xtick.color": _COLOURS["soft"],
    "ytick.color": _COLOURS["soft"],
    "lines.marker": "o",
    "lines.markersize": 3.5,
}


def check_matplotlib() -> None:
    """Complain if there is no matplotlib, before the work begins."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ArgumentError("pictures need matplotlib: pip install 'freemerge[png]'") from None


def pictures(analysis: Analysis) -> Iterator[tuple[str, bytes]]:
    """The names and contents of PNG files: every figure of the report, and the maps of its layers."""
    from matplotlib import rc_context

    with rc_context(_SETTINGS), warnings.catch_warnings():
        # A character that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        for figure in (*task_figures(analysis), *merged_figures(analysis)):
            yield f"{figure.title.lower().replace(' ', '-')}.png", _png(_picture(figure))
        yield "layers.png", _png(_layers(analysis))


def _png(picture: Picture) -> bytes:
    stream = BytesIO()
    picture.savefig(stream, format="png", dpi=DPI)
    return stream.getvalue()


def _picture(figure: Figure) -> Picture:
    from matplotlib.figure import Figure as Picture

    side = 4.0 + 0.25 * max(0, len(figure.content.rows) - 8) if isinstance(figure.content, Grid) else 4.0
    picture = Picture(figsize=(1.5 * side, side + 0.4), layout="constrained")
    axes = picture.subplots()
    axes.set_title(figure.title)
    if isinstance(figure.content, Grid):
        names = figure.content.rows
        columns = [str(i + 1) for i in range(len(names))]
        _draw_map(picture, axes, names, columns, figure.content.values, number, written=len(names) <= WRITTEN)
    else:
        _draw_lines(axes, figure.content)
        handles = [axes.plot([], [], **line(style))[0] for _, style in figure.legend]
        labels = [f" {printable(label)}" for label, _ in figure.legend]  # one that begins with _ would be left out
        picture.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
    return picture


def _draw_lines(axes: Axes, chart: Chart) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_COLOURS["line"], linewidth=0.7)
    axes.set_axisbelow(True)
    if chart.y.logarithmic:
        axes.set_yscale("log")
        axes.minorticks_off()
    for axis, scale in ((axes.xaxis, chart.x), (axes.yaxis, chart.y)):
        axis.set_ticks([value for value, _ in scale.ticks], [label for _, label in scale.ticks])
        axis.set_label_text(scale.title)
    axes.set_xlim(chart.x.low, chart.x.high)
    axes.set_ylim(chart.y.low, chart.y.high)
    if chart.reference is not None:
        axes.axhline(chart.reference, **line("reference"))
    for drawn in chart.lines:
        values = [float("nan") if value is None else value for value in drawn.values]
        axes.plot(chart.positions, values, clip_on=False, **line(drawn.style))


def _draw_map(
    picture: Picture,
    axes: Axes,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Row],
    show: Callable[[Value], str],
    *,
    written: bool,
) -> None:
    shades = Shades(value for row in values for value in row)
    depths = [[float("nan") if value is None else shades.depth(value) for value in row] for row in values]
    image = axes.imshow(depths, cmap=_colours(), vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    shown = range(0, len(columns), max(1, len(columns) // 12))
    axes.set_xticks(list(shown), [columns[i] for i in shown])
    axes.set_yticks(range(len(rows)), [printable(name) for name in rows])
    bar = picture.colorbar(image, ax=axes, shrink=0.8)
    bar.outline.set_visible(False)
    ticks = [depth for depth in (-1.0, -0.5, 0.0, 0.5, 1.0) if depth >= shades.lowest]
    bar.set_ticks(ticks, labels=[show(shades.value(depth)) for depth in ticks])
    bar.ax.set_ylim(shades.lowest, 1)
    if not written:
        return
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value is not None:
                colour = _COLOURS["bg" if abs(shades.depth(value)) > STRONG else "ink"]
                axes.text(j, i, show(value), ha="center", va="center", color=colour)


def _colours() -> Colormap:
    """Of depths from -1 to 1, as the page mixes them."""
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap

    def half(name: str) -> Colormap:
        return LinearSegmentedColormap.from_list(name, [_COLOURS["panel"], _COLOURS[name]])

    depths = [FLOOR + (1 - FLOOR) * i / 127 for i in range(128)]
    return ListedColormap([*half("second")(depths[::-1]), *half("accent")(depths)])


def _layers(analysis: Analysis) -> Picture:
    from matplotlib.figure import Figure as Picture

    kinds, columns, values = layer_values(analysis)
    picture = Picture(figsize=(13.0, min(_HIGHEST, 2 * (1.0 + 0.24 * len(kinds)))), layout="constrained")
    for axes, (label, (_, show)) in zip(picture.subplots(2, 3, sharey=True).flat, MAPS.items(), strict=True):
        axes.set_title(label)
        _draw_map(picture, axes, kinds, columns, values[label], show, written=False)
    return picture


def line(style: str) -> dict[str, Any]:
    """How matplotlib draws what the style sheet calls by this name."""
    if style in _LINES:
        return _LINES[style]
    colour, *dashed = style.split()
    return {"color": _COLOURS[colour], "linewidth": 1.6, "linestyle": "--" if dashed else "-"}
