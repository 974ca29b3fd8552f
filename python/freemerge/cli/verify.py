"""freemerge verify."""

from __future__ import annotations

from pathlib import Path

from ..errors import counted
from .arguments import PATH
from .command import Argument, Command
from .failures import DONE, FAILED
from .output import Output


def command() -> Command:
    """The command."""
    return Command(
        run,
        [Argument("directory", type=PATH, help="the directory of a merged model, with its freemerge.json")],
        examples="""
            freemerge verify merged
            freemerge verify merged --json
        """,
    )


def run(output: Output, directory: Path) -> int:
    """Hash the files of a merged directory again and compare them with its manifest. Exit status 1 if they differ."""
    from ..checkpoint import verify

    problems = verify(directory)
    told = counted(len(problems), "problem") if problems else "verified"
    output.result({"problems": problems}, "\n".join([*problems, told]))
    return FAILED if problems else DONE
