"""freemerge demo."""

from __future__ import annotations

import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from .arguments import PATH
from .command import Command, Option
from .failures import DONE
from .output import Output


def command() -> Command:
    """The command."""
    return Command(
        run,
        [
            Option("--seed", type=int, default=0, metavar="N", help="of the training (default 0)"),
            Option("--keep", type=PATH, metavar="DIR", help="keep the checkpoints in this new or empty directory"),
        ],
        examples="""
            freemerge demo
            freemerge demo --seed 1 --keep digits
        """,
    )


def run(output: Output, seed: int, keep: Path | None) -> int:
    """Train, merge and compare six small models on scikit-learn's digits, in about a minute and without a download."""
    from ..demo import run_demo

    with redirect_stdout(StringIO()) as told, redirect_stderr(sys.stderr if output.talks else StringIO()):
        table = run_demo(seed=seed, keep=keep)
    output.result(table, told.getvalue().rstrip("\n"))
    return DONE
