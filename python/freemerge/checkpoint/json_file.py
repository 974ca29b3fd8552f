"""JSON in files: read, which may be of any size and hold anything, and written."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ..errors import CheckpointError
from .regular_file import open_regular

MAX_CONFIG_BYTES = 10_000_000


def read_json(
    path: Path, most: int = MAX_CONFIG_BYTES, hook: Callable[[list[tuple[str, object]]], object] | None = None
) -> object:
    """What a file of at most so many bytes holds, its objects made by a ``hook``; CheckpointError if it is no JSON."""
    with open(open_regular(path), "rb") as stream:
        if os.fstat(stream.fileno()).st_size > most:
            raise CheckpointError(f"{path}: larger than {most} bytes")
        raw = stream.read()
    try:
        return json.loads(raw, object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object whose keys differ: two readers could disagree about which duplicate counts."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError(f"key {Counter(name for name, _ in pairs).most_common(1)[0][0]!r} appears twice")
    "".join(result).encode()  # a lone surrogate is a ValueError too: it could not be written back
    return result


def write_json(path: Path, content: object) -> None:
    """Readable JSON with the keys in the given order."""
    # JSON has names of files that are no UTF-8 as escapes, which read back.
    path.write_text(_indented(content) + "\n", encoding="utf-8", errors="backslashreplace")


_encode = json.JSONEncoder(ensure_ascii=False).encode


def _indented(value: object, margin: str = "\n") -> str:
    """As json.dumps with an indent of 2, which takes several times as long, and a manifest lists every tensor.

    Keys are strings.
    """
    inner = f"{margin}  "
    if isinstance(value, dict) and value:
        return (
            f"{{{inner}{f',{inner}'.join([f'{_encode(k)}: {_indented(v, inner)}' for k, v in value.items()])}{margin}}}"
        )
    if isinstance(value, list | tuple) and value:
        return f"[{inner}{f',{inner}'.join([_indented(item, inner) for item in value])}{margin}]"
    return _encode(value)
