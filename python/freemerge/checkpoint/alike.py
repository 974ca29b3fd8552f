"""Whether two models are the same: a copy of the base among the models, or one model twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
    names = [name for name, spec in one.specs.items() if spec.dtype in MERGEABLE and spec.numel]
    found = [other.specs.get(name) for name in names]
    if not names or any(spec is None or spec.dtype not in MERGEABLE for spec in found):
        return False
    if any(other.specs[name].shape != one.specs[name].shape for name in names):
        return False
    return all(_equal(one, other, names, rows) for rows in (1, None))


def _equal(one: Checkpoint, other: Checkpoint, names: Iterable[str], rows: int | None) -> bool:
    touched = [source.touched for source in (one, other) if isinstance(source, AdaptedCheckpoint)]
    for name in names:
        if touched and not any(name in changed for changed in touched):
            continue  # both have the base's
        first, second = (
            source.read(name) if rows is None or not source.specs[name].shape else source.read_rows(name, 0, rows)
            for source in (one, other)
        )
        wide = torch.promote_types(first.dtype, second.dtype)
        if not torch.equal(first.to(wide), second.to(first.device, wide)):
            return False
    return True
