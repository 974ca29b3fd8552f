"""freemerge clean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import PATH
from .command import Argument, Command, Option
from .failures import DONE
from .output import Output

if TYPE_CHECKING:
    from ..checkpoint.leftovers import Leftover


def command() -> Command:
    """The command."""
    return Command(
        run,
        [
            Argument("directory", type=PATH, help="where outputs are written"),
            Option("--dry-run", is_flag=True, help="report it only"),
        ],
        examples="""
            freemerge clean . --dry-run
            freemerge clean models
        """,
    )


def run(output: Output, directory: Path, dry_run: bool) -> int:
    """Remove what killed runs left in a directory. What a living run writes stays."""
    from ..checkpoint.leftovers import clean

    found = clean(directory, remove=not dry_run)
    for left in found:
        output.result(left, f"{left.path}: {_fate(left, dry_run)} ({left.nbytes / 1e6:.3g} MB)")
    if not found:
        output.note(f"{directory}: killed runs left nothing here")
    return DONE


def _fate(left: Leftover, dry_run: bool) -> str:
    if left.removed:
        return "removed"
    if left.alive:
        return "kept, a run is writing it"
    if left.alive is None:
        return "kept, as its file system cannot tell whether a run is writing it"
    if left.holds_output:
        return "kept, a whole output that was being replaced; move it to where it belongs"
    return "left by a killed run" if dry_run else "left by a killed run, and cannot be removed"
