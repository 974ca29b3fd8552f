"""Where an output goes: what is refused before the work begins, and files that are no checkpoints."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING

from ..arguments import path_of
from ..errors import ArgumentError, CheckpointError, RefusedError
from .containers import split_key
from .disk import flush_directory, flush_file
from .hub_cache import local_path
from .locate import INDEX

if TYPE_CHECKING:
    from .reader import Checkpoint

MANIFEST = "freemerge.json"
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".pth.tar", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack"),
    *(".onnx", ".onnx_data", ".tflite", ".npz", ".ot", ".pdparams"),
)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

Foreign = Callable[[Path], str | None]
"""Why a directory is no earlier output of the same kind; None if it is."""


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
    taken = (*WEIGHT_SUFFIXES, INDEX)
    if any(path.name.lower().endswith(taken) for path in (out, Path(os.path.realpath(out)))):
        raise ArgumentError(f"out: {out} has the name of a weight file; {meant}")


def check_target(out: Path, *, single_file: bool, force: bool, foreign: Foreign) -> None:
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
    if mounted:
        raise RefusedError(
            f"{mounted[0]} is mounted inside of {out}, so even force does not delete it; unmount it first"
        )
    reason = None if single_file else foreign(out)
    if reason is not None:
        raise RefusedError(f"{out} holds something else than this writes ({reason}), so even force does not delete it")


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
    for source in sources:
        refuse_files(out, (path for path in (source.path, *source.files) if path is not None))
        refuse_paths(out, (source.directory,))


def refuse_paths(out: str | os.PathLike[str], inputs: Iterable[object]) -> None:
    """RefusedError for an output that is one of these inputs, or lies inside of one; those that are no paths are let
    pass."""
    resolved = _resolved(out)
    for given in (given for given in inputs if isinstance(given, (str, os.PathLike)) and os.fspath(given)):
        path, _ = split_key(os.fspath(given))
        try:
            place = local_path(path).resolve()
        except (OSError, RuntimeError, ValueError):  # which is told when it is opened
            continue
        if place.name.endswith(INDEX):  # stands for the directory that it is in
            place = place.parent
        if place.is_file() and resolved.suffix == ".json" and resolved.parent == place.parent:
            raise RefusedError(f"{out} is beside an input ({place}), whose config it may be; write somewhere else")
        if place == resolved or place in resolved.parents:
            where = "" if place == resolved else "inside of "
            raise RefusedError(f"{out} is {where}an input ({place}); write somewhere else")


def check_file(out: Path, what: str, *, force: bool, inputs: Iterable[object]) -> None:
    """Complain about a place for a file that is no checkpoint, ``what`` it is to be, before the work begins."""
    refuse_weights(out, f"{what} is none")
    refuse_paths(out, inputs)
    if out.exists() and not out.is_file():
        raise RefusedError(f"{out} is {'a directory' if out.is_dir() else 'no file'}")
    if out.exists() and not force:
        raise RefusedError(f"{out} exists; use --force (force=True) to replace it")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot write {out}: {out.parent} is no directory that can be written")


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
    flush_place(out, [path.parent])


def cannot_write(out: Path, error: OSError) -> CheckpointError:
    """The error for a failed write below ``out``."""
    hint = "; the disk is full" if error.errno in DISK_FULL else ""
    return CheckpointError(f"cannot write {out}: {error.strerror}{hint}; nothing was changed")


def flush_place(out: Path, folders: Iterable[Path]) -> None:
    """Have the name of an output on the disk, which is in these directories."""
    try:
        for folder in folders:
            flush_directory(folder)
    except OSError as error:
        place = f"the directory that it is in cannot be flushed to the disk: {error.strerror}"
        raise CheckpointError(f"{out} is written, but {place}") from error
