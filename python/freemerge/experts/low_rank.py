"""Low-rank experts: what the merged model lacks of a fine-tuned one, theta_i - theta_m, as a few singular vectors.

The idea is Twin-Merging's (arXiv 2406.15479); the bytes go where they help most, over all tensors of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import ArgumentError
from .budget import Offer, allocate, byte_limit
from .expert import Expert, whole_expert
from .format import entry_bytes, least_file_bytes
from .leading import EXACT, leading_triplets
from .payload import numbers_to_bytes
from .select import rows_of
from .task_vector import task_vector
from .values.low_rank import LowRankTensor


@dataclass(frozen=True)
class LowRankExtraction:
    """Experts of a merged model's own tensors ``names``, within a budget (share of the fp16 bytes) or of one rank.

    A budget has to hold the running ``statistics``, too, which are kept of every model.
    """

    backbone: Checkpoint
    models: Sequence[Checkpoint]
    names: Sequence[str]
    coding: type[LowRankTensor]
    budget: float | None
    rank: int | None
    statistics: Sequence[str]

    def __post_init__(self) -> None:
        if self.budget is not None and self._room <= 0:
            raise ArgumentError(f"budget: {self._limit} bytes are less than an expert file takes without tensors")

    def expert(self, i: int) -> Expert:
        """The expert of model i. With a budget, each tensor is read for its spectrum and again for its vectors."""
        if self.rank is not None:  # as in Twin-Merging, of matrices only
            ranks = {name: self.rank for name in self.names if len(self._shape(name)) > 1}
        else:
            ranks = self._ranks(i)
        tensors = {}
        for name, rank in ranks.items():
            if not rank:
                continue
            left, values, right = (part.cpu() for part in leading_triplets(self._residual(i, name), rank))
            if len(values):
                tensors[name] = self.coding.encode(self._shape(name), left, values, right)
        return self._expert(tensors)

    def _ranks(self, i: int) -> dict[str, int]:
        asked = {name: self._even(name) for name in self.names}
        offers: dict[str, Offer] = {}
        unknown = list(self.names)
        while unknown:
            for name in unknown:
                offers[name] = self._offer(i, name, asked[name])
            ranks = allocate(offers, self._room)
            # Where all that was asked for is taken, there may be more to take.
            unknown = [name for name in self.names if ranks[name] == asked[name] < min(rows_of(self._shape(name)))]
            asked |= {name: 2 * asked[name] for name in unknown}
        return ranks

    def _even(self, name: str) -> int:
        """All of a small tensor; of others twice the rank that spends the tensor's own share of the budget, or more."""
        shape = self._shape(name)
        assert self.budget is not None
        if min(rows_of(shape)) <= EXACT:
            return min(rows_of(shape))
        return 8 + 2 * math.ceil(self.budget * 16 * math.prod(shape) / self.coding.component_bits(shape))

    def _offer(self, i: int, name: str, count: int) -> Offer:
        shape = self._shape(name)
        _, values, _ = leading_triplets(self._residual(i, name), count)
        opening = entry_bytes(name, self._limit) + len(numbers_to_bytes(len(shape), *shape, min(rows_of(shape)))) + 2
        return Offer(values.square().tolist(), self.coding.component_bits(shape), 8 * opening)

    def _residual(self, i: int, name: str) -> Tensor:
        residual = task_vector(self.models[i], self.backbone, name)
        return residual.view(rows_of(residual.shape))

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.backbone.specs[name].shape

    @property
    def _limit(self) -> int:
        """Bytes that a file may have."""
        assert self.budget is not None
        return byte_limit(self.budget, map(self._shape, self.names))

    @property
    def _room(self) -> int:
        """Bits for the tensors in it."""
        specs = (self.backbone.specs[name] for name in self.statistics)
        return 8 * (self._limit - least_file_bytes(self._expert({}).metadata, specs, self._limit))

    def _expert(self, tensors: Mapping[str, LowRankTensor]) -> Expert:
        return whole_expert(tensors, self.coding.coding, self.budget)
