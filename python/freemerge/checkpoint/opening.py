"""Opening what a merge is given: a base, and models of it, which may be adapters."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from .adapter import AdaptedCheckpoint
from .locate import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_weights
from .reader import Checkpoint, Source
from .tied import untie


@dataclass(frozen=True)
class Inputs:
    """A base and its models, made to fit together; ``untied``: names that are tied in the base, but not any more."""

    base: Checkpoint
    models: tuple[Checkpoint, ...]
    untied: tuple[str, ...]


def open_inputs(
    stack: ExitStack,
    base: Source | Checkpoint,
    models: Mapping[str, Source | Checkpoint],
    *,
    merged: Callable[[str], bool] = lambda name: True,
) -> Inputs:
    """Open a base and models of it, which the caller's ``stack`` closes. ``models`` have the arguments' names as keys.

    ``merged(name)`` tells which tensors take part. Raises CheckpointError for what cannot be read.
    """
    opened = stack.enter_context(Checkpoint.open(base, argument="base"))
    sources = [stack.enter_context(open_model(model, opened, argument)) for argument, model in models.items()]
    untied = untie(opened, sources, merged)
    return Inputs(untied.base, untied.models, untied.names)


def open_model(source: Source | Checkpoint, base: Checkpoint, argument: str = "") -> Checkpoint:
    """Open a fine-tuned model of ``base``: any checkpoint, or a PEFT adapter trained on it (its directory or file)."""
    adapter = adapter_directory(source)
    return Checkpoint.open(source, argument=argument) if adapter is None else AdaptedCheckpoint(adapter, base)


def adapter_directory(source: object) -> Path | None:
    """The directory of the PEFT adapter that ``source`` names, by the directory itself or by its weight file."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    path = Path(source)
    if path.name in ADAPTER_WEIGHTS and (path.parent / ADAPTER_CONFIG).is_file():
        return path.parent
    return path if adapter_weights(path) is not None else None
