"""What a merge of checkpoints writes: the merged tensors, what is carried over, the model card and the manifest."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType

import torch

from .. import __version__
from ..arguments import byte_size
from ..checkpoint import (
    DEFAULT_MEMORY,
    Checkpoint,
    CheckpointWriter,
    InputHashes,
    build_manifest,
    carry_over,
)
from ..checkpoint.architecture import version_of_transformers
from ..checkpoint.carry import carried
from ..checkpoint.locate import stem_of
from ..checkpoint.model_card import model_card
from ..checkpoint.quantised import needless_quantisation
from ..checkpoint.target import refuse_inputs
from ..lazy import cached_property
from ..methods import Measured
from ..workers import ALONE, Workers
from .collecting import without_collecting
from .engine import MergedUnit, Merger, OnRead
from .inspection import Decision
from .recipe import to_yaml
from .stages import Stage, together
from .units import Unit


class Output:
    """Where a merge writes, which is claimed in a ``with`` block, and what of it a killed run has done.

    ``tokenizer``: the one of the inputs whose tokenizer is carried over. The other arguments, and the errors, are those
    of :func:`merge_checkpoints`.
    """

    @without_collecting()
    def __init__(
        self,
        merger: Merger,
        tokenizer: Checkpoint,
        out: str | os.PathLike[str],
        *,
        max_shard_bytes: int | str,
        force: bool,
        memory: int = DEFAULT_MEMORY,
        resume: bool = False,
        workers: Workers = ALONE,
    ) -> None:
        self._merger = merger
        self._tokenizer = None if tokenizer is merger.base else tokenizer
        refuse_inputs(out, (merger.base, *merger.models))
        self.writer = CheckpointWriter(
            out,
            [merger.out_spec(name) for name in merger.written],
            max_shard_bytes=byte_size("max_shard_bytes", max_shard_bytes),
            memory=memory,
            metadata=merger.base.metadata,
            identity=_identity(merger),
            resume=resume,
            force=force,
            stem=stem_of(merger.base.directory, merger.base.files),
            workers=workers,
        )
        if not self.writer.single_file and merger.base.directory is not None:
            carried(merger.base.directory, self._tokenizer)  # what cannot be is an error before the work begins

    def __enter__(self) -> Output:
        self.writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.writer.__exit__(kind, error, traceback)

    @cached_property
    def missing(self) -> dict[Unit, set[str]]:
        """The units that this worker has yet to merge, in the order in which they are written, and what of them."""
        merger, place = self._merger, self.writer.place
        with without_collecting():
            missing = {unit: names for unit in merger.steps if (names := set(merger.outputs(unit)) - self.writer.whole)}
            return {unit: missing[unit] for unit in sorted(missing, key=lambda unit: place(unit.names[0]))}

    def reads(self) -> tuple[int, int]:
        """Bytes that this worker reads to measure and to merge; none to measure if a killed run has done so."""
        merger, writer = self._merger, self.writer
        measured = 0
        if writer.measured is None:
            own = (unit for unit in merger.steps if writer.worker(unit.names[0]) == writer.workers.rank)
            measured = merger.bytes.reads(own)[0]
        return measured, merger.bytes.reads(self.missing)[1]

    def keep(self, stack: ExitStack) -> None:
        """Let the merger keep what it merges to find the scale, where there is room; ``stack`` closes the file."""
        if self.writer.measured is None and (room := self._merger.bytes.keepable(self._merger.steps)):
            file = self.writer.scratch(room)
            if file is not None:
                self._merger.keep_in(stack.enter_context(file))

    def measured(self, advance: OnRead) -> Measured:
        """What the method finds out, or found out before the merge was killed."""
        writer = self.writer
        if writer.measured is not None:
            return Measured(tuple(writer.measured["weights"]), writer.measured["scale"])
        measured = self._merger.measure(advance, writer.workers, lambda unit: writer.worker(unit.names[0]))
        if type(measured) is Measured:  # what else methods measure takes no note
            writer.measure({"weights": measured.weights, "scale": measured.scale})
        return measured

    def write(self, unit: Unit, merged: MergedUnit) -> None:
        """Write what is missing of a unit."""
        if merged.flat is not None:
            self.writer.write_flat(unit.names, merged.flat)
        for name in merged.tensors:
            if name in self.missing[unit]:
                self.writer.write(name, merged.tensors[name], merged.notes.get(name))

    def finish(self) -> None:
        """Wait until everything is written."""
        if self._merger.kept is not None:
            self._merger.kept.close()  # before the first worker looks at what is in the directory
        self.writer.finish()

    def carry_over(self) -> None:
        """Config, tokenizer and code files of the base, by the first worker."""
        with self.writer.writing():
            self.writer.workers.first(self._carry_over)

    def _carry_over(self) -> None:
        merger, directory = self._merger, self.writer.directory
        if directory is not None and merger.base.directory is not None:
            out_dtype = getattr(torch, merger.recipe.out_dtype) if merger.recipe.out_dtype is not None else None
            carry_over(
                merger.base.directory,
                directory,
                out_dtype=out_dtype,
                untied=bool(merger.inputs.untied),
                dequantised=merger.base.dequantised,
                in_floats=needless_quantisation(merger.base) is not None,
                tokenizer=self._tokenizer,
            )

    @without_collecting()
    def describe(self, hashes: InputHashes, measured: Measured, decisions: Sequence[Decision]) -> None:
        """The model card and the manifest."""
        merger, writer = self._merger, self.writer
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
        with writer.writing():
            (writer.directory / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
        found = {"weights": measured.weights or None, "scale": measured.scale}
        writer.manifest = build_manifest(
            recipe={**recipe.to_record(), "measured": found},
            inputs=inputs,
            tensors={decision.name: _record(decision, writer.notes.get(decision.name, {})) for decision in decisions},
            backend=", ".join(sorted({decision.backend for decision in decisions if decision.backend})),
        )

    def stages(self, hashes: InputHashes) -> tuple[Stage, ...]:
        """What was done on the threads that merge, and beside them, of all workers."""
        gathered = self.writer.workers.gather(list(self._own_stages(hashes)))
        return tuple(map(together, zip(*gathered, strict=True)))

    def _own_stages(self, hashes: InputHashes) -> Iterator[Stage]:
        writer = self.writer
        yield from self._merger.stopwatch.stages()
        seconds = writer.seconds
        yield Stage("write", seconds["write"], writer.nbytes)
        yield Stage("hash", seconds["hash"] + hashes.seconds, writer.nbytes + hashes.nbytes)
        yield Stage("flush", seconds["flush"], writer.nbytes)
        yield Stage("wait", seconds["wait"], 0)


def _identity(merger: Merger) -> dict[str, object] | None:
    """What a killed merge must have in common with this one to be resumed; None for inputs that are not files."""
    sources = (merger.base, *merger.models)
    if not all(source.files for source in sources):
        return None
    return {
        "inputs": [
            [source.name, *([str(file), *opened[:2]] for file, opened in sorted(source.identities.items()))]
            for source in sources
        ],
        "recipe": merger.recipe.to_record(),
        "versions": [__version__, torch.__version__, version_of_transformers()],
        "backend": merger.backend,
    }


def _record(decision: Decision, notes: Mapping[str, object]) -> dict[str, object]:
    """What the manifest says about one tensor."""
    record: dict[str, object] = {"action": decision.action}
    if decision.backend is not None:
        record |= {"removed": decision.removed, "backend": decision.backend, "form": decision.form}
    return record | dict(notes)
