"""Bytes to their places in a file, and flushing; large pieces go to the disk past the system's cache where they can."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

_WRITE = os.O_WRONLY | getattr(os, "O_BINARY", 0)
_DIRECT = getattr(os, "O_DIRECT", 0)  # on Linux
_BLOCK = 4096  # bytes: addresses, lengths and places of direct writes are multiples, whatever the disk asks for
_CALL_BYTES = 8 << 20  # of one system call, between which an abort is noticed
_LEAST_PIECE = 1 << 20
_LEAST_FILE = 256 << 20  # smaller files stay in the cache for the next who reads them


class Disk:
    """Writes pieces of files, for one thread.

    A write through the cache copies into fresh pages, which took more of a processor's time than the filter (see
    docs/engine.md), and drives the inputs out of the cache. A direct one takes whole blocks only: what is left of a
    piece before the first and after the last of them goes through the cache.

    Args:
        check: called before each system call; raises to stop.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self._buffer: mmap.mmap | None = None  # begins at a block, as direct writes have to
        self._direct = bool(_DIRECT)

    def write(self, path: Path, start: int, data: memoryview) -> None:
        """Write ``data`` [bytes] at ``start`` of a file that has its size already."""
        begin, end = 0, 0  # of what is written directly
        if self._direct and len(data) >= _LEAST_PIECE and _is_for_disk(path):
            begin = -start % _BLOCK
            end = begin + self._write_blocks(path, start + begin, data[begin:])
        fd = os.open(path, _WRITE)
        try:
            for first, last in ((0, begin), (end, len(data))):
                os.lseek(fd, start + first, os.SEEK_SET)
                while first < last:
                    self._check()
                    first += os.write(fd, data[first : min(last, first + _CALL_BYTES)])
        finally:
            os.close(fd)

    def _write_blocks(self, path: Path, start: int, data: memoryview) -> int:
        """Write as many whole blocks as the file system takes directly, and return their bytes."""
        try:
            fd = os.open(path, _WRITE | _DIRECT)
        except OSError:
            self._direct = False  # not on this file system; what else is wrong, the next try tells
            return 0
        done, whole = 0, len(data) // _BLOCK * _BLOCK
        try:
            while self._direct and done < whole:
                self._check()
                count = min(_CALL_BYTES, whole - done)
                written = os.pwrite(fd, self._aligned(data[done : done + count]), start + done)
                done += written // _BLOCK * _BLOCK
                self._direct = written == count
        except OSError as error:
            if error.errno != errno.EINVAL:  # which says that blocks are larger here
                raise
            self._direct = False
        finally:
            os.close(fd)
        return done

    def _aligned(self, data: memoryview) -> memoryview:
        """A copy that begins at a block; numpy lets other threads run meanwhile."""
        if self._buffer is None:
            self._buffer = mmap.mmap(-1, _CALL_BYTES)
        copy = np.frombuffer(self._buffer, dtype=np.uint8, count=len(data))
        np.copyto(copy, np.frombuffer(data, dtype=np.uint8))
        return copy.data


def _is_for_disk(path: Path) -> bool:
    """Whether a file is large, and on a block device: those of networks are faster where the system gathers writes."""
    about = path.stat()
    return about.st_size >= _LEAST_FILE and os.major(about.st_dev) > 0


def flush_file(path: Path) -> None:
    """Have the content of a file on the disk."""
    try:
        fd = os.open(path, os.O_RDWR)  # Windows flushes nothing that is open for reading only
    except PermissionError:
        fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def flush_directory(path: Path) -> None:
    """Have the names in a directory on the disk; Windows opens no directories, and sees to that itself."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except PermissionError:
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
