"""An analysis as a few lines for a terminal."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING

from ...errors import counted
from .text import mean, number, percent

if TYPE_CHECKING:
    from ..result import Analysis


def summary(analysis: Analysis) -> str:
    """The headline numbers, one line a method, and the advice."""
    total = analysis.total
    spectra = total.spectra
    rows = [("method", "scale", "cosine", "norm", "kept", "effective rank")]
    for label, m in total.methods.items():
        kept, rank = percent(mean(m.kept)), percent(m.spectrum.effective_rank)
        rows.append((label, number(analysis.scales[label]), number(mean(m.cosine)), number(m.norm), kept, rank))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    opening = (
        f"{counted(len(analysis.tasks), 'task vector')} of {counted(total.entries, 'entry', 'entries')} in "
        f"{counted(len(analysis.tensors), 'tensor')}: norm "
        f"{percent(mean(total.relative_size))} of the base's, cosine {number(total.mean_cosine)} and same sign "
        f"{percent(total.mean_sign_agreement)} between tasks, effective rank "
        f"{percent(mean(tuple(s.effective_rank for s in spectra)))}, energy of the lowest frequencies "
        f"{number(mean(tuple(s.bands[0] for s in spectra)))} times that of noise"
    )
    lines = [
        fill(opening, 100),
        "",
        *(
            "  ".join(f"{cell:>{width}}" if i else f"{cell:<{width}}" for i, (cell, width) in enumerate(cells)).rstrip()
            for cells in (list(zip(row, widths, strict=True)) for row in rows)
        ),
        "",
        fill(analysis.advice.reason, 100),
        f"    {analysis.advice.command}",
    ]
    return "\n".join(lines)
