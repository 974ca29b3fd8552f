"""A mask over the merged task vector, one bit an entry, as EMR-Merging (arXiv 2405.17461) keeps for each task."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...errors import ArgumentError
from ..payload import Bytes, Reader, packed_bits, tensors_to_bytes, unpacked_bits
from .base import ExpertTensor, Seen


@dataclass(frozen=True, eq=False)
class Mask(ExpertTensor):
    """theta_0 + scale M (theta_m - theta_0) in place of theta_m. ``kept``: the bits M, flat; ``scale``: float32 [1].

    What is added depends on the merged task vector theta_m - theta_0, of which a mask keeps nothing itself.
    """

    coding = "mask"
    takes = ("backbone",)
    of_backbone = "masks select from it"
    kept: torch.Tensor
    scale: torch.Tensor

    @property
    def relative(self) -> bool:
        return True

    @property
    def entries(self) -> int:
        return self.numel

    def dense(self, device: torch.device | None = None, seen: Seen = ()) -> torch.Tensor:
        if not seen:
            raise ArgumentError("vectors must be given: a mask selects from the merged task vector")
        (vector,) = seen
        factors = self.kept.to(device).float() * self.scale.to(device) - 1
        return factors.view(self.shape) * vector

    def to_bytes(self) -> Bytes:
        return tensors_to_bytes(self.scale, packed_bits(self.kept))

    @classmethod
    def from_bytes(cls, shape: tuple[int, ...], reader: Reader) -> Mask:
        count = math.prod(shape)
        scale, packed = reader.tensors((torch.float32, 1), (torch.uint8, (count + 7) // 8))
        return cls(shape, unpacked_bits(packed, count), scale)
