"""Merging from the outside: state dicts or checkpoints in, a state dict or a published directory out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from ..arguments import byte_size, check_models, function
from ..backends.result_memory import reusing
from ..checkpoint import (
    DEFAULT_MEMORY,
    DEFAULT_SHARD_BYTES,
    Checkpoint,
    InputHashes,
    Source,
    open_inputs,
)
from ..checkpoint.architecture import require_config
from ..checkpoint.manifest import unknown_bytes
from ..checkpoint.side_files import TokenizerFrom, differences, tokenizer_source
from ..errors import ArgumentError, counted
from ..methods import Measured, Method
from ..workers import ALONE, Workers
from .collecting import without_collecting
from .engine import Merger
from .estimate import pace
from .fill import Target
from .inspection import Inspection
from .output import Output
from .progress import Progress, Style
from .recipe import Recipe, checked_recipe
from .selection import left_alone
from .stages import Stage
from .unchanged import refuse_unchanged
from .units import Unit


@dataclass(frozen=True)
class Report:
    """What a merge did, and where.

    ``weights``: the weight of each model; None where every tensor has its own, or the method has none. ``scale``: the
    global scale. ``stages``: where the time went.
    """

    out: Path
    weights: tuple[float, ...] | None
    scale: float
    inspection: Inspection
    stages: tuple[Stage, ...] = ()


def merge(
    base: Source,
    models: Sequence[Source],
    recipe: Recipe | None = None,
    *,
    method: str | Method | None = None,
    backend: str = "auto",
    into: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Merge fine-tuned models of one base in memory, by FR-Merging or the method that the recipe names.

    Args:
        base: state dict, module, path of a checkpoint, or the Hub id of one in the local cache.
        models: K >= 1 of the same, with the base's tensor names and shapes, or directories of LoRA or IA3 adapters
            that PEFT trained on the base. docs/inputs.md lists what else is converted, and what is refused.
        recipe: how to merge; the default is FR-Merging, ``theta_0 + scale * sum_i lambda_i filter(theta_i - theta_0)``,
            with settings that suit most models, see :class:`Recipe`.
        method: instead of a recipe, a method of :mod:`freemerge.methods`: its name, for its defaults, or the method.
        backend: "auto", or the name of the backend that must filter (see :func:`freemerge.backends`). With "cuda" each
            tensor is merged on the GPU wherever it is read from; otherwise it is merged where the base holds it.
        into: a module whose parameters and buffers, with the names and shapes of the merged model, receive the result
            in their own dtypes. It may be one of the inputs: it is written when all is done, and not after an error.

    Returns:
        A new state dict with the base's names, shapes and (unless ``recipe.out_dtype``) dtypes. Inputs are not
        modified and no returned tensor shares memory with them; names tied in the base are tied in the result, unless
        one of the models has a head of its own, which the result then has too. Tensors are on the base's device.

    Raises:
        ArgumentError, CheckpointError: a bad recipe, mismatched or non-finite inputs; the message names the tensor.
        BackendError: the backend asked for cannot run.
    """
    target = None if into is None else Target(into)
    with ExitStack() as stack:
        merger = open_merger(stack, base, models, checked_recipe(recipe, method), backend)
        restored = merged_in_memory(merger, merger.measure())
    if target is not None:
        target.fill(restored)
    return restored


def merged_in_memory(merger: Merger, measured: Measured) -> dict[str, Tensor]:
    """The merged model, named and shaped as the base was."""
    merged: dict[str, Tensor] = {}
    for unit in merger.units:
        merged |= merger.merged(unit, measured).tensors
    merged |= {name: merged[first] for name, first in merger.tied.items()}
    return merger.base.restored(merged)


def merge_checkpoints(
    base: Source,
    models: Sequence[Source],
    out: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    method: str | Method | None = None,
    backend: str = "auto",
    force: bool = False,
    max_shard_bytes: int | str = DEFAULT_SHARD_BYTES,
    memory: int | str = DEFAULT_MEMORY,
    resume: bool = False,
    progress: bool | Literal["json"] = True,
    tokenizer_from: TokenizerFrom = "base",
    on_start: Callable[[Inspection], None] = lambda inspection: None,
    workers: Workers = ALONE,
) -> Report:
    """Merge checkpoints into the directory (or ``.safetensors`` file) ``out``, holding a few tensors at a time.

    Names, shapes and dtypes are checked before anything is written, and ``out`` appears all at once when it is
    complete: an error (a non-finite value, a full disk) or an interruption leaves what was there before. Config,
    tokenizer and code files of the base directory are carried over; a model card and a manifest (``freemerge.json``)
    are written. The same inputs and recipe give the same bytes, whatever the number of threads; only the last bits of
    methods by singular vectors may depend on it.

    Args:
        base, models, recipe, method, backend: as for :func:`merge`.
        out: must not exist, unless ``force`` allows to replace an earlier output.
        max_shard_bytes: size above which the output is sharded, in bytes or as ``"2GB"``.
        memory: bytes (or as ``"2GB"``) of tensors that may wait to be written, beside those at work (one tensor may
            always), and as many that are fetched from the disk, into the system's cache, before they are needed
            (the next one always).
        resume: go on after the tensors that a killed run of the same merge finished; without one, begin.
        progress: show a progress bar on standard error, or with "json" a log of one JSON object a line.
        tokenizer_from: whose tokenizer, chat template, special tokens and generation settings the merged model gets:
            the base's, those of the model with that number (ArgumentError if its vocabulary is another), or with "auto"
            the models', if all have the same and it fits.
        on_start: called with what is going to happen, before anything is written.
        workers: processes that do it together (:func:`freemerge.workers.joined`), all of which call this function with
            the same arguments on a file system they share. Each writes some of the output's files; the bytes are the
            same for any number. What they leave unfinished stays, to be resumed.

    Raises:
        RefusedError: ``out`` exists and may not be replaced, is one of the inputs, or another run writes there.
        ArgumentError: the merged model would be the base: at a scale, weights or a density of 0, at a cutoff beyond the
            spectrum, or with every tensor copied. Otherwise as :func:`merge`.
        CheckpointError: ``out`` cannot be written, or the disk is full. Otherwise as :func:`merge`.
        WorkerError: another of the workers has ended, or they have parted: after an error in one of their merges they
            merge nothing more together.
    """
    with workers.together("merge"), reusing(), ExitStack() as stack:
        memory, style = byte_size("memory", memory), _style(progress)
        function("on_start", on_start)
        merger = open_merger(stack, base, models, checked_recipe(recipe, method), backend, memory)
        tokenizer, inspection = _inspected(merger, tokenizer_from)
        refuse_unchanged(merger.recipe, inspection.decisions)
        on_start(inspection)
        output = Output(
            merger,
            tokenizer,
            out,
            max_shard_bytes=max_shard_bytes,
            force=force,
            memory=memory,
            resume=resume,
            workers=workers,
        )
        stack.enter_context(output)  # before the work of a second run that writes there begins
        hashes = stack.enter_context(InputHashes((merger.base, *merger.models), workers))
        output.keep(stack)
        log = stack.enter_context(_begun(merger, output, inspection, style))
        measured = output.measured(partial(_advance, log, "measure"))
        output.carry_over()
        on_read = partial(_advance, log, "merge")
        for unit in merger.ahead(list(output.missing)):
            output.write(unit, merger.merged(unit, measured, on_read, output.writer.settle))
        output.finish()
        output.describe(hashes, measured, inspection.decisions)
        report = Report(output.writer.out, measured.weights or None, measured.scale, inspection, output.stages(hashes))
        for done in report.stages:
            log.event("stage", name=done.name, seconds=round(done.seconds, 3), bytes=done.nbytes)
    log.event("done", out=str(report.out))
    return report


def inspect(
    base: Source,
    models: Sequence[Source],
    recipe: Recipe | None = None,
    *,
    method: str | Method | None = None,
    backend: str = "auto",
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    max_shard_bytes: int | str = DEFAULT_SHARD_BYTES,
    memory: int | str = DEFAULT_MEMORY,
    tokenizer_from: TokenizerFrom = "base",
) -> Inspection:
    """Check the inputs of a merge and say what would happen to every tensor, without reading or writing data.

    Where the merged model would be the base, which :func:`merge` takes and :func:`merge_checkpoints` refuses, a
    warning says so.

    With ``out``, check also that :func:`merge_checkpoints` could write there, raising what that would raise, and say
    how long it would take, where a small merge in memory can be timed for it.

    Args:
        base, models, recipe, method, backend, out, force, max_shard_bytes, memory, tokenizer_from: as for
            :func:`merge_checkpoints`.

    Raises:
        ArgumentError, CheckpointError: a bad recipe, or inputs that do not match.
        RefusedError: with ``out``, as :func:`merge_checkpoints`.
        BackendError: the backend asked for cannot run.
    """
    with ExitStack() as stack:
        merger = open_merger(stack, base, models, checked_recipe(recipe, method), backend, byte_size("memory", memory))
        tokenizer, inspection = _inspected(merger, tokenizer_from)
        if out is None:
            try:
                refuse_unchanged(merger.recipe, inspection.decisions)
            except ArgumentError as error:
                return replace(inspection, warnings=(*inspection.warnings, str(error)))
            return inspection
        Output(merger, tokenizer, out, max_shard_bytes=max_shard_bytes, force=force)
        refuse_unchanged(merger.recipe, inspection.decisions)
        merged = inspection.read_bytes - inspection.measured_bytes
        found = pace(merger.recipe, len(merger.models), backend)
        if found is None:
            return inspection
        hashed = unknown_bytes((merger.base, *merger.models)) + inspection.write_bytes
        return replace(inspection, seconds=found.seconds(inspection.measured_bytes, merged, hashed))


def task_weights(
    base: Source,
    models: Sequence[Source],
    recipe: Recipe | None = None,
    *,
    method: str | Method | None = None,
    backend: str = "auto",
) -> tuple[float, ...] | None:
    """The weight lambda_i of each model, as it is found over the whole model; None where a tensor has its own, or none.

    For hosts that merge tensor by tensor: with these ``weights`` and the same recipe, :func:`merge_tensors` gives the
    tensors that :func:`merge` gives for whole models, bit for bit. Arguments and errors are those of :func:`merge`;
    tensors are read one at a time. ArgumentError, too, if the method needs more of the whole model than weights.
    """
    with ExitStack() as stack:
        merger = open_merger(stack, base, models, checked_recipe(recipe, method), backend)
        name = merger.recipe.method.name
        if merger.scale is None:
            raise ArgumentError(f"scale: method {name} finds it over the whole model; give it as a number")
        measured = merger.measure()
        if type(measured) is not Measured:
            raise ArgumentError(f"method {name} needs more of the whole model than weights; give it scope 'tensor'")
        return measured.weights or None


@without_collecting()
def open_merger(
    stack: ExitStack,
    base: Source,
    models: Sequence[Source],
    recipe: Recipe,
    backend: str = "auto",
    memory: int = DEFAULT_MEMORY,
    argument: str = "models",
    *,
    of_models: bool = True,
) -> Merger:
    """A merger of these inputs, which ``stack`` closes. Arguments and errors as of :func:`merge_checkpoints`.

    ``argument``: what messages call the models, if they are such.
    """
    check_models(models)
    if not models:
        raise ArgumentError("models must hold at least one fine-tuned model")
    weights = recipe.method.weights
    if isinstance(weights, tuple) and len(weights) != len(models):
        raise ArgumentError(f"weights has {counted(len(weights), 'number')} for {counted(len(models), 'model')}")
    inputs = open_inputs(
        stack,
        base,
        {f"{argument}[{i}]": model for i, model in enumerate(models)},
        merged=lambda names: not left_alone(names, recipe.select),
        renames=recipe.rename,
    )
    return Merger(inputs, recipe, backend, memory, of_models=of_models)


def _style(progress: object) -> Style:
    """How progress is shown."""
    if progress == "json":
        return "json"
    if not isinstance(progress, bool):
        raise ArgumentError(f"progress must be True, False or 'json', got {progress!r}")
    return "bar" if progress else "none"


@without_collecting()
def _inspected(merger: Merger, tokenizer_from: TokenizerFrom) -> tuple[Checkpoint, Inspection]:
    """Whose tokenizer is taken, and what will happen; what of the others is not taken over is among the notices."""
    require_config(merger.base.directory)
    tokenizer = tokenizer_source(merger.base, merger.models, tokenizer_from)
    return tokenizer, merger.inspect(differences(merger.base, merger.models, tokenizer))


def _begun(merger: Merger, output: Output, inspection: Inspection, style: Style) -> Progress:
    """The progress of a merge, which has told what it will do."""
    reads = output.reads()
    paced = None
    if style != "none" and merger.method.passes:
        paced = pace(merger.recipe, len(merger.models), merger.backend)
    ratio = paced.ratio if paced is not None else 1.0 if merger.kept is None else 0.0  # what is kept takes no time
    log = Progress(*reads, ratio=ratio, style=style)
    log.event("start", read_bytes=sum(reads), write_bytes=inspection.write_bytes)
    for warning in inspection.warnings:
        log.event("warning", text=warning)
    return log


def _advance(log: Progress, stage: str, unit: Unit, read_bytes: int) -> None:
    log.advance(stage, read_bytes, len(unit.names))
