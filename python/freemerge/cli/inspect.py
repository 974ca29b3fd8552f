"""freemerge inspect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from ..errors import counted
from .arguments import tokenizer_from
from .command import Command, Option
from .failures import DONE
from .output import Output, printable
from .recipes import inputs, read

if TYPE_CHECKING:
    from ..checkpoint.side_files import TokenizerFrom
    from ..merging.inspection import Inspection


def command() -> Command:
    """The command."""
    return Command(
        run,
        [*inputs(), tokenizer_from(), backend()],
        examples="""
            freemerge inspect base math code
            freemerge inspect base math code --cutoff 0.2
            freemerge inspect base math code --method iso_c --json
        """,
    )


def run(
    output: Output,
    base: Path | None,
    models: Sequence[Path],
    tokenizer_from: TokenizerFrom,
    backend: str,
    **options: Any,
) -> int:
    """Say what a merge would do to each tensor, and how much of its spectrum a filter removes, from headers alone."""
    origin, tuned, recipe = read(base, models, options)
    from ..merging.run import inspect

    tell(output, inspect(origin, tuned, recipe, backend=backend, tokenizer_from=tokenizer_from))
    return DONE


class _Backend(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """The name of a backend, which is completed by those that there are."""

    name = "backend"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from ..backends.registry import BACKENDS

        known = ("auto", *(backend.name for backend in BACKENDS))
        return [CompletionItem(word) for word in known if word.startswith(incomplete)]


def backend() -> Option:
    """--backend."""
    return Option(
        "--backend",
        section="Machine",
        type=_Backend(),
        default="auto",
        metavar="NAME",
        help="auto or one of those that `freemerge backends` lists",
    )


def tell(output: Output, inspection: Inspection) -> None:
    """Print an inspection."""
    output.result(inspection, text_of(inspection))
    warn(output, inspection)


def warn(output: Output, inspection: Inspection) -> None:
    """Print the warnings of an inspection."""
    for warning in inspection.warnings:
        output.note(f"warning: {warning}")


def text_of(inspection: Inspection) -> str:
    """A line a tensor, and the sums."""
    width = max((len(decision.name) for decision in inspection.decisions), default=4)
    lines = []
    for decision in inspection.decisions:
        shape = "x".join(map(str, decision.shape)) or "scalar"
        line = f"{printable(decision.name):{width}}  {shape:>14}  {decision.dtype:8}  {decision.action:6}"
        if decision.removed is not None:
            line += f"  removes {decision.removed:6.2%}  {decision.backend}: {decision.form}"
        if decision.stacked_with:
            line += f"  stacked: {', '.join(decision.stacked_with)}"
        lines.append(line)
    lines.append(
        f"{summary(inspection)}; {inspection.read_bytes / 1e9:.3g} GB to read in {inspection.passes} "
        f"pass{'es' if inspection.passes > 1 else ''}, {inspection.write_bytes / 1e9:.3g} GB to write"
    )
    if inspection.seconds is not None:
        lines.append(
            f"needs {inspection.memory_bytes / 1e9:.2g} GB of memory beside the system's cache, "
            f"{inspection.write_bytes / 1e9:.3g} GB of disk, and about {_duration(inspection.seconds)} where the disk "
            "keeps up"
        )
    return "\n".join(lines)


def summary(inspection: Inspection) -> str:
    """How many tensors meet which fate."""
    actions = [decision.action for decision in inspection.decisions]
    matrices, others = counted(actions.count("filter"), "tensor"), actions.count("merge")
    if any(decision.removed is not None for decision in inspection.decisions):
        merged = f"{matrices} filtered, {others} merged unfiltered"
    else:  # the method has no filter
        merged = f"{matrices} merged as matrices, {others} entry by entry"
    averaged = f", {actions.count('average')} averaged" if "average" in actions else ""
    return f"{merged}, {actions.count('copy')} copied{averaged}"


def _duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 99.5 else f"{seconds / 60:.0f} min"
