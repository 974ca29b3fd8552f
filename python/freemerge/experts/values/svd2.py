"""Factors at two bits an entry."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ...checkpoint.finite import all_finite
from ...errors import ArgumentError
from ..payload import Bytes, Reader, numbers_to_bytes, tensors_to_bytes
from ..select import rows_of
from .low_rank import LowRankTensor, rank_of

# The best four levels for a Gaussian of variance 1, and where they meet (Lloyd-Max): the entries of a singular vector
# of length n are about Gaussian with variance 1 / n.
LEVELS = torch.tensor([-1.5104176, -0.4527800, 0.4527800, 1.5104176], dtype=torch.float64, device="cpu")
_BORDERS = torch.tensor([-0.9815988, 0.0, 0.9815988], dtype=torch.float64, device="cpu")
_SHIFTS = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device="cpu")


@dataclass(frozen=True, eq=False)
class Svd2(LowRankTensor):
    """Component k is ``scales[k] / sqrt(H W)`` times the outer product of the levels that its codes name.

    ``scales``: bfloat16 [r], so that the nearest multiple of each component is taken. ``left`` [r, H] and ``right``
    [r, W]: uint8 codes 0 to 3.
    """

    coding = "svd2"
    bits = 2
    overhead = 16
    left: torch.Tensor
    right: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def encode(cls, shape: tuple[int, ...], left: torch.Tensor, values: torch.Tensor, right: torch.Tensor) -> Svd2:
        scales = values
        codes = []
        for vectors in (left.t(), right):
            root = math.sqrt(vectors.shape[1])
            code = torch.bucketize(vectors.contiguous() * root, _BORDERS, right=True)
            coded = LEVELS[code] / root
            scales = scales * (coded * vectors).sum(1) / coded.square().sum(1)  # least squares for the coded vectors
            codes.append(code.to(torch.uint8))
        rounded = scales.to(torch.bfloat16)
        if not all_finite(rounded):
            raise ArgumentError(f"values: svd2 cannot hold {float(scales.abs().max()):g}")
        return cls(shape, codes[0], codes[1], rounded)

    @property
    def rank(self) -> int:
        return len(self.scales)

    def first(self, rank: int) -> Svd2:
        """The first components alone."""
        return Svd2(self.shape, self.left[:rank], self.right[:rank], self.scales[:rank])

    def decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = (LEVELS[codes.long()] / math.sqrt(codes.shape[1]) for codes in (self.left, self.right))
        return (left.t() * self.scales.double()).float(), right.float()

    def to_bytes(self) -> Bytes:
        header, scales = numbers_to_bytes(self.rank), tensors_to_bytes(self.scales)
        return np.concatenate([header, scales, _packed(self.left), _packed(self.right)])

    @classmethod
    def from_bytes(cls, shape: tuple[int, ...], reader: Reader) -> Svd2:
        rank = rank_of(shape, reader)
        sizes = [rank * side for side in rows_of(shape)]
        packed = [(torch.uint8, (size + 3) // 4) for size in sizes]
        scales, *codes = reader.tensors((torch.bfloat16, rank), *packed)
        left, right = (_unpacked(part, size).view(rank, -1) for part, size in zip(codes, sizes, strict=True))
        return cls(shape, left, right, scales)


def _packed(codes: torch.Tensor) -> Bytes:
    """Four codes a byte, the first in the lowest bits, padded with zeros."""
    flat = codes.flatten()
    quads = torch.nn.functional.pad(flat, (0, -len(flat) % 4)).view(-1, 4)
    return tensors_to_bytes((quads << _SHIFTS).sum(1, dtype=torch.uint8))


def _unpacked(packed: torch.Tensor, count: int) -> torch.Tensor:
    codes = ((packed[:, None] >> _SHIFTS) & 3).flatten()
    if codes[count:].any():
        raise ValueError("stray bits after the codes")
    return codes[:count].clone()
