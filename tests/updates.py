"""Sparse updates of many tensors at once, for all backends, and what they make of the tensors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from freemerge.backends.sparse import SparseVector, Update
from freemerge.experts.switch import Switch

SHAPES = [(130, 301), (7,), (64, 3, 5, 5), (1, 1), (40, 900)]


def sparse(numel: int, count: int, seed: int, index_dtype: torch.dtype = torch.int32) -> SparseVector:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(numel, generator=generator)[:count].sort().values
    return SparseVector(indices.to(index_dtype), torch.randn(count, generator=generator))


def apply_(updates: Sequence[Update], *, backend: str = "auto") -> ExitStack:
    """Make the changes in place, in their order; closing the stack undoes them."""
    return Switch(updates, backend=backend).on([update.weights for update in updates])


def mixed_updates(dtypes: Sequence[torch.dtype], count: int, device: str = "cpu") -> list[Update]:
    """Tensors of all dtypes, shapes and strides, with entries of both index widths, with and without an origin, and
    with none at all."""
    updates = []
    kinds = itertools.product(dtypes, SHAPES, (torch.int32, torch.int64), (False, True))
    for seed, (dtype, shape, index_dtype, strided) in zip(range(count), itertools.cycle(kinds), strict=False):
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(shape, generator=generator).to(dtype)
        if strided:
            weights = weights.movedim(0, -1).contiguous().movedim(-1, 0)
        entries = sparse(weights.numel(), [0, 1, weights.numel() // 3, weights.numel()][seed % 4], seed, index_dtype)
        origin = torch.randn(entries.indices.numel(), generator=generator).to(dtype) if seed % 3 == 0 else None
        updates.append(
            Update(
                weights.to(device),
                entries.to(torch.device(device)),
                0.3 * (seed % 5 - 2),
                None if origin is None else origin.to(device),
            )
        )
    return updates


def expected(update: Update) -> torch.Tensor:
    """What an update makes of its weights, by dense arithmetic."""
    flat, where = update.weights.cpu().flatten().clone(), update.entries.indices.long().cpu()
    compute = torch.promote_types(flat.dtype, torch.float32)
    start = flat[where] if update.origin is None else update.origin.cpu()
    flat[where] = (start.to(compute) + update.entries.values.cpu().to(compute) * update.scale).to(flat.dtype)
    return flat.view(update.weights.shape)
