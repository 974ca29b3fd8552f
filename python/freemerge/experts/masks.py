"""Experts that select from the merged task vector, as in EMR-Merging (arXiv 2405.17461)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..accumulate import task_vector_sum
from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from .expert import Expert
from .values.mask import Mask


@dataclass(frozen=True)
class MaskExtraction:
    """Experts of a merged model's tensors ``names``: M_i = [v_i (theta_m - theta_0) > 0], and one scale a model."""

    base: Checkpoint
    backbone: Checkpoint
    models: Sequence[Checkpoint]
    names: Sequence[str]

    def expert(self, i: int) -> Expert:
        """The expert of model i, whose scale is ``sum |v_i| / sum |M_i (theta_m - theta_0)|`` over the whole model."""
        kept: dict[str, tuple[tuple[int, ...], Tensor]] = {}
        magnitudes, selected = [], []
        for name in self.names:
            base = self.base.read(name)
            vector = self._vector(self.backbone, base, name)
            own = self._vector(self.models[i], base, name)
            agrees = (own.sign() == vector.sign()).logical_and_(own != 0)
            magnitudes.append(float(own.abs().sum(dtype=torch.float64)))
            selected.append(float(vector[agrees].abs().sum(dtype=torch.float64)))
            if vector.any():  # else there is nothing to select, nor to take away
                kept[name] = tuple(base.shape), agrees.flatten().cpu()
        total = math.fsum(selected)
        scale = torch.tensor([math.fsum(magnitudes) / total if total else 0.0], dtype=torch.float32)
        tensors = {name: Mask(shape, bits, scale) for name, (shape, bits) in kept.items()}
        return Expert(tensors, 1.0, None, None, "number", Mask.coding)

    def _vector(self, model: Checkpoint, base: Tensor, name: str) -> Tensor:
        vector, means = task_vector_sum(base, [model.read(name).to(base.device)], [1.0])
        if not math.isfinite(means[0]):
            raise CheckpointError(f"{model.label}: {name!r} is not finite, or {self.base.label} has it not finite")
        return vector
