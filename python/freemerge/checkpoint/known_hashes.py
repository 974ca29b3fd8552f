"""The SHA-256 of files that were hashed before and have not changed since, kept between runs in the user's cache.

A file is known by device, inode, size and the times of its last change, of which one (``ctime``) cannot be set, as
version control knows its working tree. Where there is no such time, it is not known: on Windows, and on disks that
count whole seconds, as images do that are made to be the same every time. One small file for each, named by these and
holding the digest; what cannot be read or written there is as if it were not known.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import mkstemp

_SECOND = 10**9  # ns
_SETTLED = 60 * _SECOND  # two changes within a clock's tick, or through a mapping of a disk's file, may look like one
_MOST = 4096  # files, of which each takes a block of the disk
_DIGEST = re.compile(r"[0-9a-f]{64}")


def key(file: Path) -> str | None:
    """What a file in its present state is known by; None if it cannot be told from a later state, or is not there."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) >= _SETTLED
    if os.name == "nt" or not settled or status.st_ctime_ns % _SECOND == 0:
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
            with suppress(OSError):
                _write(folder / known_by, digest)
        ours = [path for path in folder.iterdir() if _DIGEST.fullmatch(path.name)]
        for path in sorted(ours, key=lambda path: path.lstat().st_mtime_ns)[:-_MOST]:
            with suppress(OSError):
                path.unlink()


def _write(path: Path, text: str) -> None:
    """At once, or not at all."""
    descriptor, written = mkstemp(dir=path.parent, prefix=".")
    try:
        with open(descriptor, "w", encoding="ascii") as stream:
            stream.write(text)
        os.replace(written, path)
    except BaseException:
        os.unlink(written)
        raise


def _folder() -> Path | None:
    """A folder of ours in ``FREEMERGE_CACHE``, nothing if that is empty, else where the user's caches are."""
    chosen, caches = os.environ.get("FREEMERGE_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if chosen == "":
        return None
    try:
        if chosen is not None:
            place = Path(chosen).expanduser()
        else:
            place = Path(caches) if os.path.isabs(caches) else Path.home() / ".cache"
        return place / "freemerge" / "sha256"
    except RuntimeError:  # the user has no home
        return None
