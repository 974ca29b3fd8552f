"""freemerge merge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import size
from ..workers import joined
from .arguments import PATH, Parsed, tokenizer_from
from .command import Command, Option
from .failures import DONE
from .inspect import backend, tell, text_of, warn
from .output import Output
from .recipes import inputs, read

if TYPE_CHECKING:
    from ..checkpoint.side_files import TokenizerFrom
    from ..merging.inspection import Inspection
    from ..merging.recipe import Recipe
    from ..merging.run import Report


def command() -> Command:
    """The command."""
    section = "Output"
    return Command(
        run,
        [
            *inputs(),
            Option(
                "-o", "--out", section=section, type=PATH, required=True, help="output directory or .safetensors file"
            ),
            Option("--dry-run", section=section, is_flag=True, help="check everything, print the plan, write nothing"),
            Option("--force", section=section, is_flag=True, help="replace an earlier output, with nothing else in it"),
            Option("--resume", section=section, is_flag=True, help="go on with the same merge where it was killed"),
            tokenizer_from(),
            Option(
                "--max-shard-size",
                section=section,
                type=Parsed(size),
                default="5GB",
                metavar="SIZE",
                help="for instance 2GB (default 5GB)",
            ),
            backend(),
            Option(
                "--memory",
                section="Machine",
                type=Parsed(size),
                default="128MB",
                metavar="SIZE",
                help="of tensors read ahead, and of those waiting to be written, beside those at work (default 128MB)",
            ),
            Option(
                "--log-json",
                section="Common options",
                is_flag=True,
                help="instead of a progress bar, print one JSON object a line on standard error",
            ),
        ],
        examples="""
            freemerge merge base math code -o merged
            freemerge merge base math code -o merged --cutoff 0.2 --scale 0.8 --dry-run
            freemerge merge base math code -o merged --method ties --density 0.3
            freemerge merge base math code -o merged --select '*.bias=copy' --out-dtype bfloat16
            freemerge merge base math code -o merged --recipe recipe.yml
            freemerge merge --mergekit config.yml -o merged
            torchrun --nproc-per-node 4 -m freemerge merge base math code -o merged --max-shard-size 2GB
        """,
    )


def run(
    output: Output,
    base: Path | None,
    models: Sequence[Path],
    out: Path,
    dry_run: bool,
    force: bool,
    resume: bool,
    tokenizer_from: TokenizerFrom,
    max_shard_size: int,
    backend: str,
    memory: int,
    log_json: bool,
    **options: Any,
) -> int:
    """Merge fine-tuned checkpoints of one BASE into one, which appears at once when all is done.

    Inputs are directories, .safetensors files, LoRA adapters or Hub ids in the local cache; they are checked first.
    """
    with joined() as workers:
        if workers.rank:  # the first one talks
            output, log_json = Output(quiet=True), False
        files = [file for file in (options["recipe"], options["mergekit"]) if file is not None]
        origin, tuned, recipe = read(base, models, options)
        from ..checkpoint.target import refuse_files
        from ..merging.run import inspect, merge_checkpoints

        refuse_files(out, files)
        common: dict[str, Any] = {
            "backend": backend,
            "force": force,
            "max_shard_bytes": max_shard_size,
            "memory": memory,
            "tokenizer_from": tokenizer_from,
        }
        if dry_run:
            tell(output, inspect(origin, tuned, recipe, out=out, **common))
            return DONE

        def start(inspection: Inspection) -> None:
            output.detail(text_of(inspection))
            if not log_json:
                warn(output, inspection)

        report = merge_checkpoints(
            origin,
            tuned,
            out,
            recipe,
            resume=resume,
            progress="json" if log_json else output.talks,
            on_start=start,
            workers=workers,
            **common,
        )
        output.result(report, _text_of(report, recipe))
        if not log_json:
            for stage in report.stages:
                output.note(f"  {stage}")
        return DONE


def _text_of(report: Report, recipe: Recipe) -> str:
    weights = "per tensor" if report.weights is None else ", ".join(f"{weight:.4f}" for weight in report.weights)
    found = f"weights {weights}; " if recipe.method.weights is not None else ""
    return f"{report.out}: {found}scale {report.scale:g}"
