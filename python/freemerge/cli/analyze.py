"""freemerge analyze."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .arguments import PATH, Parsed, base_and_models, names
from .command import Command, Option
from .failures import DONE
from .output import Output


def command() -> Command:
    """The command."""
    return Command(
        run,
        [
            *base_and_models(),
            Option("-o", "--out", type=PATH, metavar="REPORT.html", help="write the report to this file"),
            Option("--png", type=PATH, metavar="DIR", help="write its figures into this folder, by matplotlib"),
            Option("--force", is_flag=True, help="replace an existing report and pictures"),
            Option("--methods", type=Parsed(listed), metavar="NAME,...", help="methods of merging to compare"),
            *names(),
        ],
        examples="""
            freemerge analyze base math code -o report.html
            freemerge analyze base math code -o report.html --png figures
            freemerge analyze base math code --methods fr,iso_c,tsv_m
            freemerge analyze base math code --json --select '*embed*=copy'
        """,
    )


def run(
    output: Output,
    base: Path,
    models: Sequence[Path],
    out: Path | None,
    png: Path | None,
    force: bool,
    methods: list[str] | None,
    select: Sequence[tuple[str, str]],
    rename: Sequence[tuple[str, str]],
) -> int:
    """Say what the task vectors of the models have in common, before and after merging: as numbers, and as a report.

    docs/analysis.md says what is measured, and what it does not tell.
    """
    from ..analysis import analyze

    chosen = {} if methods is None else {"methods": methods}
    analysis = analyze(
        base, models, select=select, rename=rename, out=out, png=png, force=force, progress=output.talks, **chosen
    )
    output.result(analysis.to_dict(), analysis.to_text())
    if output.talks:
        for label, written in (("report", out), ("pictures", png)):
            if written is not None:
                print(f"{label}: {written}")
    return DONE


def listed(text: str) -> list[str]:
    """Names."""
    return text.split(",")
