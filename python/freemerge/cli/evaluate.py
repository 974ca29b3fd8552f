"""freemerge evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .arguments import PATH
from .command import Argument, Command, Option
from .failures import DONE
from .output import Output
from .user_function import user_function


def command() -> Command:
    """The command."""
    return Command(
        run,
        [
            Argument("models", type=PATH, nargs=-1, required=True, metavar="MODEL...", help="checkpoints to score"),
            Option(
                "--function",
                required=True,
                metavar="FILE.py:NAME",
                help="takes a state dict, returns a score or {task: score}",
            ),
            Option(
                "--experts",
                type=PATH,
                metavar="DIR",
                help="score each task of the first model with its expert from here, too",
            ),
            Option("--base", type=PATH, metavar="DIR", help="what experts that are masks or gains were made from"),
            Option("--backbone", type=PATH, metavar="DIR", help="the first model unrounded, for gains"),
        ],
        examples="""
            freemerge evaluate merged math code --function score.py:accuracy
            freemerge evaluate merged --function score.py:accuracy --experts experts --json
            freemerge evaluate merged --function score.py:accuracy --experts masks --base base
        """,
    )


def run(
    output: Output,
    models: Sequence[Path],
    function: str,
    experts: Path | None,
    base: Path | None,
    backbone: Path | None,
) -> int:
    """Score models with a Python function of your own; higher is better."""
    from ..checkpoint.locate import distinct_names
    from ..errors import ArgumentError
    from ..evaluation import evaluate, evaluate_experts, table

    if experts is None and (base or backbone):
        raise ArgumentError("--base and --backbone are for --experts")
    with user_function(function) as score:
        # Experts come first, as they may be refused, but are shown last.
        last = [] if experts is None else [evaluate_experts(models[0], experts, score, base=base, backbone=backbone)]
        scored = [evaluate(model, score) for model in models]
    labels = distinct_names([evaluation.label for evaluation in scored], models)
    evaluations = [replace(evaluation, label=label) for evaluation, label in zip(scored, labels, strict=True)]
    evaluations += [replace(evaluation, label=f"{labels[0]} with experts") for evaluation in last]
    output.result({"evaluations": evaluations}, table(evaluations))
    return DONE
