"""Files that are opened for reading: only regular ones, and they must stay what they are meanwhile."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from ..errors import CheckpointError

Identity = tuple[int, ...]


def open_regular(path: Path) -> int:
    """A read-only descriptor of a regular file. Anything else is refused before it can block (pipes, devices)."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def identity(file: Path | int) -> Identity:
    """Size, time of the last change, and which file it is, of a path or a descriptor."""
    try:
        status = os.stat(file)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino


def identities(files: Iterable[Path]) -> dict[Path, Identity]:
    """The :func:`identity` of each that is a file."""
    return {file: identity(file) for file in sorted(files) if file.is_file()}


def check_unchanged(file: Path | int, before: Identity, path: Path) -> None:
    """Refuse a file, ``path`` to the user, that is not the one of which :func:`identity` said ``before``."""
    if identity(file) != before:
        raise CheckpointError(f"{path} changed while it was being read")


def was_cut_short(file: Path, before: Identity) -> bool:
    """Whether a file of which :func:`identity` said ``before`` has become shorter; one that took its place has not."""
    try:
        size, _, *which = identity(file)
    except CheckpointError:  # it is gone, but whoever maps it still has it
        return False
    return size < before[0] and which == [*before[2:]]
