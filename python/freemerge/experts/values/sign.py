"""Values as signs times one scale per tensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..payload import Bytes, Reader, tensors_to_bytes
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
        bits = np.packbits(self.negative.numpy(), bitorder="little")
        return tensors_to_bytes(self.scale, torch.from_numpy(bits))

    @classmethod
    def values_from_bytes(cls, shape: tuple[int, ...], indices: torch.Tensor, reader: Reader) -> Sign:
        count = indices.numel()
        scale, packed = reader.tensors((torch.float32, min(1, count)), (torch.uint8, (count + 7) // 8))
        bits = np.unpackbits(packed.numpy(), bitorder="little")
        if bits[count:].any():
            raise ValueError("stray bits after the signs")
        return cls(shape, indices, torch.from_numpy(bits[:count].view(np.bool_)), scale)
