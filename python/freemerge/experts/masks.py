"""Experts that select from the merged task vector, as in EMR-Merging (arXiv 2405.17461)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from .expert import Expert, whole_expert
from .task_vector import task_vector
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
            vector = task_vector(self.backbone, self.base, name)
            own = task_vector(self.models[i], self.base, name)
            agrees = (own.sign() == vector.sign()).logical_and_(own != 0)
            magnitudes.append(float(own.abs().sum(dtype=torch.float64)))
            selected.append(float(vector[agrees].abs().sum(dtype=torch.float64)))
            if vector.any():  # else there is nothing to select, nor to take away
                kept[name] = tuple(own.shape), agrees.flatten().cpu()
        total = math.fsum(selected)
        scale = torch.tensor([math.fsum(magnitudes) / total if total else 0.0], dtype=torch.float32, device="cpu")
        tensors = {name: Mask(shape, bits, scale) for name, (shape, bits) in kept.items()}
        return whole_expert(tensors, Mask.coding)
