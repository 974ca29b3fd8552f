"""What a run notes down while it writes, so that another can go on where it was killed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RefusedError

JOURNAL = ".freemerge-journal.jsonl"  # hidden, as no file of a model that is carried over


class Journal:
    """A file of one JSON object a line, the first of which says what is written from what.

    Where several workers write, each has a file of its own, and the first one's begins with all that is known so far.

    Attributes:
        earlier: what an earlier run noted down after the first line; a line that it did not finish is not among it.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object], *, resumed: bool) -> None:
        path = folder / JOURNAL
        self.earlier: list[dict[str, Any]] = []
        entries = _entries(path) if resumed and path.exists() else []
        if entries:
            first, *self.earlier = entries
            for other in folder.glob(_worker("*")):
                self.earlier += _entries(other)
            plain = json.loads(json.dumps(identity))
            changed = [key for key in plain if first.get(key) != plain[key]]
            if changed:
                raise RefusedError(
                    f"what was left by a killed run cannot be continued, as other {' and '.join(changed)} made it; "
                    "run without resume to start anew"
                )
        new = path.with_suffix(".new")
        new.write_text("".join(map(_line, (identity, *self.earlier))), encoding="utf-8")
        os.replace(new, path)  # at no instant is the former one cut short
        self._stream = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()

    def add(self, entry: Mapping[str, object]) -> None:
        """Note something down; it survives the process, and if the machine fails, what it says is checked by hashes."""
        self._stream.write(_line(entry))
        self._stream.flush()

    def close(self) -> None:
        """Nothing more will be noted down."""
        self._stream.close()


class WorkerJournal(Journal):
    """That of another worker than the first."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._stream = open(folder / _worker(rank), "w", encoding="utf-8")  # noqa: SIM115  closed by close()


def remove_journals(folder: Path) -> None:
    """Remove those of all workers."""
    for path in (folder / JOURNAL, *folder.glob(_worker("*"))):
        path.unlink(missing_ok=True)


def _line(entry: Mapping[str, object]) -> str:
    return json.dumps(entry) + "\n"


def _worker(rank: int | str) -> str:
    return f".freemerge-journal-{rank}.jsonl"


def _entries(path: Path) -> list[dict[str, Any]]:
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(dict(json.loads(line)))
        except ValueError:
            break
    return entries
