"""SHA-256 of files, computed beside other work."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from .. import _core
from ..errors import CheckpointError
from .disk import flush_file

_CHUNK_BYTES = 1 << 19  # stays in a processor's cache between reading and hashing
_BEGIN = "6a09e667bb67ae853c6ef372a54ff53a510e527f9b05688c1f83d9ab5be0cd19"  # the state of SHA-256 before any data
Chunk = npt.NDArray[np.uint8]


class Hasher:
    """A few threads that hash files while the caller works, on processors that can two files each at once.

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

        def work() -> str:
            if flush:
                flush_file(path)
            return self._hash([path])[0]

        return self._pool.submit(work)

    def submit_all(self, paths: Iterable[Path]) -> dict[Path, Callable[[], str]]:
        """:meth:`submit` for all paths together; for each what waits for its digest."""
        ordered = sorted(paths, key=_size, reverse=True)  # those of one size side by side
        step = 2 if _core.has_sha256() else 1
        groups = [ordered[i : i + step] for i in range(0, len(ordered), step)]
        if step == 2 and len(groups) > 1 and len(groups[-1]) == 1:
            groups[-2:] = [groups[-2] + groups[-1]]  # three take turns, so that none is left to be hashed alone
        digests: dict[Path, Callable[[], str]] = {}
        for group in groups:
            future = self._pool.submit(self._hash, group)
            digests |= {path: partial(_nth, future, i) for i, path in enumerate(group)}
        return digests

    def close(self) -> None:
        """Stop now; futures that are not done fail."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _hash(self, paths: Sequence[Path]) -> list[str]:
        begin = time.perf_counter()
        chunks = [self._chunks(path) for path in paths]
        digests = [_of_one(chunks[0])] if len(chunks) == 1 else _of_several(chunks)
        self.seconds += time.perf_counter() - begin
        return digests

    def _chunks(self, path: Path) -> Iterator[Chunk]:
        """The file in equal pieces, each in the place of the one before; the last one is shorter, or empty."""
        buffer = np.empty(_CHUNK_BYTES, dtype=np.uint8)
        count = _CHUNK_BYTES
        try:
            with open(path, "rb", buffering=0) as stream:
                while count == _CHUNK_BYTES:
                    if self._stop.is_set():
                        raise CheckpointError(f"hashing {path} was cancelled")
                    count = 0
                    while count < _CHUNK_BYTES and (more := stream.readinto(buffer[count:].data)):
                        count += more
                    yield buffer[:count]
        except OSError as error:
            raise CheckpointError(f"cannot hash {path}: {error.strerror}") from error

    def __enter__(self) -> Hasher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # reading it will say what is wrong


def _nth(future: Future[list[str]], index: int) -> str:
    return future.result()[index]


def _of_one(chunks: Iterator[Chunk]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk.data)
    return digest.hexdigest()


def _of_several(chunks: Sequence[Iterator[Chunk]]) -> list[str]:
    """The same of several files, two at once while there are two: those of which least has been hashed."""
    states = np.array([[int(_BEGIN[i : i + 8], 16) for i in range(0, 64, 8)]] * len(chunks), dtype=np.uint32)
    lengths, live = [0] * len(chunks), list(range(len(chunks)))
    while live:
        now = {i: next(chunks[i]) for i in sorted(live, key=lengths.__getitem__)[:2]}
        for i, chunk in now.items():
            lengths[i] += len(chunk)
        whole = [i for i in now if len(now[i]) == _CHUNK_BYTES]
        _core.sha256([states[i].ctypes.data for i in whole], [now[i].ctypes.data for i in whole], _CHUNK_BYTES // 64)
        for i in now.keys() - whole:  # its last piece, with what the standard appends
            live.remove(i)
            rest = now[i].tobytes() + b"\x80"
            rest += bytes(-(len(rest) + 8) % 64) + (8 * lengths[i]).to_bytes(8, "big")
            last = np.frombuffer(rest, dtype=np.uint8)
            _core.sha256([states[i].ctypes.data], [last.ctypes.data], len(last) // 64)
    return [state.astype(">u4").tobytes().hex() for state in states]
