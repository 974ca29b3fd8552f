"""freemerge lora."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import counted
from .arguments import PATH, names
from .command import Argument, Command, Option
from .failures import DONE
from .output import Output

_LISTED = 5


def command() -> Command:
    """The command."""
    return Command(
        run,
        [
            Argument("base", type=PATH, help="the checkpoint that the adapter is for"),
            Argument("model", type=PATH, help="a merged or fine-tuned model of it"),
            Option(
                "--rank",
                type=int,
                required=True,
                metavar="R",
                help="rank of the adapter; of a layer, no more than its shorter side",
            ),
            Option("-o", "--out", type=PATH, required=True, help="new directory for the adapter"),
            Option("--force", is_flag=True, help="replace an adapter that freemerge wrote"),
            *names(),
        ],
        examples="""
            freemerge lora base merged --rank 16 -o adapter
            freemerge lora base merged --rank 32 -o adapter --select '*lm_head*=copy'
        """,
    )


def run(
    output: Output,
    base: Path,
    model: Path,
    rank: int,
    out: Path,
    force: bool,
    select: Sequence[Any],
    rename: Sequence[tuple[str, str]],
) -> int:
    """Write what a model has and its base lacks as a LoRA adapter in PEFT's format: the first R singular vectors of
    each linear layer."""
    from ..lora import extract_lora

    made = extract_lora(base, model, out, rank=rank, force=force, select=select, rename=rename)
    output.result(
        made, f"{out}: {counted(made.layers, 'layer')}, {made.kept:.2%} of the change, {made.nbytes / 1e6:.3g} MB"
    )
    if made.left_out:
        more = f" and {len(made.left_out) - _LISTED} more" if len(made.left_out) > _LISTED else ""
        output.note(f"left out, as no linear layers: {', '.join(made.left_out[:_LISTED])}{more}")
    return DONE
