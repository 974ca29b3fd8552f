"""SHA-256 of files, computed beside other work."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from ..errors import CheckpointError

_CHUNK_BYTES = 1 << 20  # stays in a processor's cache between reading and hashing


class Hasher:
    """A few threads that hash files while the caller works (hashlib releases the GIL).

    Leaving the ``with`` block drops what has not been asked for, so an error or Ctrl-C never waits for a large file.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1), thread_name_prefix="freemerge-sha256")
        self._stop = threading.Event()
        self.seconds = 0.0  #: that its threads have worked

    def submit(self, path: Path, *, flush: bool = False) -> Future[str]:
        """Start hashing ``path``; the future gives the hex digest, or a CheckpointError if the file cannot be read.

        With ``flush`` the file reaches the disk first; that fails as an OSError, for the writer to report.
        """
        return self._pool.submit(self._hash, path, flush)

    def submit_all(self, paths: Iterable[Path]) -> dict[Path, Future[str]]:
        """:meth:`submit` for each path."""
        return {path: self.submit(path) for path in paths}

    def close(self) -> None:
        """Stop now; futures that are not done fail."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _hash(self, path: Path, flush: bool) -> str:
        if flush:
            _flush(path)
        begin = time.perf_counter()
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        try:
            with open(path, "rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    if self._stop.is_set():
                        raise CheckpointError(f"hashing {path} was cancelled")
                    digest.update(buffer[:count])
        except OSError as error:
            raise CheckpointError(f"cannot hash {path}: {error.strerror}") from error
        self.seconds += time.perf_counter() - begin
        return digest.hexdigest()

    def __enter__(self) -> Hasher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
