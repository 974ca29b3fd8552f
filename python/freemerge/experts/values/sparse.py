"""Tensors of which a few entries are kept: coded positions, then values in a coding of the subclass."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from ...backends.sparse import SparseVector
from ..payload import Bytes, Reader, numbers_to_bytes
from ..positions import CodedPositions, decode_positions, encode_positions, index_dtype
from ..select import Selection
from .base import ExpertTensor, Seen


@dataclass(frozen=True, eq=False)
class SparseTensor(ExpertTensor):
    """M(v_i, d) of one tensor: the flat positions of the kept entries, ascending, and their values."""

    takes = ("density", "scope", "trim", "rescale", "backbone")
    indices: torch.Tensor

    @classmethod
    def encode(cls, shape: tuple[int, ...], selection: Selection) -> SparseTensor:
        """Round the values of a selection; ArgumentError where the coding cannot hold one."""
        return cls.rounded(shape, selection.indices.to(index_dtype(math.prod(shape))), selection.values)

    @classmethod
    @abstractmethod
    def rounded(cls, shape: tuple[int, ...], indices: torch.Tensor, values: torch.Tensor) -> SparseTensor:
        """Code float32 values, as near as it can be."""

    @abstractmethod
    def values(self) -> torch.Tensor:
        """The rounded values in float32."""

    @abstractmethod
    def values_to_bytes(self) -> Bytes:
        """Scales if there are any, then values, little-endian."""

    @classmethod
    @abstractmethod
    def values_from_bytes(cls, shape: tuple[int, ...], indices: torch.Tensor, reader: Reader) -> SparseTensor:
        """The inverse of :meth:`values_to_bytes`; it takes all that the reader has left."""

    @property
    def entries(self) -> int:
        return self.indices.numel()

    def sparse(self) -> SparseVector:
        """The kept entries: positions and values (float32), not yet multiplied by mu."""
        return SparseVector(self.indices, self.values())

    def dense(self, device: torch.device | None = None, seen: Seen = ()) -> torch.Tensor:
        flat = torch.zeros(self.numel, dtype=torch.float32, device=device or "cpu")
        flat[self.indices.long().to(flat.device)] = self.values().to(flat.device)
        return flat.view(self.shape)

    def to_bytes(self) -> Bytes:
        positions = encode_positions(self.indices)
        header = numbers_to_bytes(self.entries, positions.coding, positions.parameter, positions.data.size)
        return np.concatenate([header, positions.data, self.values_to_bytes()])

    @classmethod
    def from_bytes(cls, shape: tuple[int, ...], reader: Reader) -> SparseTensor:
        count, coding, parameter, nbytes = (reader.number() for _ in range(4))
        numel = math.prod(shape)
        if count > min(numel, 8 * reader.size):
            raise ValueError(f"{count} entries of shape {shape} in {reader.size} bytes")
        indices = decode_positions(CodedPositions(coding, parameter, reader.take(nbytes)), count, numel)
        return cls.values_from_bytes(shape, indices, reader)
