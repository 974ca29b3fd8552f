"""What a run notes down while it writes, so that another can go on where it was killed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RefusedError

JOURNAL = "journal.jsonl"


class Journal:
    """A file of one JSON object a line, the first of which says what is written from what.

    Attributes:
        earlier: what an earlier run noted down after the first line; a line that it did not finish is not among it.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object], *, resumed: bool) -> None:
        self._path = folder / JOURNAL
        self.earlier: list[dict[str, Any]] = []
        entries = self._entries() if resumed and self._path.exists() else []
        if entries:
            first, *self.earlier = entries
            plain = json.loads(json.dumps(identity))
            changed = [key for key in plain if first.get(key) != plain[key]]
            if changed:
                raise RefusedError(
                    f"what was left by a killed run cannot be continued, as other {' and '.join(changed)} made it; "
                    "run without resume to start anew"
                )
        new = self._path.with_suffix(".new")
        self._stream = open(new, "w", encoding="utf-8")  # noqa: SIM115  closed by close()
        for entry in (identity, *self.earlier):
            self.add(entry)
        os.replace(new, self._path)  # at no instant is the former one cut short

    def add(self, entry: Mapping[str, object]) -> None:
        """Note something down; it survives the process, and if the machine fails, what it says is checked by hashes."""
        self._stream.write(json.dumps(entry) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Remove the file."""
        self._stream.close()
        self._path.unlink(missing_ok=True)

    def _entries(self) -> list[dict[str, Any]]:
        entries = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                entries.append(dict(json.loads(line)))
            except ValueError:
                break
        return entries
