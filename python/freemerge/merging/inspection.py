"""What a merge will do to every tensor, known from the headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..checkpoint import TensorSpec
from ..filter import explain
from ..responses import Response
from .selection import Action
from .units import Unit

REMOVED_TOO_LITTLE = 1e-3  # below this share of the spectrum a filter hardly does anything
REMOVED_TOO_MUCH = 0.9


@dataclass(frozen=True)
class Decision:
    """What happens to one tensor.

    ``seen_as`` holds the shapes of the matrices that a view makes of it, alone or with ``stacked_with``; ``removed`` is
    the share of the spectrum that the filter takes away; ``backend`` and ``form`` say how it is computed.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    action: Action
    seen_as: tuple[tuple[int, ...], ...] = ()
    stacked_with: tuple[str, ...] = ()
    removed: float | None = None
    backend: str | None = None
    form: str | None = None


@dataclass(frozen=True)
class Inspection:
    """Everything that is known about a merge before it starts; bytes are of tensor data, over all passes.

    ``measured_bytes``: those of ``read_bytes`` that are read before anything is merged. ``memory_bytes``: what the
    process needs at most, mapped files not counted. ``seconds``: how long it will take, from files that are in memory;
    None unless it was asked for and can be told.
    """

    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]
    read_bytes: int
    write_bytes: int
    passes: int
    measured_bytes: int = 0
    memory_bytes: int = 0
    seconds: float | None = None


def decide(
    unit: Unit,
    specs: Mapping[str, TensorSpec],
    response: Response | None,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> Iterator[Decision]:
    """The decisions about the members of one unit, which is merged on ``device`` in arithmetic of ``dtype``.

    ``response``: what the method filters matrices with, if it does.
    """
    shapes = matrix_shapes(unit, specs) if unit.action == "filter" else ()
    plan = removed = None
    if shapes and response is not None:
        plan = explain(shapes[0], response, dtype=dtype, device=device, backend=backend)
        removed = _removed_share(response, shapes)
    for name in unit.names:
        spec = specs[name]
        yield Decision(
            name,
            spec.shape,
            spec.dtype_name,
            unit.action,
            shapes if shapes != (spec.shape,) else (),
            unit.names if len(unit.names) > 1 else (),
            removed,
            plan.backend if plan else None,
            plan.form if plan else None,
        )


def warnings(decisions: Sequence[Decision]) -> Iterator[str]:
    """Sentences about filters that do almost nothing or leave almost nothing."""
    filtered = [(decision.name, decision.removed) for decision in decisions if decision.removed is not None]
    much = [name for name, removed in filtered if removed > REMOVED_TOO_MUCH]
    little = [name for name, removed in filtered if removed < REMOVED_TOO_LITTLE]
    for names, share in ((much, f"more than {REMOVED_TOO_MUCH:.0%}"), (little, f"less than {REMOVED_TOO_LITTLE:.1%}")):
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            yield f"the filter removes {share} of the spectrum of {listed}"


def matrix_shapes(unit: Unit, specs: Mapping[str, TensorSpec]) -> tuple[tuple[int, ...], ...]:
    shape = specs[unit.names[0]].shape
    if len(unit.names) > 1:
        return ((sum(specs[name].shape[0] for name in unit.names), shape[1]),)
    return tuple((*shape[:-2], rows, shape[-1]) for rows in unit.parts) or (shape,)


def _removed_share(response: Response, shapes: Sequence[tuple[int, ...]]) -> float:
    sizes = [math.prod(shape) for shape in shapes]
    removed = [_removed(response, shape[-2:]) for shape in shapes]
    return math.fsum(share * size for share, size in zip(removed, sizes, strict=True)) / max(1, sum(sizes))


@lru_cache(maxsize=256)
def _removed(response: Response, shape: tuple[int, ...]) -> float:
    return response.removed_fraction(shape)
