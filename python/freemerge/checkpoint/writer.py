"""Writing checkpoints: tensor by tensor, straight into place, published all at once."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from ..errors import ArgumentError, CheckpointError
from .hashing import Hasher
from .locate import SAFETENSORS, SAFETENSORS_INDEX
from .publish import MANIFEST, Staging, cannot_write, check_target
from .safetensors_file import MAX_HEADER_BYTES, Slot, build_header
from .spec import TensorSpec

DEFAULT_SHARD_BYTES = 5_000_000_000
_WRITE_BYTES = 64 << 20  # one system call; the kernel caps it at 2 GiB anyway


@dataclass(frozen=True)
class Shard:
    """One output file, laid out before anything is written."""

    file: str
    header: bytes
    slots: Mapping[str, Slot]
    nbytes: int


def plan_shards(specs: Iterable[TensorSpec], max_shard_bytes: int, metadata: Mapping[str, str]) -> list[Shard]:
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
        file = SAFETENSORS if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header, slots, nbytes = build_header(group, metadata)
        if len(header) - 8 > MAX_HEADER_BYTES:
            raise ArgumentError(f"{file} would need a header of {len(header)} bytes; use a smaller max_shard_bytes")
        shards.append(Shard(file, header, slots, nbytes))
    return shards


class CheckpointWriter:
    """Writes a model directory, or one ``.safetensors`` file if ``out`` ends so.

    The layout of every file is known before the first byte, so a tensor is written at its place and no shard is held
    in memory. Everything goes to a hidden directory beside ``out``; leaving the ``with`` block normally publishes it,
    an exception removes it. The bytes depend on specs, tensors and metadata only, not on the order of writes.

    Args:
        out: where the model goes. Symbolic links are followed.
        specs: all tensors, in the order in which they fill the shards.
        max_shard_bytes: tensor data per file.
        metadata: strings for the safetensors headers, beside ``format: pt`` which transformers asks for.
        force: replace an earlier output at ``out`` (see :func:`freemerge.checkpoint.publish.check_target`).

    Attributes:
        directory: the hidden directory, for files that belong to the model (config, tokenizer, model card); None
            outside the ``with`` block and for a single-file output.
        manifest: becomes ``freemerge.json`` of a model directory, with the hash of every file added under ``files``.
        nbytes: size of all weight files.

    Raises, before anything is written: RefusedError if ``out`` holds something, ArgumentError for impossible specs,
    CheckpointError if the target cannot be written or the disk has too little room. A disk that fills up later is a
    CheckpointError too, with the old output untouched.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        specs: Iterable[TensorSpec],
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
        force: bool = False,
    ) -> None:
        self.out = Path(out).resolve()
        self.single_file = self.out.suffix == ".safetensors"
        self.force = force
        specs = list(specs)
        limit = max(1, sum(spec.nbytes for spec in specs)) if self.single_file else max_shard_bytes
        self.shards = plan_shards(specs, limit, {"format": "pt", **(metadata or {})})
        self.nbytes = sum(shard.nbytes for shard in self.shards)
        check_target(self.out, single_file=self.single_file, force=force)
        _check_room(self.out, self.nbytes)
        self.manifest: dict[str, object] = {}
        self._shard_of = {name: shard for shard in self.shards for name in shard.slots}
        self._pending = {shard.file: set(shard.slots) for shard in self.shards}
        self._lock = threading.Lock()
        self._hashes: dict[str, Future[str]] = {}

    @property
    def directory(self) -> Path | None:
        return None if self.single_file else self._staging.directory

    def __enter__(self) -> CheckpointWriter:
        self._staging = Staging(self.out)
        self._hasher = Hasher()
        try:
            for shard in self.shards:
                with open(self._path(shard), "wb") as stream:
                    stream.write(shard.header)
                    stream.truncate(shard.nbytes)
                self._seal_if_complete(shard)
        except BaseException as error:
            self._abort()
            if isinstance(error, OSError):
                raise cannot_write(self.out, error) from error
            raise
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, exactly as its spec says, once. Any order, any device, from any thread."""
        shard = self._shard_of.get(name)
        if shard is None:
            raise ArgumentError(f"{name} is not among the specs of this checkpoint")
        slot = shard.slots[name]
        if tuple(tensor.shape) != slot.spec.shape or tensor.dtype != slot.spec.dtype:
            raise ArgumentError(
                f"{name} must be {slot.spec.dtype} {slot.spec.shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        with self._lock:
            if name not in self._pending[shard.file]:
                raise ArgumentError(f"{name} was already written")
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        try:
            fd = os.open(self._path(shard), os.O_WRONLY)
            try:
                position = 0
                while position < len(raw):
                    position += os.pwrite(fd, raw[position : position + _WRITE_BYTES], slot.offset + position)
            finally:
                os.close(fd)
        except OSError as error:
            raise cannot_write(self.out, error) from error
        with self._lock:
            self._pending[shard.file].discard(name)
        self._seal_if_complete(shard)

    def _seal_if_complete(self, shard: Shard) -> None:
        """Flush and hash a shard as soon as it is whole, while the next ones are written."""
        with self._lock:
            if not self._pending[shard.file] and shard.file not in self._hashes:
                self._hashes[shard.file] = self._hasher.submit(self._path(shard), flush=True)

    def _path(self, shard: Shard) -> Path:
        return self._staging.directory / shard.file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._abort()

    def _finish(self) -> None:
        missing = sorted(name for names in self._pending.values() for name in names)
        if missing:
            raise ArgumentError(f"{len(missing)} tensors were never written: {', '.join(missing[:10])}")
        try:
            if self.single_file:
                self._hashes[SAFETENSORS].result()
            else:
                self._write_index_and_manifest(self._staging.directory)
            self._staging.publish(SAFETENSORS if self.single_file else None, force=self.force)
        except OSError as error:
            raise cannot_write(self.out, error) from error

    def _write_index_and_manifest(self, directory: Path) -> None:
        if len(self.shards) > 1:
            total = sum(slot.spec.nbytes for shard in self.shards for slot in shard.slots.values())
            weight_map = {name: shard.file for name, shard in sorted(self._shard_of.items())}
            write_json(directory / SAFETENSORS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for path in sorted(directory.rglob("*")):
            name = path.relative_to(directory).as_posix()
            if path.is_file() and name not in self._hashes:
                self._hashes[name] = self._hasher.submit(path, flush=True)
        files = {
            name: {"bytes": (directory / name).stat().st_size, "sha256": future.result()}
            for name, future in sorted(self._hashes.items())
        }
        write_json(directory / MANIFEST, {**self.manifest, "files": files})
        self._hasher.submit(directory / MANIFEST, flush=True).result()

    def _abort(self) -> None:
        self._hasher.close()
        self._staging.discard()


def write_json(path: Path, content: object) -> None:
    """Readable JSON with the keys in the given order."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_room(out: Path, nbytes: int) -> None:
    existing = next(parent for parent in out.parents if parent.exists())
    if not existing.is_dir():
        raise CheckpointError(f"cannot write {out}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot write {out}: {existing} is not writable")
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise CheckpointError(f"{out} needs {nbytes / 1e9:.2f} GB, {existing} has {free / 1e9:.2f} GB free")
