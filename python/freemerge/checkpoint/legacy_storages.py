"""How large a torch file from before 1.6 says that its tensors are: torch makes them before it reads what they hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of such a file; a version, the system's sizes and the content follow


class _Inert:
    """What stands for everything in the pickle: it does nothing, whatever is done with it."""

    def __new__(cls, *arguments: Any, **options: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **options: Any) -> None: ...

    def __call__(self, *arguments: Any, **options: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def add(self, item: Any) -> None: ...


class _Sizes(pickle._Unpickler):
    """Notes down the entries of each storage. Nothing is imported or called.

    Python's own unpickler, as the one in C lets a file of a few bytes fill the memory.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.entries: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        return _Inert

    def persistent_load(self, pid: Any) -> _Inert:
        _, _, key, _, entries, *_ = pid  # ("storage", type, key, location, entries, view)
        self.entries[str(key)] = int(entries)
        return _Inert()


def stored_entries(path: Path) -> int:
    """Entries of all storages together; 0 for what is no such file. Raises whatever damage lets the unpickler raise."""
    with open(path, "rb") as stream:
        try:
            if _Sizes(stream).load() != _MAGIC:
                return 0
        except Exception:
            return 0
        for _ in ("version", "sizes"):
            _Sizes(stream).load()
        content = _Sizes(stream)
        content.load()
        return sum(content.entries.values())
