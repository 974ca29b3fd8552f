"""Hidden directories of outputs, found in a folder: what killed runs left, and what living ones write."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .locks import lock_of, remove_unused_files
from .staging import MARK


@dataclass(frozen=True)
class Leftover:
    """A hidden directory that was found: of a run that lives, or left behind by one that was killed.

    ``alive``: None where the file system has no locks, which would tell. ``holds_output``: it is a whole output that
    was being replaced, and the only one there is. ``removed``: by :func:`clean`.
    """

    path: Path
    nbytes: int
    alive: bool | None
    holds_output: bool
    removed: bool


def clean(folder: str | os.PathLike[str], *, remove: bool = True) -> list[Leftover]:
    """Find the hidden directories of outputs in a folder, and remove those of runs that were killed.

    Those of living runs stay, as do those on a file system that cannot tell them, and whole outputs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a directory")
    return list(_cleaned(folder, remove))


def _cleaned(folder: Path, remove: bool) -> Iterator[Leftover]:
    for path in sorted(folder.iterdir()):
        name, mark, rest = path.name.rpartition(MARK)
        if not name.startswith(".") or not mark or path.is_symlink() or not path.is_dir():
            continue
        lock = lock_of(path)
        try:
            free = lock.take()
            whole = rest.endswith("-old") and not (folder / name[1:]).exists()
            nbytes = allocated(path)
            if remove and free and not whole:
                shutil.rmtree(path, ignore_errors=True)
            yield Leftover(path, nbytes, None if free is None else not free, whole, not path.exists())
        finally:
            lock.close()
    if remove:
        remove_unused_files(folder, MARK)


def allocated(directory: Path) -> int:
    """The bytes on the disk that the files in a directory take."""
    total = 0
    for folder, _, files in () if directory.is_symlink() else os.walk(directory):
        for file in files:
            with suppress(OSError):  # another run may be removing them
                total += _room(os.lstat(os.path.join(folder, file)))
    return total


def _room(status: os.stat_result) -> int:
    """The bytes that a file takes; a hole in it takes none, where the system tells."""
    blocks: int | None = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else blocks * 512
