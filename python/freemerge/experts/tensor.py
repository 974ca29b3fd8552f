"""The kept entries of one tensor of an expert."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..backends.sparse import SparseVector
from .coding import CodedValues, ValueCoding, encode_values, index_dtype
from .select import Selection, rows_of


@dataclass(frozen=True, eq=False)
class ExpertTensor:
    """M(v_i, d) of one tensor: its shape, the flat positions of the kept entries (ascending), and their values."""

    shape: tuple[int, ...]
    indices: torch.Tensor
    coded: CodedValues

    @staticmethod
    def encode(shape: tuple[int, ...], selection: Selection, values: ValueCoding) -> ExpertTensor:
        """Round the values of a selection to a coding."""
        indices = selection.indices.to(index_dtype(math.prod(shape)))
        return ExpertTensor(shape, indices, encode_values(selection.values, values, indices, rows_of(shape)[1]))

    @property
    def numel(self) -> int:
        """Number of entries of the dense tensor."""
        return math.prod(self.shape)

    def sparse(self) -> SparseVector:
        """Positions and rounded values (float32), not yet multiplied by mu."""
        return SparseVector(self.indices, self.coded.decode(self.indices, rows_of(self.shape)[1]))

    def dense(self) -> torch.Tensor:
        """The same as a dense float32 tensor."""
        sparse = self.sparse()
        flat = torch.zeros(self.numel)
        flat[sparse.indices.long()] = sparse.values
        return flat.view(self.shape)
