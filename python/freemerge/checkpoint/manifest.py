"""``freemerge.json``: from what, how, and into which bytes a model was merged. No times, no paths of this machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType

import torch

from .. import __version__
from ..arguments import path_of
from ..errors import CheckpointError
from ..workers import ALONE, Workers
from . import known_hashes
from .hashing import Hasher
from .json_file import read_json
from .reader import Checkpoint
from .regular_file import Identity, check_unchanged
from .target import MANIFEST

FORMAT = 1
_MAX_MANIFEST_BYTES = 1 << 30  # some hundred bytes a tensor


class InputHashes:
    """The SHA-256 of every input file, computed in the background while the merge runs.

    These are the plain hashes of whole files, as ``sha256sum`` and model hubs show them. Files that an earlier run
    hashed and that have not changed since are not hashed again. Several workers share the files out.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint], workers: Workers = ALONE) -> None:
        self._checkpoints, self._workers = tuple(checkpoints), workers
        self._hasher = Hasher()
        self._before = _opened(self._checkpoints)
        ranks = workers.shares({file: before[0] for file, before in self._before.items()})
        self._keys = {file: known_hashes.key(file) for file in self._before if ranks[file] == workers.rank}
        self._known = {file: digest for file, key in self._keys.items() if (digest := known_hashes.recall(key))}
        self._digests = self._hasher.submit_all(file for file in self._keys if file not in self._known)

    def records(self) -> list[dict[str, object]]:
        """For each checkpoint its name and its files with size and hash; waits for the hashes.

        Raises CheckpointError for a file that was changed or replaced since it was opened.
        """
        records: dict[Path, dict[str, object]] = {}
        own = {file: self._record(file) for file in self._keys}
        self._remember()
        for share in self._workers.gather(own):
            records |= share
        return [
            {"name": checkpoint.name, "files": [records[file] for file in checkpoint.files]}
            for checkpoint in self._checkpoints
        ]

    @property
    def seconds(self) -> float:
        """How long the threads that hash have worked."""
        return self._hasher.seconds

    @property
    def nbytes(self) -> int:
        """Size of the files that this worker hashes: those that are not known from an earlier run."""
        return sum(self._before[file][0] for file in self._digests)

    def _record(self, file: Path) -> dict[str, object]:
        known = self._known.get(file)
        if known is not None and known_hashes.key(file) != self._keys[file]:  # another time than check_unchanged sees
            known = self._hasher.submit(file).result()
        digest = known or self._digests[file]()
        check_unchanged(file, self._before[file], file)
        return {"name": file.name, "bytes": self._before[file][0], "sha256": digest}

    def _remember(self) -> None:
        fresh = {file: key for file in self._digests if (key := self._keys[file]) is not None}
        known_hashes.remember(
            {key: self._digests[file]() for file, key in fresh.items() if key == known_hashes.key(file)}
        )

    def __enter__(self) -> InputHashes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hasher.close()


def unknown_bytes(checkpoints: Sequence[Checkpoint]) -> int:
    """Size of the files of checkpoints that :class:`InputHashes` would have to hash now."""
    files = _opened(checkpoints).items()
    return sum(opened[0] for file, opened in files if known_hashes.recall(known_hashes.key(file)) is None)


def _opened(checkpoints: Sequence[Checkpoint]) -> dict[Path, Identity]:
    """What the files of some checkpoints were when they were opened."""
    before: dict[Path, Identity] = {}
    for checkpoint in checkpoints:
        for file in checkpoint.files:
            if before.setdefault(file, checkpoint.identities[file]) != checkpoint.identities[file]:
                raise CheckpointError(f"{file} changed while it was being read")
    return before


def build_manifest(
    *,
    recipe: Mapping[str, object],
    inputs: Sequence[Mapping[str, object]],
    tensors: Mapping[str, object],
    backend: str,
) -> dict[str, object]:
    """The content for :attr:`CheckpointWriter.manifest`.

    Args:
        recipe: the recipe as plain data.
        inputs: :meth:`InputHashes.records`, base first.
        tensors: for each tensor what was decided and done; plain data.
        backend: what the arithmetic ran on.
    """
    return {
        "format": FORMAT,
        "freemerge": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": backend,
        "recipe": dict(recipe),
        "base": dict(inputs[0]),
        "models": [dict(record) for record in inputs[1:]],
        "tensors": dict(sorted(tensors.items())),
    }


def read_manifest(directory: Path) -> dict[str, object]:
    """The manifest of a merged model directory; CheckpointError if there is none or it is not one."""
    path = directory / MANIFEST
    if os.path.isfile(directory):
        raise CheckpointError(
            f"{directory} is a file; a directory that freemerge wrote has a {MANIFEST} to verify, a file has none"
        )
    if os.path.isdir(directory) and not os.path.lexists(path):
        raise CheckpointError(f"{directory} has no {MANIFEST}, as directories that freemerge merge wrote have")
    manifest = read_json(path, _MAX_MANIFEST_BYTES)
    manifest = manifest if isinstance(manifest, dict) else {}
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(_is_file_record(name, record) for name, record in files.items()):
        raise CheckpointError(f"{path}: not a freemerge manifest (no valid list of files)")
    return manifest


def other_than_merged(directory: Path) -> str | None:
    """Merged models are told by their manifest, which lists all that there is: what else somebody has put there, such
    as checkpoints of a training or notes, is not ours to delete."""
    try:
        files = read_manifest(directory)["files"]
    except CheckpointError as error:
        return str(error) if (directory / MANIFEST).is_file() else f"no {MANIFEST}"
    assert isinstance(files, dict)  # read_manifest checked it
    foreign = _unlisted(directory, files)
    found = set(foreign)
    highest = [path.relative_to(directory).as_posix() for path in foreign if path.parent not in found]
    more = f" and {len(highest) - 3} more" if len(highest) > 3 else ""
    return f"{', '.join(highest[:3])}{more}, which {MANIFEST} does not list" if highest else None


def _unlisted(directory: Path, files: Iterable[str]) -> list[Path]:
    """What is in a directory and neither its manifest nor one of these ``files``, nor a folder of them."""
    listed = {directory / name for name in (MANIFEST, *files)}
    folders = {parent for path in listed for parent in path.parents}

    def is_folder(path: Path) -> bool:
        return path.is_dir() and not path.is_symlink()

    return [path for path in sorted(directory.rglob("*")) if path not in (folders if is_folder(path) else listed)]


def _is_file_record(name: str, record: object) -> bool:
    path = PurePosixPath(name)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    return inside and isinstance(record, dict) and isinstance(record.get("sha256"), str)


def verify(directory: str | os.PathLike[str]) -> list[str]:
    """Hash a merged model directory again and compare with its manifest; returns the problems found, none if intact.

    A file that the manifest does not list is a problem too (hidden files excepted): loaders may prefer it.

    Raises:
        CheckpointError: the directory has no manifest that can be read, or one of its files cannot be.
    """
    directory = path_of("directory", directory)
    files = read_manifest(directory)["files"]
    assert isinstance(files, dict)  # read_manifest checked it
    problems = []
    with Hasher() as hasher:
        present = [path for name in sorted(files) if (path := directory / name).is_file()]
        digests = hasher.submit_all(present)
        for name in sorted(files):
            if directory / name not in digests:
                problems.append(f"{name} is missing")
            elif digests[directory / name]() != files[name]["sha256"]:
                problems.append(f"{name} has changed: its hash is not the one in {MANIFEST}")
    for path in _unlisted(directory, files):
        relative = path.relative_to(directory)
        if not path.is_dir() and not any(part.startswith(".") for part in relative.parts):
            problems.append(f"{relative.as_posix()} is not in {MANIFEST}")
    return problems
