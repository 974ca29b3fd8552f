"""The table of methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..advice import ACCURACY
from ..measures import Row
from .figures import method_style
from .text import NONE, mean, number, percent, table, text

if TYPE_CHECKING:
    from ..result import Analysis


def methods_table(analysis: Analysis) -> str:
    """One row a method: its scale, and what is left of the tasks in its merged task vector."""
    total = analysis.total
    rank = mean(tuple(spectrum.effective_rank for spectrum in total.spectra))
    rows = [
        "<tr><th scope=row>one task vector</th><td></td><td></td>"
        f"<td>{number(total.mean_cosine)}</td><td>1.00</td><td>100 %</td><td>{percent(rank)}</td>"
        f"<td></td><td></td><td></td><td>{number(ACCURACY['individual'], 1)}</td></tr>"
    ]
    reach = max([abs(c) for m in total.methods.values() for c in m.cosine if c is not None], default=1.0)
    for i, (label, m) in enumerate(total.methods.items()):
        kept = [percent(m.filter.bins), percent(m.filter.energy), percent(m.filter.variance)] if m.filter else [""] * 3
        accuracy = ACCURACY.get(label)
        cells = [
            number(analysis.scales[label]),
            _strip(analysis.tasks, m.cosine, reach),
            number(mean(m.cosine)),
            number(m.norm),
            percent(mean(m.kept)),
            percent(m.spectrum.effective_rank),
            *kept,
            number(accuracy, 1) if accuracy is not None else NONE,
        ]
        style = method_style(i)
        row = f'<th scope=row class="{style}"><i class="dot"></i>{text(label)}</th>'
        rows.append(f"<tr>{row}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = (
        "<tr><th rowspan=2></th><th rowspan=2>scale</th><th colspan=2>cosine with each task</th>"
        "<th rowspan=2>norm</th><th rowspan=2>own task<br>kept</th><th rowspan=2>effective<br>rank</th>"
        "<th colspan=3>the filter keeps</th><th rowspan=2>accuracy,<br>our tests</th></tr>"
        "<tr><th></th><th>mean</th><th>bins</th><th>energy</th><th>variance</th></tr>"
    )
    note = (
        "Norm: of the merged task vector at its scale, to that of a task vector. Own task kept: its projection on each "
        "task's own vector, to that vector. The filter keeps: shares of the frequencies, of the energy, and of the "
        "variance over tasks of the amplitude; if interference sat where the filter cuts, the last share would be the "
        "smallest. Accuracy: not of these models, but mean over eight text tasks of our own evaluation, with scales "
        "tuned on validation data."
    )
    return table("methods", head, "".join(rows)) + f'<p class="note">{text(note)}</p>'


def _strip(tasks: tuple[str, ...], values: Row, reach: float) -> str:
    """A dot for each task on a line from 0 to ``reach``."""
    width, height = 120, 18
    dots = "".join(
        f'<circle cx="{5 + max(0.0, value) / (reach or 1.0) * (width - 10):.1f}" cy="{height / 2}" r="3.2">'
        f"<title>{text(task)}: {number(value, 3)}</title></circle>"
        for task, value in zip(tasks, values, strict=True)
        if value is not None
    )
    line = f'<path class="grid" d="M5 {height / 2}H{width - 5}"/>'
    return f'<svg class="strip" viewBox="0 0 {width} {height}" role="img">{line}{dots}</svg>'
