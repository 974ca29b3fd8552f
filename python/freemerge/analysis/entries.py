"""Scalar products and signs of task vectors, entry by entry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sums import EntrySums

_BLOCK_ENTRIES = 1 << 18  # of each vector, that are in memory as float64


def entry_sums(base: Tensor, vectors: Sequence[Tensor], tasks: int) -> EntrySums:
    """Sums over the entries of one tensor.

    ``base``: theta_0. ``vectors``: its task vectors, the first ``tasks`` of them, then what methods make of these; all
    contiguous and of one shape, on one device.
    """
    sums = EntrySums.zeros(tasks, len(vectors) - tasks)
    flat = [vector.reshape(-1) for vector in vectors]
    square = 0.0
    for start in range(0, base.numel(), _BLOCK_ENTRIES):
        entries = slice(start, start + _BLOCK_ENTRIES)
        block = torch.stack([vector[entries].double() for vector in flat])
        signs = block[:tasks].sign()
        product, both = signs @ signs.mT, signs.abs() @ signs.abs().mT
        sums.gram[:] += (block @ block.mT).cpu().numpy()
        sums.agreeing[:] += ((both + product) / 2).cpu().numpy()
        sums.differing[:] += ((both - product) / 2).cpu().numpy()
        square += float(base.reshape(-1)[entries].double().square().sum())
    return EntrySums(base.numel(), square, sums.gram, sums.agreeing, sums.differing)
