"""How two checkpoints differ: names, shapes, dtypes, and for each tensor the largest and the mean difference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ..dense import bits
from .reader import Checkpoint, Source

_CHUNK = 1 << 22  # entries that are compared at a time


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same in two checkpoints.

    Attributes:
        name: of the tensor.
        kind: "only in first", "only in second", "shape", "dtype" (with equal values), or "values".
        first, second: shape and dtype in each, as ``bfloat16 4x4``; empty where there is none.
        largest, mean: of ``|first - second|`` over all entries, in float64; None where shapes differ or one is missing.
            Equal entries, NaN and infinity among them, differ by 0; other NaN and infinity make both not finite.
    """

    name: str
    kind: str
    first: str = ""
    second: str = ""
    largest: float | None = None
    mean: float | None = None


def diff(first: Source, second: Source) -> Iterator[Difference]:
    """The tensors that differ between two checkpoints, by name, one after the other; a few are in memory at a time.

    Both are as the base of :func:`freemerge.merge`. Raises CheckpointError, before the first, for what cannot be read.
    """
    stack = ExitStack()
    with stack:
        ours = stack.enter_context(Checkpoint.open(first, argument="first"))
        theirs = stack.enter_context(Checkpoint.open(second, argument="second"))
        stack = stack.pop_all()
    return _generate(ours, theirs, stack)


def _generate(ours: Checkpoint, theirs: Checkpoint, stack: ExitStack) -> Iterator[Difference]:
    with stack:
        for name in sorted({*ours.specs, *theirs.specs}):
            difference = _difference(name, ours, theirs)
            if difference is not None:
                yield difference


def _difference(name: str, ours: Checkpoint, theirs: Checkpoint) -> Difference | None:
    first, second = _described(name, ours), _described(name, theirs)
    if not first or not second:
        return Difference(name, "only in first" if first else "only in second", first, second)
    if ours.specs[name].shape != theirs.specs[name].shape:
        return Difference(name, "shape", first, second)
    largest, mean = _distances(ours.read(name), theirs.read(name))
    if first == second and largest == 0:
        return None
    return Difference(name, "values" if largest != 0 else "dtype", first, second, largest, mean)


def _described(name: str, checkpoint: Checkpoint) -> str:
    spec = checkpoint.specs.get(name)
    return f"{spec.dtype_name} {'x'.join(map(str, spec.shape)) or 'scalar'}" if spec is not None else ""


def _distances(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """The largest and the mean |first - second|."""
    largest = total = 0.0
    flat = first.reshape(-1), second.to(first.device).reshape(-1)
    chunks = zip(*(torch.split(tensor, _CHUNK) for tensor in flat), strict=True)
    for ours, theirs in chunks if first.numel() else ():
        if ours.dtype == theirs.dtype and torch.equal(bits(ours), bits(theirs)):
            continue
        a, b = _wide(ours), _wide(theirs)
        apart = (a - b).abs().masked_fill_((a == b) | (a.isnan() & b.isnan()), 0.0)
        if ours.dtype == theirs.dtype and not ours.dtype.is_floating_point and not ours.is_complex():
            apart.clamp_(min=(ours != theirs).double())  # integers above 2 ** 53 may be one float64
        highest = float(apart.max())
        largest = max(largest, highest) if largest == largest and highest == highest else float("nan")
        total += float(apart.sum())
    return largest, total / max(1, first.numel())


def _wide(chunk: torch.Tensor) -> torch.Tensor:
    return chunk.to(torch.complex128 if chunk.is_complex() else torch.float64)
