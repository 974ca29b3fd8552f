"""Making an output appear all at once: a hidden sibling directory that takes the output's place by renaming."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from pathlib import Path

from ..errors import CheckpointError, RefusedError

MANIFEST = "freemerge.json"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h


def check_target(out: Path, *, single_file: bool, force: bool) -> None:
    """Refuse an output path that holds something, before any work.

    ``force`` replaces only what was clearly meant: a file by a file, or a directory that has a freemerge manifest by a
    directory. Replacing a directory deletes all of it, so a mistyped ``-o .`` must not be able to.
    """
    if out == Path():  # an empty name, too
        raise RefusedError("the current directory cannot be the output; name a new one")
    if not out.exists():
        return
    if single_file != out.is_file():
        raise RefusedError(f"{out} exists and is not a {'file' if single_file else 'directory'}")
    if not single_file and not any(out.iterdir()):
        return
    if not force:
        raise RefusedError(f"{out} exists{'' if single_file else ' and is not empty'}; use force to replace it")
    if not single_file and not (out / MANIFEST).is_file():
        raise RefusedError(f"{out} was not written by freemerge (no {MANIFEST}), so even force does not delete it")


class Staging:
    """A hidden directory beside ``out`` that becomes ``out``, or supplies the file ``out``, when it is complete.

    A lock on the directory tells a running writer from one that was killed; leftovers of the latter are removed when
    the next writer of the same output starts.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        prefix = f".{out.name}.freemerge-tmp-"
        self._made = _missing_parents(out)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(out.parent, prefix)
            self.directory = out.parent / (prefix + secrets.token_hex(4))
            self.directory.mkdir()
            self._lock = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
            _try_lock(self._lock)
        except OSError as error:
            self._remove_made_parents()
            raise cannot_write(out, error) from error

    def publish(self, file: str | None, *, force: bool) -> None:
        """Put the directory, or the one ``file`` in it, at ``out``: at any instant ``out`` is the old or the new one.

        The file system must already hold every file's data (see Hasher.submit). What was at ``out`` is deleted last.
        """
        check_target(self._out, single_file=file is not None, force=force)
        try:
            os.fsync(self._lock)
            if file is not None:
                os.replace(self.directory / file, self._out)
            elif not self._out.exists() or not any(self._out.iterdir()):
                os.rename(self.directory, self._out)
            elif not _exchange(self.directory, self._out):
                self._swap_in_two_steps()
            parent = os.open(self._out.parent, os.O_RDONLY)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)
        except OSError as error:
            raise cannot_write(self._out, error) from error
        self._made = []
        self.discard()

    def discard(self) -> None:
        """Remove the hidden directory, whatever it holds; safe to call twice."""
        shutil.rmtree(self.directory, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        self._remove_made_parents()

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


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove leftovers of killed writers. A file system that cannot lock keeps them: they might be in use."""
    for path in parent.iterdir():
        if not path.name.startswith(prefix) or path.name.endswith("-old") or path.is_symlink() or not path.is_dir():
            continue
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if _try_lock(fd):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(fd)


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
