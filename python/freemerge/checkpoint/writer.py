"""Writing checkpoints: tensor by tensor, straight into place, published all at once."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch

from ..dense import bytes_of
from ..errors import ArgumentError, CheckpointError, RefusedError
from ..workers import ALONE, Workers
from .hashing import Hasher
from .journal import JOURNAL, Journal, is_journal, remove_journals
from .json_file import write_json
from .leftovers import allocated
from .locate import INDEX, MODEL, SAFETENSORS
from .manifest import other_than_merged
from .safetensors_file import MAX_HEADER_BYTES, Slot, build_header
from .shard_file import Background, ShardFile
from .spec import TensorSpec
from .staging import Staging, hidden
from .target import DISK_FULL, MANIFEST, cannot_write, check_target, target

_FILE = ".safetensors"  # how the name of a single-file output ends
DEFAULT_SHARD_BYTES = 5_000_000_000
DEFAULT_MEMORY = 128_000_000


@dataclass(frozen=True)
class Shard:
    """One output file, laid out before anything is written."""

    file: str
    header: bytes
    slots: Mapping[str, Slot]
    nbytes: int


def plan_shards(
    specs: Iterable[TensorSpec], max_shard_bytes: int, metadata: Mapping[str, str], stem: str = MODEL
) -> list[Shard]:
    """Distribute tensors over files as transformers does: in the given order, a new file when one would grow beyond
    ``max_shard_bytes`` of tensor data; a larger tensor gets a file of its own."""
    if max_shard_bytes < 1:
        raise ArgumentError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    groups: list[list[TensorSpec]] = [[]]
    seen: set[str] = set()
    room = max_shard_bytes
    for spec in specs:
        if spec.name in seen or spec.name == "__metadata__":
            raise ArgumentError(
                f"specs: {spec.name!r} {'appears twice' if spec.name in seen else 'is a reserved name'}"
            )
        seen.add(spec.name)
        if groups[-1] and spec.nbytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(spec)
        room -= spec.nbytes
    shards = []
    for number, group in enumerate(groups, start=1):
        file = f"{stem}.safetensors" if len(groups) == 1 else f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        header, slots, nbytes = build_header(group, metadata)
        if len(header) - 8 > MAX_HEADER_BYTES:
            raise ArgumentError(f"{file} would need a header of {len(header)} bytes; use a smaller max_shard_bytes")
        shards.append(Shard(file, header, slots, nbytes))
    return shards


class CheckpointWriter:
    """Writes a model directory, or one ``.safetensors`` file if ``out`` ends so.

    The layout of every file is known before the first byte, so a tensor is written at its place and no shard is held
    in memory. Writing, hashing and flushing happen in the background. Everything goes to a hidden directory beside
    ``out``; leaving the ``with`` block normally publishes it, an exception removes it. The bytes depend on specs,
    tensors and metadata only, not on the order of writes.

    Args:
        out: where the model goes. Symbolic links are followed.
        specs: all tensors, in the order in which they fill the shards.
        max_shard_bytes: tensor data per file.
        memory: bytes of tensors that may wait to be written; one tensor may always.
        metadata: strings for the safetensors headers, beside ``format: pt`` which transformers asks for.
        identity: what says whether a killed writer made the same from the same; it may be resumed then.
        resume: go on after the tensors that a killed writer of ``out`` finished, if there was one.
        stem: how the names of the weight files begin; that of transformers, or diffusers' ``diffusion_pytorch_model``.
        force: replace an earlier output at ``out`` (see :func:`freemerge.checkpoint.target.check_target`).
        workers: who write it together, each some of the files; all of them make such a writer with the same arguments
            and go through the ``with`` block. What they leave unfinished stays, to be resumed.

    Attributes:
        directory: the hidden directory, for files that belong to the model (config, tokenizer, model card); None
            outside the ``with`` block and for a single-file output.
        notes: for each tensor what was said when it was written, also to the killed writer; once it is finished, also
            to other workers.
        whole: names of the tensors that need not be written, because the killed writer did, or another worker does.
        measured: what the killed writer was told by :meth:`measure`; None if nothing.
        manifest: becomes ``freemerge.json`` of a model directory, with the hash of every file added under ``files``.
        nbytes: size of the weight files that this worker writes.

    Raises, before anything is written: RefusedError if ``out`` holds something, ArgumentError for impossible specs
    and for an ``out`` with the name of another kind of weight file, CheckpointError if the target cannot be written or
    the disk has too little room. What the system refuses later, as where the disk fills up, is a CheckpointError too,
    with the old output untouched.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        specs: Iterable[TensorSpec],
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        memory: int = DEFAULT_MEMORY,
        metadata: Mapping[str, str] | None = None,
        identity: Mapping[str, object] | None = None,
        resume: bool = False,
        force: bool = False,
        stem: str = MODEL,
        workers: Workers = ALONE,
    ) -> None:
        if resume and identity is None:
            raise ArgumentError("resume: only what is made from files can be resumed")
        self.identity, self.resume, self.workers = identity, resume, workers
        self.out = target(out, file=_FILE)
        self.single_file = self.out.suffix == _FILE
        self.force = force
        specs = list(specs)
        limit = max(1, sum(spec.nbytes for spec in specs)) if self.single_file else max_shard_bytes
        self._stem = MODEL if self.single_file else stem
        self.shards = plan_shards(specs, limit, {"format": "pt", **(metadata or {})}, self._stem)
        ranks = workers.shares({shard.file: shard.nbytes for shard in self.shards})
        self._own = [shard for shard in self.shards if ranks[shard.file] == workers.rank]
        self.nbytes = sum(shard.nbytes for shard in self._own)
        check_target(self.out, single_file=self.single_file, force=force, foreign=other_than_merged)
        workers.first(lambda: _check_room(self.out, sum(shard.nbytes for shard in self.shards)))
        self.manifest: dict[str, object] = {}
        self._shard_of = {name: shard for shard in self.shards for name in shard.slots}
        self._ranks = ranks
        self._pending = {name for shard in self._own for name in shard.slots}
        self._lock = threading.Lock()
        self._memory = memory
        self._files: dict[str, ShardFile] = {}
        self._hashes: dict[str, str] = {}
        self._journal: Journal | None = None
        self.notes: dict[str, Mapping[str, object]] = {}
        self.whole = self._shard_of.keys() - self._pending
        self.measured: dict[str, Any] | None = None

    @property
    def directory(self) -> Path | None:
        return None if self.single_file else self._staging.directory

    def __enter__(self) -> CheckpointWriter:
        self._background = Background(self._memory)
        self._staging = Staging(self.out, resume=self.resume, workers=self.workers)
        try:
            earlier = self._open_journal() if self.identity is not None else {}
            for shard in self._own:
                file = self._file(shard, earlier.get(shard.file, {}))
                self._files[shard.file] = file
                self.whole |= {n for n, slot in shard.slots.items() if slot.end <= file.whole}
            self._pending -= self.whole
        except RefusedError:
            self._background.close()
            self._staging.end(keep=True)
            raise
        except BaseException as error:
            self._abort()
            if isinstance(error, OSError):
                raise cannot_write(self.out, error) from error
            raise
        return self

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What the system refuses in the block, where only the output is written, is a CheckpointError."""
        try:
            yield
        except OSError as error:
            raise cannot_write(self.out, error) from error

    def _open_journal(self) -> dict[str, dict[int, str]]:
        """Begin the journal; for each file what a killed writer said about its beginnings."""
        assert self.identity is not None
        layout = hashlib.sha256(b"".join(shard.header for shard in self.shards)).hexdigest()
        identity = {**self.identity, "layout": layout}
        first_identity, entries = self.workers.first(lambda: (identity, self._first_journal(identity)))
        if self.workers.rank:
            changed = [key for key in identity if identity[key] != first_identity[key]]
            if changed:
                raise CheckpointError(
                    f"worker {self.workers.rank} has other {' and '.join(changed)} than the first one"
                )
            self._journal = Journal.of_worker(self._staging.directory, self.workers.rank)
        earlier: dict[str, dict[int, str]] = {}
        for entry in entries:
            self.measured = entry.get("measured", self.measured)
            if "file" in entry:
                earlier.setdefault(entry["file"], {})[entry["to"]] = entry["sha256"]
                self.notes |= entry["notes"]
        return earlier

    def _first_journal(self, identity: Mapping[str, object]) -> list[dict[str, Any]]:
        """What is known from a killed run, of which nothing else stays but weight files."""
        left = list(self._staging.directory.iterdir())
        if left and not any(is_journal(path.name) or path.name == MANIFEST for path in left):
            raise RefusedError(
                f"{self._staging.directory} has no journal to go on with; run without resume to start anew"
            )
        journal = Journal.begin(self._staging.directory, identity, resumed=self._staging.resumed)
        self._journal = journal
        kept = {JOURNAL, *(shard.file for shard in self.shards)}
        for path in left:
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        return journal.earlier

    def _file(self, shard: Shard, earlier: Mapping[int, str]) -> ShardFile:
        ends = deque(sorted((slot.end, name) for name, slot in shard.slots.items()))

        def hashed(to: int, sha256: str) -> None:
            notes: dict[str, Mapping[str, object]] = {}
            while ends and ends[0][0] <= to:
                name = ends.popleft()[1]
                if name in self.notes:
                    notes[name] = self.notes[name]
            if self._journal is not None:
                self._journal.add({"file": shard.file, "to": to, "sha256": sha256, "notes": notes})

        path = self._staging.directory / shard.file
        return ShardFile(path, shard.header, shard.nbytes, self._background, hashed, earlier)

    def measure(self, measured: Mapping[str, object]) -> None:
        """Note down what a resumed run need not find out again."""
        if self._journal is not None and measured != self.measured:
            with self.writing():
                self._journal.add({"measured": dict(measured)})

    def write(self, name: str, tensor: torch.Tensor, note: Mapping[str, object] | None = None) -> None:
        """Write one tensor, exactly as its spec says, once. Any order, any device, from any thread. ``note``: kept in
        :attr:`notes`.

        The tensor must not change until the block is left. It is fastest in the order of :meth:`place`.
        """
        slot = self._slot(name)
        if tuple(tensor.shape) != slot.spec.shape or tensor.dtype != slot.spec.dtype:
            raise ArgumentError(
                f"{name} must be {slot.spec.dtype} {slot.spec.shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        raw = bytes_of(tensor)
        with self._lock:
            self._write(name, slot, raw, note)

    def write_flat(self, names: Sequence[str], flat: torch.Tensor) -> None:
        """Write tensors that lie end to end in a vector of their dtype, except those that are :attr:`whole`.

        For many small tensors: a torch tensor of each would take longer than all else.
        """
        slots = [self._slot(name) for name in names]
        if flat.dim() != 1 or any(slot.spec.dtype != flat.dtype for slot in slots):
            raise ArgumentError(f"{names[0]} to {names[-1]} must be a vector of their dtype, got {flat.dtype}")
        raw, end = bytes_of(flat), 0
        if len(raw) != sum(slot.end - slot.offset for slot in slots):
            raise ArgumentError(f"{names[0]} to {names[-1]} do not have {flat.numel()} entries together")
        with self._lock:
            for name, slot in zip(names, slots, strict=True):
                begin, end = end, end + slot.end - slot.offset
                if name not in self.whole:
                    self._write(name, slot, raw[begin:end])

    def _slot(self, name: str) -> Slot:
        shard = self._shard_of.get(name)
        if shard is None:
            raise ArgumentError(f"{name} is not among the specs of this checkpoint")
        return shard.slots[name]

    def _write(self, name: str, slot: Slot, raw: memoryview, note: Mapping[str, object] | None = None) -> None:
        if name not in self._pending:
            raise ArgumentError(f"{name} was already written")
        self._pending.discard(name)
        if note:
            self.notes[name] = note  # before the thread that hashes tells the journal of it
        try:
            self._files[self._shard_of[name].file].write(slot.offset, raw)
        except OSError as error:
            raise cannot_write(self.out, error) from error

    def settle(self) -> None:
        """Wait until the tensors that wait to be written are no more than ``memory``, for memory to write the next."""
        try:
            self._background.settle()
        except OSError as error:
            raise cannot_write(self.out, error) from error

    @property
    def seconds(self) -> dict[str, float]:
        """How long the stages in the background have worked, and how long they were waited for."""
        return {**self._background.seconds, "wait": self._background.waited}

    def scratch(self, nbytes: int) -> RawIOBase | None:
        """A file without a name, on the disk of the output, for ``nbytes``; None where that has no room for both."""
        wanted = nbytes + sum(shard.nbytes for shard in self.shards)
        try:
            if shutil.disk_usage(self._staging.directory).free < wanted:
                return None
            return cast(RawIOBase, tempfile.TemporaryFile(dir=self._staging.directory, buffering=0))
        except OSError:
            return None

    def finish(self) -> None:
        """Wait until everything is written, hashed and on the disk, by all workers."""
        if self._hashes:
            return
        if self._pending:
            missing = sorted(self._pending)
            raise ArgumentError(f"{len(missing)} tensors were never written: {', '.join(missing[:10])}")
        with self.writing():
            for file in self._files.values():
                file.hand_over()
            own = {name: self._background.result(file.sha256) for name, file in self._files.items()}
        if self._journal is not None:
            self._journal.close()  # before the first worker moves its directory: Windows moves none with an open file
        for hashes, notes in self.workers.gather((own, self.notes)):
            self._hashes |= hashes
            self.notes |= notes

    def worker(self, name: str) -> int:
        """Which of the workers writes a tensor."""
        return self._ranks[self._shard_of[name].file]

    def place(self, name: str) -> tuple[str, int]:
        """Where a tensor is written: file and offset."""
        shard = self._shard_of[name]
        return shard.file, shard.slots[name].offset

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        kept: Path | None = None
        try:
            if kind is None:
                self._finish()
        except RefusedError as refused:  # what has come into the way can go
            kept = self._abort(keep=True)
            if kept is None or self.workers.size > 1:  # which say it themselves
                raise
            advice = f"what is finished stays in {kept}; the same command with --resume goes on with it"
            raise RefusedError(f"{refused}; {advice}") from refused
        finally:
            if kept is None:
                self._abort()
        if isinstance(error, OSError) and self._is_ours(error):  # what is not a tensor, as a config that is copied
            raise cannot_write(self.out, error) from error

    def _is_ours(self, error: OSError) -> bool:
        """Whether what the system refused was to write the output."""
        file = error.filename
        inside = isinstance(file, str | os.PathLike) and self._staging.directory in Path(file).parents
        return inside or error.errno in (*DISK_FULL, errno.EROFS)

    def _finish(self) -> None:
        self.finish()
        directory = self._staging.directory
        with self.writing():
            self.workers.first(self._complete)
            # Until then a run that is killed, or fails where others share the work, can be resumed.
            self._staging.publish(
                SAFETENSORS if self.single_file else None,
                force=self.force,
                foreign=other_than_merged,
                ready=lambda: remove_journals(directory),
            )

    def _complete(self) -> None:
        if not self.single_file:
            self._write_index_and_manifest(self._staging.directory, self._hashes)

    def _write_index_and_manifest(self, directory: Path, hashes: Mapping[str, str]) -> None:
        if len(self.shards) > 1:
            total = sum(slot.spec.nbytes for shard in self.shards for slot in shard.slots.values())
            weight_map = {name: shard.file for name, shard in sorted(self._shard_of.items())}
            write_json(
                directory / f"{self._stem}.safetensors{INDEX}",
                {"metadata": {"total_size": total}, "weight_map": weight_map},
            )
        with Hasher() as hasher:
            files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
            others = {name: path for name, path in files.items() if name not in hashes and not is_journal(name)}
            futures = {name: hasher.submit(path, flush=True) for name, path in others.items()}
            hashes = {**hashes, **{name: future.result() for name, future in futures.items()}}
            records = {
                name: {"bytes": (directory / name).stat().st_size, "sha256": digest}
                for name, digest in sorted(hashes.items())
            }
            write_json(directory / MANIFEST, {**self.manifest, "files": records})
            hasher.submit(directory / MANIFEST, flush=True).result()

    def _abort(self, *, keep: bool = False) -> Path | None:
        try:
            self._background.close()
            if self._journal is not None:
                self._journal.close()
        finally:
            keep = self._journal is not None and (keep or self.workers.size > 1)
            kept = self._staging.end(keep=keep)
        if self.workers.size > 1:
            self.workers.kept = kept
        return kept


def _check_room(out: Path, nbytes: int) -> None:
    existing = next(parent for parent in out.parents if parent.exists())
    if not existing.is_dir():
        raise CheckpointError(f"cannot write {out}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot write {out}: {existing} is not writable")
    free = shutil.disk_usage(existing).free + allocated(hidden(out))  # of a killed run: resumed, or removed first
    if nbytes > free:
        raise CheckpointError(f"{out} needs {nbytes / 1e9:.2f} GB, {existing} has {free / 1e9:.2f} GB free")
