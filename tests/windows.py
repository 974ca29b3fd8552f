"""Windows, as far as Linux can pretend: what it refuses to do with open files and directories, and its locks."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import struct
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_OF_THE_OPEN_FILE = 37  # F_OFD_SETLK: locks of an open file, as those of Windows are, not of a process


def pretend() -> None:
    """For this process, and those that it forks; freemerge must not be imported yet."""
    import fcntl

    control, opened, rename, replace, unlink, fsync = fcntl.fcntl, os.open, os.rename, os.replace, os.unlink, os.fsync
    read_only, kinds = fcntl.F_GETFL, {1: fcntl.F_WRLCK, 0: fcntl.F_UNLCK}

    def open_file(path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path, flags, mode, **options)

    def closed(path: Any) -> None:
        """PermissionError if the file, or one in the directory, is open."""
        for fd in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # that of the list itself
                if Path(os.path.realpath(path)) in (found := Path(f"/proc/self/fd/{fd}").readlink(), *found.parents):
                    raise PermissionError(errno.EACCES, "The process cannot access the file", path)

    def moving(move: Callable[..., None], replaces: bool) -> Callable[[Any, Any], None]:
        def work(source: Any, target: Any) -> None:
            closed(source)
            if os.path.lexists(target):
                if not replaces:
                    raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", target)
                if os.path.isdir(target):
                    raise PermissionError(errno.EACCES, "Access is denied", target)
                closed(target)
            move(source, target)

        return work

    def remove(path: Any, **options: Any) -> None:
        if not options:
            closed(path)
        unlink(path, **options)

    def flush(fd: int) -> None:
        if control(fd, read_only) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(fd)

    def locking(fd: int, mode: int, nbytes: int) -> None:
        region = struct.pack("hhqqi4x", kinds[mode], os.SEEK_SET, os.lseek(fd, 0, os.SEEK_CUR), nbytes, 0)
        try:
            control(fd, _OF_THE_OPEN_FILE, region)
        except OSError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    def no_library(name: object) -> None:
        raise TypeError("argument of type 'NoneType' is not iterable")

    changes: dict[str, object] = {
        "open": open_file, "rename": moving(rename, False), "replace": moving(replace, True), "fsync": flush,
        "unlink": remove,
    }  # fmt: skip
    for name, change in changes.items():
        setattr(os, name, change)
    setattr(ctypes, "CDLL", no_library)  # noqa: B010
    setattr(shutil, "_use_fd_functions", False)  # noqa: B010
    msvcrt: Any = types.ModuleType("msvcrt")
    msvcrt.LK_NBLCK, msvcrt.LK_UNLCK, msvcrt.locking = 1, 0, locking
    hidden: dict[str, Any] = {"fcntl": None, "msvcrt": msvcrt}
    sys.modules.update(hidden)
