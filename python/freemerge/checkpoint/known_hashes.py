"""The SHA-256 of files that were hashed before and have not changed since, kept between runs in the user's cache.

A file is known by device, inode, size and the times of its last change, of which one (``ctime``) cannot be set, as
version control knows its working tree. One small file for each, named by these and holding the digest; what cannot be
read or written there is as if it were not known.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

_SETTLED_NS = 60 * 10**9  # two changes within a clock's tick, or through a mapping, may look like one for so long
_MOST = 4096  # files, of which each takes a block of the disk
_DIGEST = re.compile(r"[0-9a-f]{64}")


def key(file: Path) -> str | None:
    """What a file in its present state is known by; None if it cannot be told from a later state, or is not there."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < _SETTLED_NS:
        return None
    state = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return hashlib.sha256(repr(state).encode()).hexdigest()


def recall(known_by: str | None) -> str | None:
    """The digest of the file with that :func:`key`, if it was ever remembered."""
    folder = _folder()
    if folder is None or known_by is None:
        return None
    try:
        digest = (folder / known_by).read_text("ascii")
    except (OSError, ValueError):
        return None
    return digest if _DIGEST.fullmatch(digest) else None


def remember(digests: Mapping[str, str]) -> None:
    """Keep the digests of files that had these keys before they were hashed, and still have them."""
    folder = _folder()
    if folder is None or not digests:
        return
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for known_by, digest in digests.items():
            with NamedTemporaryFile("w", encoding="ascii", dir=folder, prefix=".", delete=False) as stream:
                stream.write(digest)
            os.replace(stream.name, folder / known_by)
        for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)[:-_MOST]:
            path.unlink()


def _folder() -> Path | None:
    """``FREEMERGE_CACHE``, nothing if that is empty, else a folder where the user's caches are."""
    chosen = os.environ.get("FREEMERGE_CACHE")
    if chosen is not None:
        return Path(chosen) / "sha256" if chosen else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "freemerge" / "sha256"
    except RuntimeError:  # the user has no home
        return None
