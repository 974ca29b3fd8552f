"""The report: one page that holds its styles, its script and its charts, and fetches nothing."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING

from ... import __version__
from ...errors import counted
from ..advice import LIMITS
from .figures import merged_figures, side_by_side, task_figures
from .layers import layer_maps, module_details
from .tables import methods_table
from .text import count, mean, number, percent, sentence, text

if TYPE_CHECKING:
    from ..result import Analysis

_STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
_SCRIPT = Path(__file__).with_name("script.js").read_text(encoding="utf-8")


def page(analysis: Analysis) -> str:
    """The whole report as HTML. Every name in it is escaped, and the page's policy lets no other script run."""
    script_hash = b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'"
    body = [
        _header(analysis),
        _tiles(analysis),
        _advice(analysis),
        f"<section><h2>Task vectors</h2>{side_by_side(task_figures(analysis))}</section>",
        "<section><h2>Before and after merging</h2>"
        f"{side_by_side(merged_figures(analysis))}{methods_table(analysis)}</section>",
        f"<section><h2>Layers</h2>{layer_maps(analysis)}{module_details(analysis)}</section>",
        f"<section><h2>What the measures tell, and what they do not</h2>{_list(LIMITS)}</section>",
        _remarks(analysis),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(_title(analysis))}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + f"\n</main><footer>freemerge {__version__}</footer><script>{_SCRIPT}</script></body></html>\n"
    )


def _title(analysis: Analysis) -> str:
    tasks = len(analysis.tasks)
    return f"{tasks} fine-tuned model{'s' if tasks > 1 else ''} of {analysis.base}"


def _header(analysis: Analysis) -> str:
    names = "".join(f"<span>{text(task)}</span>" for task in analysis.tasks)
    return f'<header><h1>{text(_title(analysis))}</h1><p class="names">{names}</p></header>'


def _tiles(analysis: Analysis) -> str:
    total = analysis.total
    first = mean(tuple(spectrum.bands[0] for spectrum in total.spectra))
    rows = mean(tuple(spectrum.row_means for spectrum in total.spectra))
    rank = mean(tuple(spectrum.effective_rank for spectrum in total.spectra))
    tiles = [
        (count(total.entries), "parameters", f"in {counted(len(analysis.tensors), 'tensor')}"),
        (percent(mean(total.relative_size)), "change", "norm of a task vector to that of the base"),
        (number(total.mean_cosine), "cosine", "between task vectors; 0 for unrelated ones"),
        (percent(total.mean_sign_agreement), "same sign", "of two task vectors' entries; 50 % by chance"),
        (f"{number(first, 1)} ×", "lowest frequencies", f"energy to that of noise; row means {number(rows, 1)} ×"),
        (percent(rank), "effective rank", "of a task vector's matrices, of the shorter side"),
    ]
    cells = "".join(
        f"<div><strong>{text(value)}</strong><b>{text(label)}</b><small>{text(remark)}</small></div>"
        for value, label, remark in tiles
    )
    return f'<section class="tiles">{cells}</section>'


def _advice(analysis: Analysis) -> str:
    advice = analysis.advice
    return (
        f'<section class="advice"><h2>Start with {text(advice.title)}</h2><p>{sentence(advice.reason)}</p>'
        f"<pre>{text(advice.command)}</pre></section>"
    )


def _remarks(analysis: Analysis) -> str:
    remarks = list(analysis.notices)
    if analysis.left_out:
        remarks.append(f"Not analysed, as merging copies or averages them: {', '.join(analysis.left_out)}")
    return f"<section><h2>Remarks</h2>{_list(remarks)}</section>" if remarks else ""


def _list(sentences: list[str] | tuple[str, ...]) -> str:
    return "<ul>" + "".join(f"<li>{sentence(words)}</li>" for words in sentences) + "</ul>"
