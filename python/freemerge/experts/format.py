"""Expert files: safetensors whose entries are coded sparse tensors. docs/expert-format.md describes every byte."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ..checkpoint import CheckpointWriter, TensorSpec
from ..checkpoint.safetensors_file import SafetensorsFile
from ..errors import ArgumentError, CheckpointError
from .coding import (
    Bytes,
    CodedPositions,
    ValueCoding,
    decode_positions,
    encode_positions,
    value_coding,
    values_from_bytes,
    values_to_bytes,
)
from .select import rows_of
from .tensor import ExpertTensor

FORMAT = "freemerge-expert"
VERSION = "1"

_MAX_NUMEL = 1 << 62
_MAX_DIMENSIONS = 64


def write_file(
    path: str | os.PathLike[str], tensors: Mapping[str, ExpertTensor], metadata: Mapping[str, str], *, force: bool
) -> int:
    """Write an expert file at once and return its size; ``metadata["values"]`` names the coding of the values."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ArgumentError(f"path must end in .safetensors, got {path}")
    payloads = {name: torch.from_numpy(_to_payload(tensors[name])) for name in sorted(tensors)}
    specs = [TensorSpec(name, tuple(payload.shape), payload.dtype) for name, payload in payloads.items()]
    described = {"format": FORMAT, "version": VERSION, **metadata}
    with CheckpointWriter(path, specs, metadata=described, force=force) as writer:
        for name, payload in payloads.items():
            writer.write(name, payload)
    return writer.nbytes


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, ExpertTensor], dict[str, str]]:
    """The tensors and metadata of an expert file; CheckpointError naming file and tensor if anything is wrong."""
    file = SafetensorsFile(Path(path))
    if file.metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not an expert file (its metadata does not say format {FORMAT})")
    if file.metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is an expert file of version {file.metadata.get('version')!r}; this freemerge reads {VERSION}"
        )
    try:
        values = value_coding(file.metadata.get("values"))
    except ArgumentError as error:
        raise CheckpointError(f"{path}: {error}") from None
    tensors = {}
    for name, slot in sorted(file.slots.items()):
        try:
            if slot.spec.dtype != torch.uint8 or len(slot.spec.shape) != 1:
                raise ValueError("it must be a vector of U8")
            tensors[name] = _from_payload(file.read(name).numpy(), values)
        except ValueError as error:
            raise CheckpointError(f"{path}: tensor {name!r} is corrupted: {error}") from None
    return tensors, file.metadata


def _to_payload(tensor: ExpertTensor) -> Bytes:
    positions = encode_positions(tensor.indices)
    numbers = [
        len(tensor.shape), *tensor.shape, tensor.indices.numel(),
        positions.coding, positions.parameter, positions.data.size,
    ]  # fmt: skip
    header = np.frombuffer(b"".join(_varint(number) for number in numbers), dtype=np.uint8)
    return np.concatenate([header, positions.data, values_to_bytes(tensor.coded)])


def _from_payload(payload: Bytes, values: ValueCoding) -> ExpertTensor:
    header = _Header(payload)
    dimensions = header.number()
    if dimensions > _MAX_DIMENSIONS:
        raise ValueError(f"{dimensions} dimensions")
    shape = tuple(header.number() for _ in range(dimensions))
    numel = math.prod(shape)
    count, coding, parameter, position_bytes = (header.number() for _ in range(4))
    if numel > _MAX_NUMEL or count > min(numel, 8 * payload.size):
        raise ValueError(f"{count} entries of shape {shape} in {payload.size} bytes")
    positions, rest = np.split(payload[header.end :], [min(position_bytes, payload.size)])
    if positions.size != position_bytes:
        raise ValueError("the positions end early")
    # A copy, because the payload may be a memory map whose file goes away.
    indices = decode_positions(CodedPositions(coding, parameter, positions.copy()), count, numel)
    return ExpertTensor(shape, indices, values_from_bytes(values, rest, indices, rows_of(shape)[1]))


def _varint(number: int) -> bytes:
    """Unsigned LEB128."""
    groups = bytearray()
    while number >= 128:
        groups.append(number & 127 | 128)
        number >>= 7
    groups.append(number)
    return bytes(groups)


class _Header:
    """Reads the unsigned LEB128 numbers at the start of a payload."""

    def __init__(self, payload: Bytes) -> None:
        self._payload = payload
        self.end = 0

    def number(self) -> int:
        value = 0
        for shift in range(0, 63, 7):
            if self.end >= self._payload.size:
                break
            byte = int(self._payload[self.end])
            self.end += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("its header is cut or too large")
