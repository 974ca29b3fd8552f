"""Making an output appear all at once: a hidden sibling directory that takes the output's place by renaming."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, RefusedError
from ..workers import ALONE, Workers

MANIFEST = "freemerge.json"
_MARK = ".freemerge-tmp"  # ends the name of a hidden directory; what follows is from the replacement of an old output
_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h


def target(out: str | os.PathLike[str]) -> Path:
    """The path of an output, links followed; RefusedError for the current directory and what holds it."""
    path, here = Path(out).resolve(), Path.cwd()
    if not os.fspath(out):
        raise RefusedError("the name of the output is empty")
    if path == here or path in here.parents:
        raise RefusedError(f"{out} is {'' if path == here else 'above '}the current directory; name a new one")
    return path


def check_target(out: Path, *, single_file: bool, force: bool) -> None:
    """Refuse an output path that holds something, before any work.

    ``force`` replaces only what was clearly meant: a file by a file, or a directory that has a freemerge manifest by a
    directory. Replacing a directory deletes all of it.
    """
    if not out.exists():
        return
    if single_file != out.is_file():
        raise RefusedError(f"{out} exists and is not a {'file' if single_file else 'directory'}")
    if not single_file and not any(out.iterdir()):
        return
    if not force:
        raise RefusedError(
            f"{out} exists{'' if single_file else ' and is not empty'}; use --force (force=True) to replace it"
        )
    if not single_file and not (out / MANIFEST).is_file():
        raise RefusedError(f"{out} was not written by freemerge (no {MANIFEST}), so even force does not delete it")


class Staging:
    """A hidden directory beside ``out`` that becomes ``out``, or supplies the file ``out``, when it is complete.

    A lock on the directory tells a running writer from one that was killed: a second writer of the same output is
    refused while the first lives, and removes what it left behind otherwise, or goes on with it (``resume``). Several
    workers share one: the first of them makes and publishes it, and it is in use while one of them lives.

    Attributes:
        directory: the hidden directory.
        resumed: whether it was left behind by a killed writer.
    """

    def __init__(self, out: Path, *, resume: bool = False, workers: Workers = ALONE) -> None:
        self._out, self._workers = out, workers
        self._made: list[Path] = []
        self._lock = -1
        self.directory = hidden(out)
        self.resumed = workers.first(lambda: self._begin(resume))
        if workers.rank:
            self._follow()

    def publish(self, file: str | None, *, force: bool) -> None:
        """Put the directory, or the one ``file`` in it, at ``out``: at any instant ``out`` is the old or the new one.

        The file system must already hold every file's data. What was at ``out`` is deleted last.
        """
        self._workers.first(lambda: self._publish(file, force=force))
        self.discard()

    def _publish(self, file: str | None, *, force: bool) -> None:
        check_target(self._out, single_file=file is not None, force=force)
        try:
            os.fsync(self._lock)
            if file is not None:
                os.replace(self.directory / file, self._out)
            elif not self._out.exists() or not any(self._out.iterdir()):
                os.rename(self.directory, self._out)
            else:
                self._exchange()
            self._made = []
            parent = os.open(self._out.parent, os.O_RDONLY)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)
        except OSError as error:
            raise cannot_write(self._out, error) from error

    def discard(self) -> None:
        """Remove the hidden directory, whatever it holds; safe to call twice. Only the first worker removes it."""
        if self._lock >= 0:
            # Another writer may have made a new one.
            ours = os.path.samestat(os.fstat(self._lock), _stat(self.directory))
            if ours and self._workers.rank == 0:
                shutil.rmtree(self.directory, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1
        self._remove_made_parents()

    @property
    def held(self) -> bool:
        """Whether the hidden directory is this writer's, and not published, discarded or left."""
        return self._lock >= 0

    def leave(self) -> None:
        """Let go of the hidden directory and leave it to another writer."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

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
            _lock(self._lock, shared=True)
        return resumed

    def _follow(self) -> None:
        """Share what the first worker has claimed."""
        try:
            self._lock = os.open(self.directory, _DIRECTORY)
        except OSError as error:
            raise CheckpointError(
                f"worker {self._workers.rank} cannot open {self.directory}, which the first worker has made "
                f"({error.strerror}); the output must be on a file system that all workers share"
            ) from error
        _lock(self._lock, shared=True)

    def _exchange(self) -> None:
        """Replace an old output, which is then deleted."""
        old = os.open(self._out, _DIRECTORY)
        try:
            _lock(old)  # it will lie where the next writer looks for a directory that nobody uses
            if _exchange(self.directory, self._out):
                shutil.rmtree(self.directory, ignore_errors=True)
            else:
                self._swap_in_two_steps()
        finally:
            os.close(old)

    def _claim(self, resume: bool) -> tuple[int, bool]:
        """The lock on a directory that is ours alone, and whether it was there already."""
        while True:
            made = True
            try:
                try:
                    self.directory.mkdir()
                except FileExistsError:
                    made = False
                fd = self._locked(made=made, resume=resume)
            except KeyboardInterrupt:  # a signal, perhaps before mkdir: that of a living writer is not empty
                with suppress(OSError):
                    if made:
                        self.directory.rmdir()
                raise
            if fd is not None:
                return fd, not made

    def _locked(self, *, made: bool, resume: bool) -> int | None:
        """The lock on a directory that was ``made``, or found and is to be resumed; None if another has to be made."""
        try:
            fd = os.open(self.directory, _DIRECTORY)
        except FileNotFoundError:  # another writer finished just now
            return None
        free = _lock(fd)
        if not made and free is not True:
            os.close(fd)
            advice = f"remove {self.directory} if no run is writing it"
            why = "another run is writing it" if free is False else advice
            raise RefusedError(f"{self._out} cannot be written now: {why}")
        ours = os.path.samestat(os.fstat(fd), _stat(self.directory))
        if ours and (made or resume):
            return fd
        if ours:
            shutil.rmtree(self.directory, ignore_errors=True)
        os.close(fd)  # also if another writer has removed it meanwhile
        return None

    def _swap_in_two_steps(self) -> None:
        # Without an atomic exchange (not Linux, or an old file system) there is an instant in which a kill leaves no
        # output; even then the old one is whole, under the hidden name.
        old = self.directory.with_name(self.directory.name + "-old")
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


def cannot_write(out: Path, error: OSError) -> CheckpointError:
    """The error for a failed write below ``out``."""
    hint = "; the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return CheckpointError(f"cannot write {out}: {error.strerror}{hint}; nothing was changed")


def _missing_parents(out: Path) -> list[Path]:
    return [parent for parent in out.parents if not parent.exists()]


def hidden(out: Path) -> Path:
    """The hidden directory of an output."""
    return out.with_name(f".{out.name}{_MARK}")


@dataclass(frozen=True)
class Leftover:
    """A hidden directory that was found: of a run that lives, or left behind by one that was killed.

    ``holds_output``: it is a whole output that was being replaced, and the only one there is.
    """

    path: Path
    nbytes: int
    alive: bool
    holds_output: bool


def clean(folder: str | os.PathLike[str], *, remove: bool = True) -> list[Leftover]:
    """Find the hidden directories of outputs in a folder, and remove those of runs that were killed.

    Those of living runs stay, as do those on a file system that cannot tell them, and whole outputs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a directory")
    return list(_cleaned(folder, remove))


def _cleaned(folder: Path, remove: bool) -> Iterator[Leftover]:
    for path in sorted(folder.iterdir()):
        name, mark, rest = path.name.rpartition(_MARK)
        if not name.startswith(".") or not mark or path.is_symlink() or not path.is_dir():
            continue
        fd = os.open(path, _DIRECTORY)
        try:
            dead = _lock(fd) is True
            whole = rest.endswith("-old") and not (folder / name[1:]).exists()
            nbytes = sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file())
            yield Leftover(path, nbytes, not dead, whole)
            if dead and remove and not whole:
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(fd)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        return os.stat_result([0] * 10)


def _lock(fd: int, *, shared: bool = False) -> bool | None:
    """Lock a directory, alone or with others that share it; False if another process has, None where the system or the
    file system cannot."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories atomically; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))
