"""Expert files: safetensors whose entries are coded tensors. docs/expert-format.md describes every byte."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from ..checkpoint import CheckpointWriter, TensorSpec
from ..checkpoint.finite import all_finite
from ..checkpoint.safetensors_file import SafetensorsFile, build_header
from ..errors import ArgumentError, CheckpointError
from .payload import Bytes, Reader, numbers_to_bytes
from .values import ExpertTensor, SparseTensor, coding_of

FORMAT = "freemerge-expert"
VERSIONS = ("1", "2")  # of experts that keep single entries of v_i, and of all others

_MAX_NUMEL = 1 << 62
_MAX_DIMENSIONS = 64


def write_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, ExpertTensor],
    statistics: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    *,
    force: bool,
) -> int:
    """Write an expert file at once and return its size; ``metadata`` has version and coding (``values``)."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ArgumentError(f"path must end in .safetensors, got {path}")
    payloads = {name: torch.from_numpy(_to_payload(tensors[name])) for name in sorted(tensors)}
    for name, values in statistics.items():
        try:
            payloads[name] = _statistic(values)
        except ValueError as error:
            raise ArgumentError(f"statistics: {name!r} cannot be written: {error}") from None
    specs = [TensorSpec(name, tuple(payload.shape), payload.dtype) for name, payload in payloads.items()]
    with CheckpointWriter(path, specs, metadata={"format": FORMAT, **metadata}, force=force) as writer:
        for name, payload in payloads.items():
            writer.write(name, payload)
    return writer.nbytes


def open_file(path: str | os.PathLike[str]) -> tuple[SafetensorsFile, type[ExpertTensor]]:
    """An expert file and its coding, by the header alone; CheckpointError naming the file if it is none."""
    file = SafetensorsFile(Path(path))
    if file.metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not an expert file (its metadata does not say format {FORMAT})")
    version = file.metadata.get("version")
    if version not in VERSIONS:
        raise CheckpointError(
            f"{path} is an expert file of version {version!r}; this freemerge reads {' and '.join(VERSIONS)}"
        )
    try:
        coding = coding_of(file.metadata.get("values"))
    except ArgumentError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if issubclass(coding, SparseTensor) != (version == VERSIONS[0]):
        raise CheckpointError(f"{path}: version {version} has no values {coding.coding}")
    return file, coding


def read_file(
    path: str | os.PathLike[str],
) -> tuple[dict[str, ExpertTensor], dict[str, torch.Tensor], dict[str, str]]:
    """Tensors, statistics and metadata of an expert file; CheckpointError naming file and tensor if it is wrong."""
    file, coding = open_file(path)
    tensors, statistics = {}, {}
    for name, slot in sorted(file.slots.items()):
        try:
            if slot.spec.dtype == torch.uint8 and len(slot.spec.shape) == 1:
                tensors[name] = _from_payload(coding, Reader(file.read(name).numpy()))
            else:
                statistics[name] = _statistic(file.read(name))
        except ValueError as error:
            raise CheckpointError(f"{path}: tensor {name!r} is corrupted: {error}") from None
    return tensors, statistics, file.metadata


def least_file_bytes(metadata: Mapping[str, str], statistics: Iterable[TensorSpec], limit: int) -> int:
    """At most so many bytes does a file take that holds running statistics only, within ``limit`` bytes."""
    empty = len(build_header([], {"format": FORMAT, **metadata})[0]) + 8  # entries may end elsewhere than at a multiple
    return empty + sum(entry_bytes(spec.name, limit) + 2 + 2 * spec.numel for spec in statistics)


def entry_bytes(name: str, limit: int) -> int:
    """At most so many bytes of the header describe a tensor, in a file of ``limit`` bytes."""
    entry = {name: {"dtype": "U8", "shape": [limit], "data_offsets": [limit, limit]}}
    return len(json.dumps(entry, separators=(",", ":"), ensure_ascii=False).encode())


def _statistic(values: torch.Tensor) -> torch.Tensor:
    if values.dtype != torch.bfloat16 or values.ndim != 1 or not all_finite(values):
        raise ValueError(f"it must be a finite vector of bfloat16, not {tuple(values.shape)} of {values.dtype}")
    return values


def _to_payload(tensor: ExpertTensor) -> Bytes:
    return np.concatenate([numbers_to_bytes(len(tensor.shape), *tensor.shape), tensor.to_bytes()])


def _from_payload(coding: type[ExpertTensor], reader: Reader) -> ExpertTensor:
    dimensions = reader.number()
    if dimensions > _MAX_DIMENSIONS:
        raise ValueError(f"{dimensions} dimensions")
    shape = tuple(reader.number() for _ in range(dimensions))
    if math.prod(shape) > _MAX_NUMEL:
        raise ValueError(f"shape {shape}")
    return coding.from_bytes(shape, reader)
