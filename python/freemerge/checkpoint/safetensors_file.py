"""The safetensors file format: a strict header parser, the header of a new file, and mapped reads of byte ranges.

A file is an 8-byte little-endian header size, a JSON header, and the tensors' bytes without gaps. The parser accepts
what the safetensors library accepts and nothing else; it is our own because rows of a tensor are read, and tensors of
a new file written, at known offsets.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple
from weakref import WeakSet, WeakValueDictionary

import torch

from ..errors import ArgumentError, CheckpointError
from .json_file import unique_keys
from .regular_file import check_unchanged, identity, open_regular
from .spec import TORCH_DTYPES, TensorSpec, dtype_code

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MAX_ELEMENTS = 1 << 62  # sizes and strides stay inside int64, even for tensors without elements
_MAX_DIMENSIONS = 64  # torch's own limit
_COPY_BELOW_BYTES = 1 << 20  # a mapping costs a file descriptor; small tensors are cheaper to copy
_ENTRY = frozenset({"dtype", "shape", "data_offsets"})  # what a header says about a tensor
_INT = frozenset({int})  # no booleans
_NO_RESERVE: int = getattr(mmap, "MAP_NORESERVE", 0)
_MOST_MAPPED = 256  # at once: each has a descriptor, of the 1024 that a process mostly may have

_mapped: WeakSet[mmap.mmap] = WeakSet()  # while tensors in them live


class Slot(NamedTuple):
    """A tensor, and where its bytes begin and end, counted from the start of the file."""

    spec: TensorSpec
    offset: int
    end: int


class SafetensorsFile:
    """One safetensors file, opened for reading: header parsed and checked, data read on demand.

    No descriptor is held between calls (a large model has hundreds of shards); a file that was replaced or rewritten
    since its header was read is refused.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._place = path, path.absolute()  # the working directory may be another when data are read
        fd = open_regular(path)
        try:
            self.identity = identity(fd)
            self._header = _header_of(path, fd)
        finally:
            os.close(fd)
        self.slots, self.specs = self._header.slots, self._header.specs
        self.metadata = dict(self._header.metadata)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor; see :meth:`read_rows`."""
        slot = self.slots[name]
        return self._read(slot.spec.shape, slot.spec.dtype, slot.offset)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start:stop`` along the first dimension, as a tensor that no other read shares.

        Large reads are private memory maps, aligned ones without a copy: their pages are loaded when touched and given
        back when the tensor is dropped. Writing to the tensor never reaches the file.
        """
        slot = self.slots[name]
        shape = slot.spec.shape
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise ArgumentError(f"{name} has shape {shape}: there are no rows {start}:{stop}")
        row_bytes = slot.spec.nbytes // max(1, shape[0])
        return self._read((stop - start, *shape[1:]), slot.spec.dtype, slot.offset + start * row_bytes)

    def read_flat(self, names: Sequence[str]) -> torch.Tensor | None:
        """Tensors of one dtype as a vector, in one read; None unless they lie end to end in this file."""
        first = self.slots[names[0]]
        end = first.offset
        for name in names:
            slot = self.slots.get(name)
            if slot is None or slot.offset != end:
                return None
            end = slot.end
        dtype = first.spec.dtype
        return self._read(((end - first.offset) // dtype.itemsize,), dtype, first.offset)

    def will_need(self, name: str) -> None:
        """Let the system fetch a large tensor from the disk; small ones come with what it reads ahead anyway."""
        slot = self.slots[name]
        if slot.spec.nbytes >= _COPY_BELOW_BYTES and hasattr(os, "posix_fadvise"):
            with suppress(OSError), open(self._place, "rb", buffering=0) as stream:
                os.posix_fadvise(stream.fileno(), slot.offset, slot.spec.nbytes, os.POSIX_FADV_WILLNEED)

    def _read(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> torch.Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        fd = open_regular(self._place)
        try:
            check_unchanged(fd, self.identity, self.path)
            raw = _load(fd, self.path, offset, nbytes)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error
        finally:
            os.close(fd)
        if raw.data_ptr() % dtype.itemsize:  # old writers did not pad the header
            raw = raw.clone()
        return raw.view(dtype).view(shape)


def _load(fd: int, path: Path, offset: int, nbytes: int) -> torch.Tensor:
    if nbytes >= _COPY_BELOW_BYTES and len(_mapped) < _MOST_MAPPED:
        try:
            return _map(fd, offset, nbytes)
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise  # the others mean: no mapping on this file system, or none left; the bytes can still be read
    return _copy(fd, path, offset, nbytes)


def _map(fd: int, offset: int, nbytes: int) -> torch.Tensor:
    lead = offset % mmap.ALLOCATIONGRANULARITY
    # Private and writable: torch warns about read-only buffers, and a stray write stays in this process.
    if hasattr(mmap, "MAP_PRIVATE"):
        private: dict[str, int] = {
            "flags": mmap.MAP_PRIVATE | _NO_RESERVE,
            "prot": mmap.PROT_READ | mmap.PROT_WRITE,
        }
    else:  # Windows
        private = {"access": mmap.ACCESS_COPY}
    mapping = mmap.mmap(fd, lead + nbytes, offset=offset - lead, **private)
    _mapped.add(mapping)
    return torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes, offset=lead)


def _copy(fd: int, path: Path, offset: int, nbytes: int) -> torch.Tensor:
    raw = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    view = raw.numpy().data
    position = 0
    while position < nbytes:  # one call reads 2 GiB at most
        count = _read_at(fd, view[position:], offset + position)
        if count == 0:
            raise CheckpointError(f"{path} ends before byte {offset + nbytes}")
        position += count
    return raw


def _read_at(fd: int, view: memoryview, offset: int) -> int:
    """Read what comes at once into ``view``; the number of bytes."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], offset)
    os.lseek(fd, offset, os.SEEK_SET)  # of a descriptor that nobody else reads from
    found = os.read(fd, min(len(view), 1 << 26))
    view[: len(found)] = found
    return len(found)


def _bytes_at(fd: int, count: int, offset: int) -> bytes:
    found = bytearray(count)
    return bytes(found[: _read_at(fd, memoryview(found), offset)])


class _Header:
    """What a header says, checked against the size of its file. Nobody changes it."""

    def __init__(self, slots: Mapping[str, Slot], metadata: Mapping[str, str]) -> None:
        self.slots, self.metadata = slots, metadata
        self.specs = {name: slot.spec for name, slot in slots.items()}


# Headers of the files that are open: a model and its fine-tuned ones mostly have the same, and it can be long.
_open_headers: WeakValueDictionary[tuple[int, bytes], _Header] = WeakValueDictionary()


def _header_of(path: Path, fd: int) -> _Header:
    file_bytes = os.fstat(fd).st_size
    if file_bytes < 8:
        raise CheckpointError(f"{path}: not a safetensors file ({file_bytes} bytes, the header alone needs more)")
    header_bytes = int.from_bytes(_bytes_at(fd, 8, 0), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: not a safetensors file (a header of {header_bytes} bytes, the limit is {MAX_HEADER_BYTES})"
        )
    data_start = 8 + header_bytes
    if data_start > file_bytes:
        raise CheckpointError(f"{path}: truncated (header of {header_bytes} bytes, file of {file_bytes})")
    raw = _bytes_at(fd, header_bytes, 8)
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{path}: not a safetensors file (the header is not a JSON object)")
    key = file_bytes, hashlib.sha256(raw).digest()
    known = _open_headers.get(key)
    if known is None:
        known = _open_headers[key] = _parse_header(path, raw, data_start, file_bytes)
    return known


def _parse_header(path: Path, raw: bytes, data_start: int, file_bytes: int) -> _Header:
    try:
        header = json.loads(raw.decode(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: bad safetensors header: {error}") from None

    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: bad safetensors header: __metadata__ must map strings to strings")
    kinds: dict[tuple[object, ...], tuple[TensorSpec, int]] = {}
    slots = {name: _parse_entry(path, name, entry, data_start, kinds) for name, entry in header.items()}
    _check_tiling(path, slots.values(), data_start, file_bytes)
    return _Header(slots, metadata)


def _parse_entry(
    path: Path, name: str, entry: object, data_start: int, kinds: dict[tuple[object, ...], tuple[TensorSpec, int]]
) -> Slot:
    """Where a tensor is; ``kinds`` are those that were checked before, as most tensors of a model are like others."""
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        raise CheckpointError(f"{path}: tensor {name!r}: the header must give dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in TORCH_DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r}: dtype {code!r} is not supported")
    if not isinstance(shape, list) or not {*map(type, shape)} <= _INT:
        raise CheckpointError(f"{path}: tensor {name!r}: bad shape")
    kind = kinds.get((code, *shape))
    if kind is None:
        if min(shape, default=0) < 0 or len(shape) > _MAX_DIMENSIONS or math.prod(filter(None, shape)) > _MAX_ELEMENTS:
            raise CheckpointError(f"{path}: tensor {name!r}: bad shape")
        spec = TensorSpec(name, tuple(shape), TORCH_DTYPES[code])
        kind = kinds[code, *shape] = spec, spec.nbytes
    like, nbytes = kind
    if not isinstance(offsets, list) or [*map(type, offsets)] != [int, int] or min(offsets) < 0:
        raise CheckpointError(f"{path}: tensor {name!r}: bad data_offsets")
    begin, end = offsets
    if end - begin != nbytes:
        raise CheckpointError(f"{path}: tensor {name!r}: {code} {like.shape} is {nbytes} bytes, not {end - begin}")
    return Slot(TensorSpec(name, like.shape, like.dtype), data_start + begin, data_start + end)


def _check_tiling(path: Path, slots: Iterable[Slot], position: int, file_bytes: int) -> None:
    """Tensors must fill the data section in some order, without overlaps, holes or a remainder."""
    for slot in sorted(slots, key=attrgetter("offset", "end")):
        if slot.offset != position:
            what = "overlaps another tensor" if slot.offset < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {slot.spec.name!r} {what}")
        position = slot.end
        if position > file_bytes:
            raise CheckpointError(
                f"{path}: truncated (tensor {slot.spec.name!r} ends at byte {position}, the file has {file_bytes})"
            )
    if position != file_bytes:
        raise CheckpointError(f"{path}: {file_bytes - position} bytes at the end belong to no tensor")


def build_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, Slot], int]:
    """The first bytes of a file holding ``specs``, each tensor's place, and the size of the whole file.

    Wider dtypes come first, as in the safetensors library, so that every tensor is aligned to its element; the data
    section begins at a multiple of 8.
    """
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    places: list[tuple[TensorSpec, int, int]] = []
    end = 0
    for spec in ordered:
        begin, end = end, end + spec.nbytes
        header[spec.name] = {"dtype": dtype_code(spec), "shape": spec.shape, "data_offsets": (begin, end)}
        places.append((spec, begin, end))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data_start = 8 + len(text)
    slots = {spec.name: Slot(spec, data_start + begin, data_start + end) for spec, begin, end in places}
    return len(text).to_bytes(8, "little") + text, slots, data_start + end
