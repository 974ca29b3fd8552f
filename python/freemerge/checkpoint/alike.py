"""Whether two models are the same: a copy of the base among the models, or one model twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

import torch

from .adapter import AdaptedCheckpoint
from .reader import Checkpoint
from .spec import MERGEABLE


def alike(sources: Mapping[str, Checkpoint]) -> Iterator[str]:
    """A sentence for each pair of sources with the same weights, by the arguments' names: ``base``, ``models[0]``.

    Reads the first row of each tensor up to the first that differs, and all of them only where none does.
    """
    for first, second in combinations(sources, 2):
        if _same(sources[first], sources[second]):
            changes = " and changes nothing" if first == "base" else " and counts twice"
            yield f"{second} has the same weights as {first}{changes}"


def _same(one: Checkpoint, other: Checkpoint) -> bool:
    return all(_equal(one, other, rows) for rows in (1, None))


def _equal(one: Checkpoint, other: Checkpoint, rows: int | None) -> bool:
    """Whether there are tensors to merge, and these agree in a number of first rows, or all."""
    seen = False
    touched = [source.touched for source in (one, other) if isinstance(source, AdaptedCheckpoint)]
    for name, spec in one.specs.items():
        if spec.dtype not in MERGEABLE or not spec.numel:
            continue
        seen, theirs = True, other.specs.get(name)
        if theirs is None or theirs.dtype not in MERGEABLE or theirs.shape != spec.shape:
            return False
        if touched and not any(name in changed for changed in touched):
            continue  # both have the base's
        first, second = (
            source.read(name) if rows is None or not source.specs[name].shape else source.read_rows(name, 0, rows)
            for source in (one, other)
        )
        wide = torch.promote_types(first.dtype, second.dtype)
        if not torch.equal(first.to(wide), second.to(first.device, wide)):
            return False
    return seen
