"""Matrices of low rank, kept as their factors."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...lazy import cached_property
from ..payload import Reader
from ..select import rows_of
from .base import ExpertTensor, Seen

_BLOCK = 1 << 18  # entries of a product that are computed together on a CPU, so that they stay in the cache


@dataclass(frozen=True, eq=False)
class LowRankTensor(ExpertTensor):
    """The sum of ``rank`` outer products of vectors of the lengths H and W.

    A tensor of another number of dimensions is the matrix of its rows (:func:`freemerge.experts.select.rows_of`).
    """

    takes = ("budget", "rank", "backbone")
    of_backbone = "they hold what it lacks"
    overhead: ClassVar[int]  #: bits of a component beside those of its H + W entries
    bits: ClassVar[int]  #: bits of an entry

    @classmethod
    @abstractmethod
    def encode(
        cls, shape: tuple[int, ...], left: torch.Tensor, values: torch.Tensor, right: torch.Tensor
    ) -> LowRankTensor:
        """Code ``left @ diag(values) @ right``, orthonormal [H, r], [r] and [r, W] in float64, as near as it can be.

        ArgumentError where the coding cannot hold one of the numbers.
        """

    @property
    @abstractmethod
    def rank(self) -> int:
        """Number of components."""

    @abstractmethod
    def decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """:attr:`factors`, computed anew."""

    @cached_property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[H, r] and [r, W], float32, on the CPU: their product is what is added, not yet multiplied by mu."""
        return self.decoded()

    @classmethod
    def component_bits(cls, shape: tuple[int, ...]) -> int:
        """Bits of one component of a tensor of this shape."""
        return cls.overhead + cls.bits * sum(rows_of(shape))

    @property
    def entries(self) -> int:
        return self.rank * sum(rows_of(self.shape))

    def dense(self, device: torch.device | None = None, seen: Seen = ()) -> torch.Tensor:
        left, right = (factor.to(device) for factor in self.factors)
        return product(left, right).view(self.shape)


def rank_of(shape: tuple[int, ...], reader: Reader) -> int:
    """The rank at the start of a payload; ValueError if no matrix of this shape has it."""
    rank = reader.number()
    if not 1 <= rank <= min(rows_of(shape)):
        raise ValueError(f"rank {rank} of shape {shape}")
    return rank


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` in float32, component after component.

    Every product and sum is rounded once, so the bytes are the same on every device and for any number of threads,
    and whatever precision torch allows its matrix products.
    """
    out = torch.zeros(len(left), right.shape[1], dtype=torch.float32, device=left.device)
    block = max(1, _BLOCK // max(1, right.shape[1]))
    for start in range(0, len(left), block):
        rows = out[start : start + block]
        for column, row in zip(left[start : start + block].t(), right, strict=True):
            rows += column[:, None] * row
    return out
