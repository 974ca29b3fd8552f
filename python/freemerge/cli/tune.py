"""freemerge tune."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import counted
from .arguments import PATH, Named
from .command import Command, Option
from .failures import DONE
from .inspect import backend as backend_option
from .output import Output
from .recipes import inputs, read
from .user_function import file_of, user_function

_METHOD = "task_arithmetic"  # fr, the default elsewhere, is linear in its weights without renormalisation only


def command() -> Command:
    """The command."""
    section = "Learning"
    return Command(
        run,
        [
            *inputs(_METHOD),
            Option("-o", "--out", section="Output", type=PATH, required=True, metavar="FILE", help="the recipe"),
            Option("--force", section="Output", is_flag=True, help="replace an existing file"),
            Option(
                "--function",
                section=section,
                required=True,
                metavar="FILE.py:NAME",
                help="takes a state dict, yields logits of unlabelled batches",
            ),
            Option(
                "--by",
                section=section,
                type=Named(["task", "layer"]),
                default="task",
                help="one weight for each task, or for each task in each layer (default task)",
            ),
            Option("--iterations", section=section, type=int, default=100, metavar="N", help="of Adam (default 100)"),
            Option("--rate", section=section, type=float, default=0.01, metavar="R", help="of Adam (default 0.01)"),
            backend_option(),
        ],
        examples="""
            freemerge tune base math code --function data.py:logits -o recipe.yml
            freemerge merge base math code --recipe recipe.yml -o merged
        """,
    )


def run(
    output: Output,
    base: Path | None,
    models: Sequence[Path],
    out: Path,
    force: bool,
    function: str,
    by: Literal["task", "layer"],
    iterations: int,
    rate: float,
    backend: str,
    **options: Any,
) -> int:
    """Learn the weights of a linear method that make the merged model most certain on unlabelled data (AdaMerging).

    The recipe that is written merges with them; docs/methods.md has an example of a function.
    """
    origin, tuned, recipe = read(base, models, options, _METHOD)
    from ..checkpoint.target import check_file, write_file
    from ..tuning import tune

    def check() -> None:
        check_file(out, "a recipe", force=force, inputs=(origin, *tuned, file_of(function)))

    check()
    with user_function(function) as logits:
        check()  # that no module is replaced
        learnt = tune(origin, tuned, recipe, logits, by=by, iterations=iterations, rate=rate, backend=backend)
    check()
    write_file(out, learnt.recipe.to_yaml())
    result = {"recipe": learnt.recipe.to_config(), "entropies": learnt.entropies}
    weights = ", ".join(f"{weight:.4f}" for weight in learnt.recipe.weights)
    layers = f" and of {counted(len(learnt.recipe.layers), 'layer')}" if learnt.recipe.layers else ""
    first, last = learnt.entropies[0], learnt.entropies[-1]
    output.result(result, f"{out}: weights {weights}{layers}; entropy {first:.4f} -> {last:.4f}")
    return DONE
