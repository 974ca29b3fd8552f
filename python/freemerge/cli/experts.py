"""freemerge experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from ..arguments import fraction
from ..errors import counted
from ..experts.names import Scope, Values
from ..experts.rescale import RULES
from ..workers import joined
from .arguments import PATH, Named, Parsed, base_and_models, names
from .command import Command, Option
from .failures import DONE
from .output import Output


def command() -> Command:
    """The command."""
    entries, low_rank = "Experts of entries", "Experts of low rank"
    return Command(
        run,
        [
            *base_and_models(),
            Option("-o", "--out", type=PATH, required=True, help="new directory for the expert files"),
            Option("--force", is_flag=True, help="replace a directory of expert files"),
            Option("--values", type=Named(get_args(Values)), help="default bf16; svd2 with --budget or --rank"),
            Option(
                "--backbone",
                type=PATH,
                metavar="MERGED",
                help="merged model, for low rank, masks, gains, some --rescale",
            ),
            Option("--density", section=entries, metavar="D", help="share of entries kept: 0.01 (default) or 1%"),
            Option(
                "--scope",
                section=entries,
                type=Named(get_args(Scope)),
                default="tensor",
                help="of what D is a share (default tensor)",
            ),
            Option(
                "--rescale",
                section=entries,
                type=Parsed(rescale, *RULES),
                default="auto",
                metavar="R",
                help=f"{', '.join(RULES)}, or mu itself (default auto)",
            ),
            Option(
                "--trim",
                section=entries,
                type=Parsed(fraction),
                default=0.0,
                metavar="T",
                help="share of the largest left out",
            ),
            Option(
                "--budget",
                section=low_rank,
                metavar="SHARE",
                help="what MERGED lacks, in files of this share of a model: 0.3%",
            ),
            Option("--rank", section=low_rank, type=int, metavar="R", help="or with R components of each matrix"),
            *names(),
        ],
        examples="""
            freemerge experts base math code -o experts --density 0.01
            freemerge experts base math code -o experts --values sign
            freemerge experts base math code -o experts --backbone merged --budget 0.3%
            freemerge experts base math code -o experts --backbone joint --values gains
        """,
    )


def run(output: Output, base: Path, models: Sequence[Path], out: Path, force: bool, **options: Any) -> int:
    """Extract a light expert of each model: its task vector's largest entries, or what a merged model lacks of it.

    Its file is called as the model's directory or file; where two have the same name, with that of what they are in:
    math-checkpoint-500.
    """
    from ..checkpoint.target import refuse_paths
    from ..experts import iter_experts, save_experts

    refuse_paths(out, (base, *models, options["backbone"]))
    with joined() as workers:
        experts = iter_experts(base, models, **options, workers=workers)
        saved = save_experts(experts, out, force=force, workers=workers)
    if workers.rank:  # the first one talks
        return DONE
    lines = [
        f"{expert.task}: {counted(expert.entries, 'entry', 'entries')}, mu {expert.mu:.4g}, "
        f"{expert.nbytes / 1e6:.3g} MB" + ("" if expert.entries else "; it leaves the merged model as it is")
        for expert in saved
    ]
    output.result({"experts": saved}, "\n".join(lines))
    return DONE


def rescale(text: str) -> str | float:
    """A rule for mu, or mu."""
    if text in RULES:
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"expected {', '.join(RULES)} or a number, got {text!r}") from None
