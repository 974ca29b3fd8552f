"""Values as signs times one scale per tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..payload import Bytes, Reader, packed_bits, tensors_to_bytes, unpacked_bits
from .sparse import SparseTensor


@dataclass(frozen=True, eq=False)
class Sign(SparseTensor):
    """``scale`` is one float32, the mean magnitude, which is nearest by least squares; without entries it is empty."""

    coding = "sign"
    negative: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def rounded(cls, shape: tuple[int, ...], indices: torch.Tensor, values: torch.Tensor) -> Sign:
        mean = values.abs().double().sum() / max(1, values.numel())
        return cls(shape, indices, values < 0, mean.float().reshape(1)[: values.numel()])

    def values(self) -> torch.Tensor:
        return torch.where(self.negative, -self.scale, self.scale)

    def values_to_bytes(self) -> Bytes:
        return tensors_to_bytes(self.scale, packed_bits(self.negative))

    @classmethod
    def values_from_bytes(cls, shape: tuple[int, ...], indices: torch.Tensor, reader: Reader) -> Sign:
        count = indices.numel()
        scale, packed = reader.tensors((torch.float32, min(1, count)), (torch.uint8, (count + 7) // 8))
        return cls(shape, indices, unpacked_bits(packed, count), scale)
