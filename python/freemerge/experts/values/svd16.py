"""Factors as 16-bit floats, as Twin-Merging (arXiv 2406.15479) keeps what is specific to a task."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...checkpoint.finite import all_finite
from ...errors import ArgumentError
from ..payload import Bytes, Reader, numbers_to_bytes, tensors_to_bytes
from ..select import rows_of
from .low_rank import LowRankTensor, rank_of


@dataclass(frozen=True, eq=False)
class Svd16(LowRankTensor):
    """``left`` [r, H] and ``right`` [r, W], float16: the singular vectors times the roots of the singular values."""

    coding = "svd16"
    bits = 16
    overhead = 0
    left: torch.Tensor
    right: torch.Tensor

    @classmethod
    def encode(cls, shape: tuple[int, ...], left: torch.Tensor, values: torch.Tensor, right: torch.Tensor) -> Svd16:
        roots = values.sqrt()[:, None]
        factors = [(roots * vectors).half().contiguous() for vectors in (left.t(), right)]
        if not all(map(all_finite, factors)):
            raise ArgumentError(f"values: svd16 cannot hold factors of a singular value of {float(values.max()):g}")
        return cls(shape, factors[0], factors[1])

    @property
    def rank(self) -> int:
        return len(self.left)

    def decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.left.t().float(), self.right.float()

    def to_bytes(self) -> Bytes:
        return np.concatenate(
            [numbers_to_bytes(self.rank), tensors_to_bytes(self.left.flatten(), self.right.flatten())]
        )

    @classmethod
    def from_bytes(cls, shape: tuple[int, ...], reader: Reader) -> Svd16:
        rank = rank_of(shape, reader)
        left, right = reader.tensors(*[(torch.float16, rank * side) for side in rows_of(shape)])
        return cls(shape, left.view(rank, -1), right.view(rank, -1))
