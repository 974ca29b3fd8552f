"""Whether two models are the same: a copy of the base among the models, or one model twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from .adapter import AdaptedCheckpoint
from .reader import Checkpoint
from .spec import MERGEABLE, TensorSpec


def alike(sources: Mapping[str, Checkpoint]) -> Iterator[str]:
    """A sentence for each source with the weights of an earlier one, by the arguments' names: ``base``, ``models[0]``.

    Those of the first source are what counts. Reads the first row of each tensor of all sources that agree so far, and
    all of them only where some agree in every first row.
    """
    arguments = {source: argument for argument, source in sources.items()}
    base = next(iter(arguments))
    specs = [spec for spec in base.specs.values() if spec.dtype in MERGEABLE and spec.numel]
    groups: list[Sequence[Checkpoint]] = [[*arguments]] if specs else []
    for rows in (1, None):
        for spec in specs:
            groups = [part for group in groups for part in _parts(group, spec, rows) if len(part) > 1]
    for first, *others in groups:
        changes = "and changes nothing" if first is base else "and counts twice"
        for other in others:
            yield f"{arguments[other]} has the same weights as {arguments[first]} {changes}"


def _parts(group: Sequence[Checkpoint], spec: TensorSpec, rows: int | None) -> list[Sequence[Checkpoint]]:
    """Sources that agree in a number of first rows of a tensor, or all; those that lack it are together."""
    holders: dict[Checkpoint | None, list[Checkpoint]] = {}
    for source in group:
        holders.setdefault(_holder(source, spec), []).append(source)
    if len(holders) == 1:
        return [group]
    parts: list[tuple[torch.Tensor | None, list[Checkpoint]]] = []
    for holder, sources in holders.items():
        tensor = None if holder is None else _read(holder, spec, rows)
        equal = next((part for other, part in parts if _equal(other, tensor)), None)
        if equal is None:
            parts.append((tensor, sources))
        else:
            equal += sources
    return [part for _, part in parts]


def _holder(source: Checkpoint, spec: TensorSpec) -> Checkpoint | None:
    """What a tensor is read from: the base for all that an adapter leaves as it is; None if it is not there."""
    theirs = source.specs.get(spec.name)
    if theirs is None or theirs.dtype not in MERGEABLE or theirs.shape != spec.shape:
        return None
    return source.base if isinstance(source, AdaptedCheckpoint) and spec.name not in source.touched else source


def _read(source: Checkpoint, spec: TensorSpec, rows: int | None) -> torch.Tensor:
    if rows is None or not spec.shape:
        return source.read(spec.name)
    return source.read_rows(spec.name, 0, rows).clone()  # which else may keep all that was computed for them


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(one.device, wide))
