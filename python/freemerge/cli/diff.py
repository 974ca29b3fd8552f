"""freemerge diff."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import counted
from .arguments import PATH
from .command import Argument, Command
from .failures import DONE, FAILED
from .output import Output

if TYPE_CHECKING:
    from ..checkpoint import Difference


def command() -> Command:
    """The command."""
    return Command(
        run,
        [
            Argument("first", type=PATH, metavar="A", help="a checkpoint"),
            Argument("second", type=PATH, metavar="B", help="another one"),
        ],
        examples="""
            freemerge diff merged other
            freemerge diff merged.safetensors org/model --json
        """,
    )


def run(output: Output, first: Path, second: Path) -> int:
    """Compare two checkpoints of any kind tensor by tensor. Exit status 1 if they differ; JSON is one object a line."""
    from ..checkpoint import diff

    found = 0
    for difference in diff(first, second):
        found += 1
        output.result(difference, _text_of(difference))
    if output.talks:
        print(counted(found, "tensor differs", "tensors differ") if found else "the same")
    return FAILED if found else DONE


def _text_of(difference: Difference) -> str:
    told = difference.kind
    if difference.first != difference.second:
        told += ": " + " and ".join(filter(None, (difference.first, difference.second)))
    if difference.largest is not None and difference.mean is not None:
        told += f", at most {difference.largest:.3g}, mean {difference.mean:.3g}"
    return f"{difference.name}  {told}"
