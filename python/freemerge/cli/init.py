"""freemerge init."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .arguments import PATH
from .command import Command, Option
from .failures import DONE
from .inspect import summary, warn
from .output import Output, printable
from .recipes import inputs, read


def command() -> Command:
    """The command."""
    section = "Output"
    return Command(
        run,
        [
            *inputs(),
            Option(
                "-o", "--out", section=section, type=PATH, metavar="FILE", help="write to this file, not the terminal"
            ),
            Option("--force", section=section, is_flag=True, help="replace an existing file"),
        ],
        examples="""
            freemerge init base math code -o recipe.yml
            freemerge init base math code --method ties --density 0.3 -o recipe.yml
            freemerge merge base math code --recipe recipe.yml -o merged
        """,
    )


def run(
    output: Output, base: Path | None, models: Sequence[Path], out: Path | None, force: bool, **options: Any
) -> int:
    """Write a recipe for these models with a comment at every field, after a look at whether they fit together.

    It says what `freemerge merge` would do with the same options.
    """
    origin, tuned, recipe = read(base, models, options)
    from ..checkpoint.target import check_file, write_file
    from ..merging.commented import commented_recipe
    from ..merging.run import inspect
    from ..merging.unchanged import refuse_unchanged

    if out is not None:
        check_file(out, "a recipe", force=force, inputs=(origin, *tuned))
    inspection = inspect(origin, tuned, recipe)
    refuse_unchanged(recipe, inspection.decisions)
    words = [str(path) for path in (origin, *tuned)]
    head = [
        "A recipe of freemerge; docs/methods.md says more about the methods. To merge by it:",
        f"  freemerge merge {shlex.join(words)} --recipe {shlex.quote(str(out or 'recipe.yml'))} -o OUT",
        f"By it, {summary(inspection)}.",
    ]
    text = commented_recipe(recipe, [line for entry in head for line in printable(entry).splitlines()])
    if out is not None:
        check_file(out, "a recipe", force=force, inputs=(origin, *tuned))
        write_file(out, text)
    output.result(recipe.to_config(), text.rstrip("\n") if out is None else f"{out}: method {recipe.method.name}")
    warn(output, inspection)
    return DONE
