"""One output file while it is written: bytes go to their places in the background, and the file's hash follows them."""

from __future__ import annotations

import errno
import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from contextlib import suppress
from functools import partial
from io import RawIOBase
from pathlib import Path

from .disk import Disk, flush_file

_CALL_BYTES = 16 << 20  # of one update of a hash, between which an abort is noticed
_RUN_BYTES = 4 << 20  # small tensors that lie end to end are written together, up to this many bytes
_FLUSH_BYTES = 256 << 20  # written bytes that are sent to the disk while the next ones are computed


class Stopped(Exception):
    """Work in the background that was dropped because the output is given up."""


class Background:
    """Three threads that write, hash and flush one after the other, and a limit on the bytes that wait for them.

    The first error of any of them is kept for :meth:`check`; what comes after it is dropped.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._waiting = limit, 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self.disk = Disk(self.check)  #: for the thread that writes
        self.seconds = dict.fromkeys(("write", "hash", "flush"), 0.0)  #: that each stage has worked
        self.waited = 0.0  #: seconds that the caller has waited for them
        self._threads = {
            stage: ThreadPoolExecutor(1, thread_name_prefix=f"freemerge-{stage}") for stage in self.seconds
        }

    def take(self, nbytes: int) -> None:
        """Wait until so many bytes may be handed over: more than the limit only if nothing else waits."""
        begin = time.perf_counter()
        with self._changed:
            self._changed.wait_for(
                lambda: self._error is not None or not self._waiting or self._waiting + nbytes <= self._limit
            )
            self._waiting += nbytes
        self.waited += time.perf_counter() - begin
        self.check()

    def settle(self) -> None:
        """Wait until no more than the limit waits, as it does where one piece exceeds it."""
        begin = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._waiting <= self._limit)
        self.waited += time.perf_counter() - begin
        self.check()

    def give(self, nbytes: int) -> None:
        """So many bytes are done with."""
        with self._changed:
            self._waiting -= nbytes
            self._changed.notify_all()

    def run(self, stage: str, work: Callable[[], None]) -> None:
        """Do something on the thread of a stage, after everything that was given to it before."""

        def guarded() -> None:
            if self._error is None:
                begin = time.perf_counter()
                try:
                    work()
                except BaseException as error:
                    self.stop(error)
                self.seconds[stage] += time.perf_counter() - begin

        self._threads[stage].submit(guarded)

    def stop(self, error: BaseException) -> None:
        """Drop what has not begun."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def check(self) -> None:
        """Raise the first error, if there was one; long work calls this now and then."""
        if self._error is not None:
            raise self._error

    def result(self, future: Future[str]) -> str:
        """The result of a future that a stage sets; raises the first error instead, if there was one."""
        begin = time.perf_counter()
        while not future.done():
            self.check()
            with suppress(TimeoutError):
                future.result(timeout=0.05)
        self.waited += time.perf_counter() - begin
        return future.result()

    def close(self) -> None:
        """Stop now."""
        self.stop(Stopped())
        for thread in self._threads.values():
            thread.shutdown(wait=True, cancel_futures=True)


class ShardFile:
    """A file of known size, written piece by piece in any order. Pieces are hashed in the order of the file.

    One that comes early is read back when its turn to be hashed has come.

    Args:
        path: the file, which is made, or was made by a killed run.
        header: its first bytes.
        nbytes: its size.
        background: the threads that do the work.
        hashed: called on one of them with the length of a beginning of the file that is whole, and its SHA-256.
        whole: such calls of an earlier run. What of them is still true is not written again.

    Attributes:
        whole: length of the beginning that an earlier run wrote; 0 if none did.
    """

    def __init__(
        self,
        path: Path,
        header: bytes,
        nbytes: int,
        background: Background,
        hashed: Callable[[int, str], None],
        whole: Mapping[int, str],
    ) -> None:
        self.path, self.nbytes = path, nbytes
        self.sha256: Future[str] = Future()  #: of the whole file, when it has reached the disk
        self._background = background
        self._run: list[memoryview] = []  # pieces that lie end to end, not handed over yet
        self._start = self._end = 0
        self._tell = hashed
        self._early: dict[int, int] = {}
        self._digest, self.whole = self._verified(whole)
        self._hashed = self._flushed = self.whole
        if not self.whole:
            self._digest, self._hashed = hashlib.sha256(header), len(header)
            with open(path, "wb") as stream:
                stream.write(header)
                stream.truncate(nbytes)
        if self._hashed == nbytes:
            background.run("flush", self._finish)

    def write(self, offset: int, piece: memoryview) -> None:
        """Write a piece, which must not change any more; raises what went wrong with an earlier one."""
        if not piece:
            return
        if self._run and (offset != self._end or self._end - self._start + len(piece) > _RUN_BYTES):
            self.hand_over()
        if not self._run:
            self._start = self._end = offset
        self._run.append(piece)
        self._end += len(piece)
        if self._end - self._start >= _RUN_BYTES:
            self.hand_over()

    def hand_over(self) -> None:
        """Let the pieces that were collected be written."""
        run, start, nbytes = self._run, self._start, self._end - self._start
        self._run = []
        if run:
            self._background.take(nbytes)
            self._background.run("write", lambda: self._write(start, run))

    def _write(self, start: int, run: Sequence[memoryview]) -> None:
        data = run[0] if len(run) == 1 else memoryview(b"".join(run))
        self._background.disk.write(self.path, start, data)
        self._background.run("hash", lambda: self._hash(start, data))

    def _hash(self, start: int, data: memoryview) -> None:
        if start == self._hashed:
            for begin in range(0, len(data), _CALL_BYTES):
                self._background.check()
                self._digest.update(data[begin : begin + _CALL_BYTES])
            self._hashed += len(data)
        else:
            self._early[start] = len(data)
        # As a task of its own, which begins when this one has let go of the memory.
        self._background.run("hash", partial(self._background.give, len(data)))
        while self._hashed in self._early:
            self._hash_again(self._early.pop(self._hashed))
        if self._hashed > start:
            self._tell(self._hashed, self._digest.copy().hexdigest())
        if self._hashed == self.nbytes:
            self._background.run("flush", self._finish)
        elif self._hashed - self._flushed >= _FLUSH_BYTES:
            self._flushed = self._hashed
            self._background.run("flush", partial(flush_file, self.path))

    def _verified(self, whole: Mapping[int, str]) -> tuple[hashlib._Hash, int]:
        """The longest beginning of the file that has the hash it had, and the state of that hash."""
        best, length = hashlib.sha256(), 0
        if not self.path.is_file() or self.path.stat().st_size != self.nbytes:
            return best, length
        digest = hashlib.sha256()
        with open(self.path, "rb", buffering=0) as stream:
            for position in sorted(whole):
                while stream.tell() < position:
                    digest.update(_read(stream, position - stream.tell(), self.path))
                if digest.hexdigest() != whole[position]:
                    break
                best, length = digest.copy(), position
        return best, length

    def _hash_again(self, nbytes: int) -> None:
        with open(self.path, "rb", buffering=0) as stream:
            stream.seek(self._hashed)
            end = self._hashed + nbytes
            while self._hashed < end:
                self._background.check()
                data = _read(stream, end - self._hashed, self.path)
                self._digest.update(data)
                self._hashed += len(data)

    def _finish(self) -> None:
        flush_file(self.path)
        self.sha256.set_result(self._digest.hexdigest())


def _read(stream: RawIOBase, nbytes: int, path: Path) -> bytes:
    """Some of the next bytes, of which there must be so many."""
    data = stream.read(min(_CALL_BYTES, nbytes))
    if not data:
        raise OSError(errno.EIO, "the file is shorter than what was written to it", str(path))
    return data
