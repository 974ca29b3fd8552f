"""What a run notes down while it writes, so that another can go on where it was killed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import RefusedError

_BEGIN = ".freemerge-journal"  # hidden, as no file of a model that is carried over
JOURNAL = f"{_BEGIN}.jsonl"
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)


class Journal:
    """A file of one JSON object a line, the first of which says what is written from what.

    Where several workers write, each has a file of its own, and the first one's begins with all that is known so far.

    Attributes:
        earlier: what an earlier run noted down after the first line; a line that it did not finish, or that was
            damaged, is not among it, nor is what follows it.
    """

    def __init__(self, path: Path, earlier: Sequence[dict[str, Any]] = ()) -> None:
        self.earlier = list(earlier)
        self._fd: int | None = os.open(path, _APPEND)

    @classmethod
    def begin(cls, folder: Path, identity: Mapping[str, object], *, resumed: bool) -> Journal:
        """That of the first worker; RefusedError if what an earlier run left is other work."""
        path = folder / JOURNAL
        entries = _entries(path) if resumed and path.exists() else []
        earlier: list[dict[str, Any]] = []
        if entries:
            first, *earlier = entries
            for other in folder.glob(_worker("*")):
                earlier += _entries(other)
            plain = json.loads(json.dumps(identity))
            changed = [key for key in plain if first.get(key) != plain[key]]
            if changed:
                raise RefusedError(
                    f"what was left by a killed run cannot be continued, as other {' and '.join(changed)} made it; "
                    "run without resume to start anew"
                )
        new = path.with_suffix(".new")
        new.write_bytes(b"".join(map(_line, (identity, *earlier))))
        os.replace(new, path)  # at no instant is the former one cut short
        return cls(path, earlier)

    @classmethod
    def of_worker(cls, folder: Path, rank: int) -> Journal:
        """That of another worker than the first."""
        path = folder / _worker(rank)
        path.unlink(missing_ok=True)
        return cls(path)

    def add(self, entry: Mapping[str, object]) -> None:
        """Note something down; it survives the process, and if the machine fails, what it says is checked by hashes."""
        assert self._fd is not None
        rest = _line(entry)
        while rest:  # nothing is kept in a buffer, which would fail again when it is closed
            rest = rest[os.write(self._fd, rest) :]

    def close(self) -> None:
        """Nothing more will be noted down."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):  # what was lost is merged again
                os.close(fd)


def is_journal(name: str) -> bool:
    """Whether a file of this name is, or was to become, the journal of one of the workers."""
    return name.startswith(_BEGIN)


def remove_journals(folder: Path) -> None:
    """Remove those of all workers."""
    for path in folder.glob(f"{_BEGIN}*"):
        path.unlink(missing_ok=True)


def _line(entry: Mapping[str, object]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _worker(rank: int | str) -> str:
    return f"{_BEGIN}-{rank}.jsonl"


def _entries(path: Path) -> list[dict[str, Any]]:
    entries = []
    for line in path.read_bytes().split(b"\n"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    return entries
