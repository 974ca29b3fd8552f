"""Opening what a merge is given: a base, and models of it, which may be adapters."""

from __future__ import annotations

import os
from pathlib import Path

from .adapter import AdaptedCheckpoint
from .locate import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_weights
from .reader import Checkpoint, Source


def open_model(source: Source | Checkpoint, base: Checkpoint) -> Checkpoint:
    """Open a fine-tuned model of ``base``: any checkpoint, or a PEFT adapter trained on it (its directory or file)."""
    adapter = adapter_directory(source)
    return Checkpoint.open(source) if adapter is None else AdaptedCheckpoint(adapter, base)


def adapter_directory(source: object) -> Path | None:
    """The directory of the PEFT adapter that ``source`` names, by the directory itself or by its weight file."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    path = Path(source)
    if path.name in ADAPTER_WEIGHTS and (path.parent / ADAPTER_CONFIG).is_file():
        return path.parent
    return path if adapter_weights(path) is not None else None
