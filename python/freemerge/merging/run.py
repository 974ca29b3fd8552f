"""Merging from the outside: state dicts or checkpoints in, a state dict or a published directory out."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from .. import __version__
from ..arguments import byte_size, check_models, function
from ..backends.result_memory import reusing
from ..checkpoint import (
    DEFAULT_MEMORY,
    DEFAULT_SHARD_BYTES,
    Checkpoint,
    CheckpointWriter,
    InputHashes,
    Source,
    build_manifest,
    carry_over,
    open_inputs,
)
from ..checkpoint.architecture import require_config
from ..checkpoint.carry import carried
from ..checkpoint.locate import stem_of
from ..checkpoint.manifest import unknown_bytes
from ..checkpoint.model_card import model_card
from ..checkpoint.publish import refuse_inputs
from ..checkpoint.quantised import needless_quantisation
from ..checkpoint.side_files import TokenizerFrom, differences, tokenizer_source
from ..errors import ArgumentError, counted
from ..methods import Measured, Method
from ..workers import ALONE, Workers
from .engine import Merger, OnRead
from .estimate import pace
from .fill import Target
from .inspection import Decision, Inspection
from .kept import Kept
from .progress import Progress, Style
from .recipe import Recipe, checked_recipe, to_yaml
from .selection import left_alone
from .stages import Stage, together
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
        WorkerError: another of the workers has ended.
    """
    memory, style = byte_size("memory", memory), _style(progress)
    function("on_start", on_start)
    with reusing(), ExitStack() as stack:
        with _without_collecting():
            merger = open_merger(stack, base, models, checked_recipe(recipe, method), backend, memory)
            tokenizer = _side_files(merger, tokenizer_from)
            inspection = merger.inspect()
        refuse_unchanged(merger.recipe, inspection.decisions)
        on_start(inspection)
        with _without_collecting():
            writer = _writer(
                merger, out, max_shard_bytes=max_shard_bytes, force=force, memory=memory, resume=resume, workers=workers
            )
            _check_side_files(merger, writer, tokenizer)
            stack.enter_context(writer)  # before the work of a second run that writes there begins
            missing = {unit: names for unit in merger.steps if (names := set(merger.outputs(unit)) - writer.whole)}
        hashes = stack.enter_context(InputHashes((merger.base, *merger.models), workers))
        reads = (_reads_to_measure(merger, writer), merger.reads(missing)[1])
        if writer.measured is None and (room := merger.keepable_bytes) and (file := writer.scratch(room)) is not None:
            merger.kept = Kept(stack.enter_context(file))
        paced = pace(merger.recipe, len(merger.models), backend) if progress and merger.method.passes else None
        ratio = paced.ratio if paced is not None else 1.0 if merger.kept is None else 0.0  # what is kept takes no time
        log = stack.enter_context(Progress(*reads, ratio=ratio, style=style))
        log.event("start", read_bytes=sum(reads), write_bytes=inspection.write_bytes)
        for warning in inspection.warnings:
            log.event("warning", text=warning)

        def advance(stage: str, unit: Unit, read_bytes: int) -> None:
            log.advance(stage, read_bytes, len(unit.names))

        measured = _measured(merger, writer, partial(advance, "measure"))
        workers.first(lambda: _carry_over(merger, writer, tokenizer))
        for unit in merger.ahead(sorted(missing, key=lambda unit: writer.place(unit.names[0]))):
            merged = merger.merged(unit, measured, partial(advance, "merge"), writer.settle)
            if merged.flat is not None:
                writer.write_flat(unit.names, merged.flat)
            for name in merged.tensors:
                if name in missing[unit]:
                    writer.write(name, merged.tensors[name], merged.notes.get(name))
            del merged  # its memory is used again when it is written
        if merger.kept is not None:
            merger.kept.close()  # before the first worker looks at what is in the directory
        writer.finish()
        report = Report(writer.out, measured.weights or None, measured.scale, inspection)
        with _without_collecting():
            _describe(merger, writer, hashes, report)
        stages = workers.gather(list(_stages(merger, writer, hashes)))
        report = replace(report, stages=tuple(map(together, zip(*stages, strict=True))))
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
        tokenizer = _side_files(merger, tokenizer_from)
        if out is not None:
            writer = _writer(merger, out, max_shard_bytes=max_shard_bytes, force=force)
            _check_side_files(merger, writer, tokenizer)
        inspection = merger.inspect()
        if out is None:
            return inspection
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


def open_merger(
    stack: ExitStack,
    base: Source,
    models: Sequence[Source],
    recipe: Recipe,
    backend: str = "auto",
    memory: int = DEFAULT_MEMORY,
    argument: str = "models",
) -> Merger:
    """A merger of these inputs, which ``stack`` closes. Arguments and errors as of :func:`merge_checkpoints`.

    ``argument``: what messages call the models.
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
    merger = Merger(inputs.base, inputs.models, recipe, backend, memory)
    merger.inputs = inputs
    return merger


def _style(progress: object) -> Style:
    """How progress is shown."""
    if progress == "json":
        return "json"
    if not isinstance(progress, bool):
        raise ArgumentError(f"progress must be True, False or 'json', got {progress!r}")
    return "bar" if progress else "none"


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Python does not look for garbage in the block, which makes only what stays: for many tensors, a great deal."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _side_files(merger: Merger, tokenizer_from: TokenizerFrom) -> Checkpoint:
    """Whose tokenizer is taken; what of the others is not taken over becomes notices."""
    require_config(merger.base.directory)
    tokenizer = tokenizer_source(merger.base, merger.models, tokenizer_from)
    merger.notices += [*merger.inputs.notices, *differences(merger.base, merger.models, tokenizer)]
    return tokenizer


def _writer(
    merger: Merger,
    out: str | os.PathLike[str],
    *,
    max_shard_bytes: int | str,
    force: bool,
    memory: int = DEFAULT_MEMORY,
    resume: bool = False,
    workers: Workers = ALONE,
) -> CheckpointWriter:
    """The writer of the output, which is refused where writing it would replace or delete an input."""
    refuse_inputs(out, (merger.base, *merger.models))
    specs = [merger.out_spec(name) for name in merger.written]
    return CheckpointWriter(
        out,
        specs,
        max_shard_bytes=byte_size("max_shard_bytes", max_shard_bytes),
        memory=memory,
        metadata=merger.base.metadata,
        identity=_identity(merger),
        resume=resume,
        force=force,
        stem=stem_of(merger.base.directory, merger.base.files),
        workers=workers,
    )


def _identity(merger: Merger) -> dict[str, object] | None:
    """What a killed merge must have in common with this one to be resumed; None for inputs that are not files."""
    sources = (merger.base, *merger.models)
    if not all(source.files for source in sources):
        return None
    files = {source: {*source.files} for source in sources}
    for source, own in files.items():
        if source.directory is not None:
            own |= {file for file in source.directory.glob("*.json") if file.is_file()}
    return {
        "inputs": [
            [source.name, *([str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files[source]))]
            for source in sources
        ],
        "recipe": merger.recipe.to_record(),
        "versions": [__version__, torch.__version__],
        "backend": merger.backend,
    }


def _measured(merger: Merger, writer: CheckpointWriter, advance: OnRead) -> Measured:
    """What the method finds out, or found out before the merge was killed."""
    if writer.measured is not None:
        return Measured(tuple(writer.measured["weights"]), writer.measured["scale"])
    measured = merger.measure(advance, writer.workers, lambda unit: writer.worker(unit.names[0]))
    if type(measured) is Measured:  # what else methods measure takes no note
        writer.measure({"weights": measured.weights, "scale": measured.scale})
    return measured


def _reads_to_measure(merger: Merger, writer: CheckpointWriter) -> int:
    """Bytes that this worker reads to measure; none if a killed run has done so."""
    if writer.measured is not None:
        return 0
    return merger.reads(unit for unit in merger.steps if writer.worker(unit.names[0]) == writer.workers.rank)[0]


def _carry_over(merger: Merger, writer: CheckpointWriter, tokenizer: Checkpoint) -> None:
    """Config, tokenizer and code files of the base."""
    if writer.directory is not None and merger.base.directory is not None:
        out_dtype = getattr(torch, merger.recipe.out_dtype) if merger.recipe.out_dtype is not None else None
        carry_over(
            merger.base.directory,
            writer.directory,
            out_dtype=out_dtype,
            untied=bool(merger.inputs.untied),
            dequantised=merger.base.dequantised,
            in_floats=needless_quantisation(merger.base) is not None,
            tokenizer=None if tokenizer is merger.base else tokenizer,
        )


def _check_side_files(merger: Merger, writer: CheckpointWriter, tokenizer: Checkpoint) -> None:
    """CheckpointError for one that cannot be carried over, before the work begins."""
    if not writer.single_file and merger.base.directory is not None:
        carried(merger.base.directory, None if tokenizer is merger.base else tokenizer)


def _describe(
    merger: Merger,
    writer: CheckpointWriter,
    hashes: InputHashes,
    report: Report,
) -> None:
    """The model card and the manifest."""
    if writer.directory is None:
        return
    inputs = hashes.records()
    if writer.workers.rank:
        return
    recipe = merger.recipe
    card = model_card(
        base=merger.base,
        models=merger.models,
        files=[shard.file for shard in writer.shards],
        recipe=to_yaml(recipe.to_record()),
        method=recipe.method.title,
        paper=recipe.method.paper,
    )
    (writer.directory / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
    decisions = report.inspection.decisions
    writer.manifest = build_manifest(
        recipe={**recipe.to_record(), "measured": {"weights": report.weights, "scale": report.scale}},
        inputs=inputs,
        tensors={decision.name: _record(decision, writer.notes.get(decision.name, {})) for decision in decisions},
        backend=", ".join(sorted({decision.backend for decision in decisions if decision.backend})),
    )


def _stages(merger: Merger, writer: CheckpointWriter, hashes: InputHashes) -> Iterator[Stage]:
    """What was done on the thread that merges, and beside it."""
    yield from merger.stopwatch.stages()
    seconds = writer.seconds
    yield Stage("write", seconds["write"], writer.nbytes)
    yield Stage("hash", seconds["hash"] + hashes.seconds, writer.nbytes + hashes.nbytes)
    yield Stage("flush", seconds["flush"], writer.nbytes)
    yield Stage("wait", seconds["wait"], 0)


def _record(decision: Decision, notes: Mapping[str, object]) -> dict[str, object]:
    """What the manifest says about one tensor."""
    record: dict[str, object] = {"action": decision.action}
    if decision.backend is not None:
        record |= {"removed": decision.removed, "backend": decision.backend, "form": decision.form}
    return record | dict(notes)
