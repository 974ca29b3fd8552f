"""Locks that tell a living writer from one that was killed, since the system lets go of them with it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from pathlib import Path

# What a symbolic link leads to is not ours.
_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
_SUFFIX = "-lock"
_WORKERS = 1 << 20  # more than there ever are


class DirectoryLock:
    """A lock on a directory itself. FileNotFoundError if there is none."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fd = os.open(directory, _DIRECTORY)

    def take(self) -> bool | None:
        """Lock it for this writer alone; False if another has it, None where the file system cannot."""
        import fcntl

        return self._flock(fcntl.LOCK_EX)

    def share(self, rank: int) -> None:
        """Hold it together with the other workers; the first of them has taken it."""
        import fcntl

        self._flock(fcntl.LOCK_SH)

    def in_place(self) -> bool:
        """Whether the directory is still where it was: another writer may have removed it, and made a new one."""
        return self.has_moved_to(self._directory)

    def has_moved_to(self, out: Path) -> bool:
        """Whether the directory is there now."""
        try:
            return os.path.samestat(os.fstat(self._fd), out.lstat())
        except FileNotFoundError:
            return False

    @contextmanager
    def covering(self, old: Path) -> Iterator[None]:
        """Keep others from an old output, which will lie where they look for a directory that nobody uses."""
        with closing(DirectoryLock(old)) as lock:
            lock.take()
            yield

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)

    def _flock(self, kind: int) -> bool | None:
        import fcntl

        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except OSError as error:
            return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
        return True


class FileLock:
    """A lock on a file beside a directory: Windows opens no directories, and moves none that has an open file in it.

    Bytes of the file are locked, as Windows shares no lock: one for each worker, and a writer alone has them all. An
    old output that is being replaced has the same lock.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory.with_name(directory.name.removesuffix("-old") + _SUFFIX)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT)
        self._held = False

    def take(self) -> bool | None:
        """As of :class:`DirectoryLock`; None where the system has no such locks."""
        first = self._lock(0, 1)
        others = self._lock(1, _WORKERS) if first else first
        if first and not others:
            self._lock(0, 1, release=True)
        self._held = others is True
        return others

    def share(self, rank: int) -> None:
        """Each worker keeps a byte; the first one has that already."""
        self._held = bool(self._lock(rank, 1)) if rank else self._lock(1, _WORKERS, release=True) is not None

    def in_place(self) -> bool:
        """Whether the directory is there; no other writer makes one while this one has the lock."""
        return self._directory.is_dir() and not self._directory.is_symlink()

    def has_moved_to(self, out: Path) -> bool:
        """Whether the directory is there now, as far as names tell."""
        return not self.in_place() and out.is_dir()

    def covering(self, old: Path) -> AbstractContextManager[None]:
        """The old output has the lock already."""
        return nullcontext()

    def close(self) -> None:
        """Let go of it, and remove the file; where another worker has it open, Windows leaves that to him."""
        os.close(self._fd)
        if self._held:
            with suppress(OSError):
                self._path.unlink()

    def _lock(self, begin: int, count: int, *, release: bool = False) -> bool | None:
        try:
            import msvcrt
        except ImportError:
            return None
        os.lseek(self._fd, begin, os.SEEK_SET)
        try:
            msvcrt.locking(self._fd, msvcrt.LK_UNLCK if release else msvcrt.LK_NBLCK, count)  # type: ignore[attr-defined, unused-ignore]
        except OSError as error:
            return False if error.errno in (errno.EACCES, errno.EDEADLK) else None
        return True


def lock_of(directory: Path) -> DirectoryLock | FileLock:
    """The lock of a hidden directory, as the system has it; not taken yet."""
    try:
        import fcntl  # noqa: F401
    except ImportError:
        return FileLock(directory)
    return DirectoryLock(directory)


def remove_unused_files(folder: Path, mark: str) -> None:
    """Remove the files of locks whose writers were killed after the directory had got its place."""
    for path in folder.glob(f".*{mark}{_SUFFIX}"):
        lock = FileLock(path.with_name(path.name.removesuffix(_SUFFIX)))
        lock.take()
        lock.close()
