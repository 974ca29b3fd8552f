"""Making an output appear all at once: a hidden sibling directory that takes the output's place by renaming."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..errors import CheckpointError, FreemergeError, RefusedError, WorkerError
from ..workers import ALONE, Workers
from .disk import flush_directory
from .locks import DirectoryLock, FileLock, lock_of
from .target import Foreign, cannot_write, check_target, flush_place

MARK = ".freemerge-tmp"  # ends the name of a hidden directory; what follows is from the replacement of an old output
SEEN_WITHIN = 75.0  # seconds: NFS believes for up to 60 that a name is missing
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h


class Staging:
    """A hidden directory beside ``out`` that becomes ``out``, or supplies the file ``out``, when it is complete.

    A lock (:mod:`freemerge.checkpoint.locks`) tells a running writer from one that was killed: a second writer of the
    same output is refused while the first lives, and removes what it left behind otherwise, or goes on with it
    (``resume``). Several workers share one: the first of them makes and publishes it, and it is in use while one of
    them lives.

    Attributes:
        directory: the hidden directory.
        resumed: whether it was left behind by a killed writer.
    """

    def __init__(self, out: Path, *, resume: bool = False, workers: Workers = ALONE) -> None:
        self._out, self._workers = out, workers
        self._made: list[Path] = []
        self._lock: DirectoryLock | FileLock | None = None
        self.directory = hidden(out)
        self.resumed = workers.first(lambda: self._begin(resume))
        if workers.rank:
            self._follow()

    def publish(
        self,
        file: str | None,
        *,
        force: bool,
        foreign: Foreign,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Put the directory, or the one ``file`` in it, at ``out``: at any instant ``out`` is the old or the new one.

        The file system must already hold every file's data. What was at ``out`` is checked again (:func:`check_target`)
        and deleted last. ``ready`` is called when nothing but the renaming is left to do.
        """
        try:
            self._workers.first(lambda: self._publish(file, force=force, foreign=foreign, ready=ready))
        except FreemergeError as error:
            if not self._is_published(file):
                raise
            self.end()
            if not isinstance(error, WorkerError):
                raise
            raise WorkerError(f"{self._out} was written, but another worker has ended meanwhile") from error
        self.end()

    def _is_published(self, file: str | None) -> bool:
        assert self._lock is not None
        if file is None:
            return self._lock.has_moved_to(self._out)
        return self._lock.in_place() and not (self.directory / file).exists()

    def _publish(self, file: str | None, *, force: bool, foreign: Foreign, ready: Callable[[], None]) -> None:
        check_target(self._out, single_file=file is not None, force=force, foreign=foreign)
        try:
            for folder, _, _ in os.walk(self.directory):
                flush_directory(Path(folder))
            ready()
            if file is not None:
                os.replace(self.directory / file, self._out)
            elif not self._out.exists() or not any(self._out.iterdir()):
                self._rename()
            else:
                self._exchange()
        except OSError as error:
            raise cannot_write(self._out, error) from error
        made, self._made = self._made, []
        flush_place(self._out, [self._out.parent, *(parent.parent for parent in made)])

    def end(self, *, keep: bool = False) -> Path | None:
        """Let go of the hidden directory, and remove it, whatever it holds, unless it is to ``keep``: for another
        writer, to whom its path is returned if it has not been published. Safe to call twice.

        Only the first worker removes it.
        """
        kept = None
        if self._lock is not None:
            if self._lock.in_place():
                kept = self.directory if keep else None
                if not keep and self._workers.rank == 0:
                    shutil.rmtree(self.directory, ignore_errors=True)
            self._lock.close()
            self._lock = None
        if not keep:
            self._remove_made_parents()
        return kept

    def _begin(self, resume: bool) -> bool:
        """Claim the hidden directory; whether a killed writer has left it behind."""
        self._made = _missing_parents(self._out)
        try:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._lock, resumed = self._claim(resume)
        except OSError as error:
            self._remove_made_parents()
            raise cannot_write(self._out, error) from error
        if self._workers.size > 1:
            self._lock.share(0)
        return resumed

    def _follow(self) -> None:
        """Share what the first worker has claimed, as soon as it is seen here.

        A network's file system may remember for some time that there was no such name, until a directory is listed.
        """
        begin = time.monotonic()
        while self._lock is None:
            for folder in reversed(self.directory.parents):
                with suppress(OSError), os.scandir(folder) as entries:
                    next(entries, None)
            try:
                self._lock = lock_of(self.directory)
            except OSError as error:
                if time.monotonic() - begin > SEEN_WITHIN:
                    raise CheckpointError(
                        f"worker {self._workers.rank} cannot open {self.directory}, which the first worker has made "
                        f"({error.strerror}); the output must be on a file system that all workers share"
                    ) from error
                time.sleep(0.2)
        self._lock.share(self._workers.rank)

    def _rename(self) -> None:
        """Become an output where there is none, or an empty directory."""
        try:
            os.rename(self.directory, self._out)
        except FileExistsError:  # Windows replaces no directory, not even an empty one
            self._out.rmdir()
            os.rename(self.directory, self._out)

    def _exchange(self) -> None:
        """Replace an old output, which is then deleted."""
        assert self._lock is not None
        with self._lock.covering(self._out):
            if _exchange(self.directory, self._out):
                shutil.rmtree(self.directory, ignore_errors=True)
            else:
                self._swap_in_two_steps()

    def _claim(self, resume: bool) -> tuple[DirectoryLock | FileLock, bool]:
        """The lock on a directory that is ours alone, and whether it was there already."""
        while True:
            made = True
            try:
                try:
                    self.directory.mkdir()
                except FileExistsError:
                    made = False
                    self._refuse_foreign()
                lock = self._locked(made=made, resume=resume)
            except KeyboardInterrupt:  # a signal, perhaps before mkdir: that of a living writer is not empty
                with suppress(OSError):
                    if made:
                        self.directory.rmdir()
                raise
            if lock is not None:
                return lock, not made

    def _refuse_foreign(self) -> None:
        """RefusedError for what is no directory of its own: what a link leads to would be deleted."""
        with suppress(FileNotFoundError):
            if not stat.S_ISDIR(self.directory.lstat().st_mode):
                what = f"{self.directory} is in the way, which is no directory"
                raise RefusedError(f"{self._out} cannot be written now: {what}; remove it")

    def _locked(self, *, made: bool, resume: bool) -> DirectoryLock | FileLock | None:
        """The lock on a directory that was ``made``, or found and is to be resumed; None if another has to be made."""
        try:
            lock = lock_of(self.directory)
        except FileNotFoundError:  # another writer finished just now
            return None
        free = lock.take()
        if free is False and made:  # another writer took it for one left behind
            lock.close()
            return None
        if not made and free is not True:
            lock.close()
            advice = f"remove {self.directory} if no run is writing it"
            why = "another run is writing it" if free is False else advice
            raise RefusedError(f"{self._out} cannot be written now: {why}")
        ours = lock.in_place()
        if ours and (made or resume):
            return lock
        try:
            if ours:
                shutil.rmtree(self.directory)
        except OSError as error:
            left = f"{self.directory}, which a killed run left, cannot be removed ({error.strerror})"
            raise RefusedError(f"{self._out} cannot be written now: {left}") from error
        finally:
            lock.close()  # also if another writer has removed it meanwhile
        return None

    def _swap_in_two_steps(self) -> None:
        # Without an atomic exchange (not Linux, or an old file system) there is an instant in which a kill leaves no
        # output; even then the old one is whole, under the hidden name.
        old = self.directory.with_name(self.directory.name + "-old")
        shutil.rmtree(old, ignore_errors=True)  # of one that was killed: there is an output, so it is not the only one
        os.rename(self._out, old)
        try:
            os.rename(self.directory, self._out)
        except OSError:
            os.rename(old, self._out)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def _remove_made_parents(self) -> None:
        for parent in self._made:
            try:
                parent.rmdir()
            except OSError:
                break
        self._made = []


def hidden(out: Path) -> Path:
    """The hidden directory of an output."""
    return out.with_name(f".{out.name}{MARK}")


def _missing_parents(out: Path) -> list[Path]:
    return [parent for parent in out.parents if not parent.exists()]


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories atomically; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library of all symbols
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))
