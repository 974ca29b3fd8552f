"""Making an output appear all at once: a hidden sibling directory that takes the output's place by renaming."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING

from ..arguments import path_of
from ..errors import ArgumentError, CheckpointError, FreemergeError, RefusedError, WorkerError
from ..workers import ALONE, Workers
from .disk import flush_directory, flush_file
from .locks import DirectoryLock, FileLock, lock_of, remove_unused_files

if TYPE_CHECKING:
    from .reader import Checkpoint

MANIFEST = "freemerge.json"
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".pth.tar", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack"),
    *(".onnx", ".onnx_data", ".tflite", ".npz", ".ot", ".pdparams"),
)
_MARK = ".freemerge-tmp"  # ends the name of a hidden directory; what follows is from the replacement of an old output
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
SEEN_WITHIN = 75.0  # seconds: NFS believes for up to 60 that a name is missing
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h

Foreign = Callable[[Path], str | None]
"""Why a directory is no earlier output of the same kind; None if it is."""


def no_manifest(directory: Path) -> str | None:
    """Merged models are told by their manifest."""
    return None if (directory / MANIFEST).is_file() else f"no {MANIFEST}"


def target(out: str | os.PathLike[str], *, file: str | None = None) -> Path:
    """The path of an output, links followed: a directory, or a file if its name ends in ``file``.

    RefusedError for the current directory and what holds it, ArgumentError for what is no path, or the name of a weight
    file that is none.
    """
    if isinstance(out, str) and not out:
        raise RefusedError("the name of the output is empty")
    path, here = _resolved(out), Path.cwd()
    if path == here or path in here.parents:
        raise RefusedError(f"{out} is {'' if path == here else 'above '}the current directory; name a new one")
    if path.suffix != file:
        refuse_weights(Path(out), "an output is a directory" + (f" or a {file} file" if file is not None else ""))
    return path


def _resolved(out: str | os.PathLike[str]) -> Path:
    """The path of an output, links followed; CheckpointError for one that no file system can have."""
    path = path_of("out", out)
    try:
        path = path.resolve()
        path.exists()
    except OSError as error:
        raise cannot_write(path, error) from error
    except RuntimeError:  # pathlib's, before Python 3.13
        raise CheckpointError(f"cannot write {out}: a symbolic link that leads to itself") from None
    return path


def refuse_weights(out: Path, meant: str) -> None:
    """ArgumentError for an output that has the name of a weight file, and is none: it could take a model's place."""
    if any(path.name.lower().endswith(WEIGHT_SUFFIXES) for path in (out, Path(os.path.realpath(out)))):
        raise ArgumentError(f"out: {out} has the name of a weight file; {meant}")


def write_file(out: Path, content: str | bytes) -> None:
    """Put a file that is no checkpoint at ``out``: at any instant ``out`` is the old or the new one, links followed."""
    whole = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    path = Path(os.path.realpath(out))
    partial = path.with_name(f".{os.getpid()}-{get_ident()}.part")
    try:
        partial.write_bytes(whole)
        if path.exists():
            shutil.copymode(path, partial)
        flush_file(partial)
        partial.replace(path)
    except OSError as error:
        raise cannot_write(out, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    _flush_place(out, [path.parent])


def check_target(out: Path, *, single_file: bool, force: bool, foreign: Foreign = no_manifest) -> None:
    """Refuse an output path that holds something, before any work.

    ``force`` replaces only what was clearly meant: a file by a file, or a directory that is not ``foreign`` by a
    directory. Replacing a directory deletes all of it.
    """
    if not out.exists():
        return
    if single_file != out.is_file():
        raise RefusedError(f"{out} exists and is not a {'file' if single_file else 'directory'}")
    mounted = _mounted(out)
    if out in mounted:
        advice = "name another file" if single_file else f"name a directory inside of it, such as {out / 'merged'}"
        raise RefusedError(f"{out} is a mount point, whose place nothing else can take; {advice}")
    if not single_file and not any(out.iterdir()):
        return
    if not force:
        raise RefusedError(
            f"{out} exists{'' if single_file else ' and is not empty'}; use --force (force=True) to replace it"
        )
    reason = None if single_file else foreign(out)
    if reason is not None:
        raise RefusedError(f"{out} holds something else than this writes ({reason}), so even force does not delete it")
    if mounted:
        raise RefusedError(
            f"{mounted[0]} is mounted inside of {out}, so even force does not delete it; unmount it first"
        )


def _mounted(path: Path) -> list[Path]:
    """What is mounted on a path and below it, in order; with parts of the same file system where the system tells."""
    points = _mount_points()
    if points is None:
        points = {path, *(Path(folder, name) for folder, names, _ in os.walk(path) for name in names)}
        points = {point for point in points if os.path.ismount(point)}
    found = {point for point in points if path == point or path in point.parents}
    if path.stat().st_dev != path.parent.stat().st_dev:
        found.add(path)
    return sorted(found)


def _mount_points() -> set[Path] | None:
    """All mount points, as Linux lists them; None elsewhere."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return None
    names = (line.split(b" ")[4] for line in lines)  # proc(5): a blank in a name is \040
    return {Path(os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), name))) for name in names}


def refuse_files(out: str | os.PathLike[str], files: Iterable[Path]) -> None:
    """RefusedError for an output that would replace or delete one of these files or directories."""
    resolved = _resolved(out)
    for path in files:
        if resolved in (path.resolve(), *path.resolve().parents):
            verb = "is" if resolved == path.resolve() else "holds"
            raise RefusedError(f"{out} {verb} an input ({path}); write somewhere else")


def refuse_inputs(out: str | os.PathLike[str], sources: Iterable[Checkpoint]) -> None:
    """RefusedError for an output that would replace or delete an input, or lie inside of one."""
    resolved = _resolved(out)
    for source in sources:
        refuse_files(out, (path for path in (source.path, *source.files) if path is not None))
        if source.directory is not None and source.directory.resolve() in resolved.parents:
            raise RefusedError(f"{out} is inside of an input ({source.directory}); write somewhere else")


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
        foreign: Foreign = no_manifest,
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
        _flush_place(self._out, [self._out.parent, *(parent.parent for parent in made)])

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


def cannot_write(out: Path, error: OSError) -> CheckpointError:
    """The error for a failed write below ``out``."""
    hint = "; the disk is full" if error.errno in DISK_FULL else ""
    return CheckpointError(f"cannot write {out}: {error.strerror}{hint}; nothing was changed")


def _flush_place(out: Path, folders: Iterable[Path]) -> None:
    """Have the name of an output on the disk, which is in these directories."""
    try:
        for folder in folders:
            flush_directory(folder)
    except OSError as error:
        place = f"the directory that it is in cannot be flushed to the disk: {error.strerror}"
        raise CheckpointError(f"{out} is written, but {place}") from error


def _missing_parents(out: Path) -> list[Path]:
    return [parent for parent in out.parents if not parent.exists()]


def hidden(out: Path) -> Path:
    """The hidden directory of an output."""
    return out.with_name(f".{out.name}{_MARK}")


@dataclass(frozen=True)
class Leftover:
    """A hidden directory that was found: of a run that lives, or left behind by one that was killed.

    ``alive``: None where the file system has no locks, which would tell. ``holds_output``: it is a whole output that
    was being replaced, and the only one there is. ``removed``: by :func:`clean`.
    """

    path: Path
    nbytes: int
    alive: bool | None
    holds_output: bool
    removed: bool


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
        lock = lock_of(path)
        try:
            free = lock.take()
            whole = rest.endswith("-old") and not (folder / name[1:]).exists()
            nbytes = allocated(path)
            if remove and free and not whole:
                shutil.rmtree(path, ignore_errors=True)
            yield Leftover(path, nbytes, None if free is None else not free, whole, not path.exists())
        finally:
            lock.close()
    if remove:
        remove_unused_files(folder, _MARK)


def allocated(directory: Path) -> int:
    """The bytes on the disk that the files in a directory take."""
    total = 0
    for folder, _, files in () if directory.is_symlink() else os.walk(directory):
        for file in files:
            with suppress(OSError):  # another run may be removing them
                total += _room(os.lstat(os.path.join(folder, file)))
    return total


def _room(status: os.stat_result) -> int:
    """The bytes that a file takes; a hole in it takes none, where the system tells."""
    blocks: int | None = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else blocks * 512


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
