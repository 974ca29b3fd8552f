"""The Hugging Face cache on this machine: models by their Hub id, and links into it. Nothing is downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import CheckpointError

_HUB_ID = re.compile(r"(?:[\w][\w.-]*/)?[\w][\w.-]*(?:@[\w][\w./-]*)?")
_PART_OF_ONE = re.compile(r"([\w][\w.-]*/[\w][\w.-]*)/([\w][\w./-]*)")  # org/name/unet
_ADDRESS = re.compile(r"(?:https?:/+huggingface\.co/|hf:/+)(.+?)(?:/tree/([^/]+))?/?")
REPOSITORY = "models--"


def local_path(source: str | os.PathLike[str]) -> Path:
    """A path as it is, if it exists; else the snapshot that the cache holds of the model with that Hub id.

    ``org/name@revision`` names a branch, tag or commit; without one it is the main branch. ``org/name/unet`` is a
    directory in a snapshot. A model's directory in the cache is its snapshot, too.
    Raises CheckpointError, saying how to fetch the model, if there is neither.
    """
    path = Path(source).expanduser()
    if os.path.exists(path):  # False, too, for a name that the system refuses
        return (_snapshot(path, "") or path) if path.name.startswith(REPOSITORY) else path
    address = _ADDRESS.fullmatch(os.fspath(source))
    wanted = os.fspath(source) if address is None else "@".join(filter(None, address.groups()))
    inner = _PART_OF_ONE.fullmatch(wanted)
    if inner is not None:
        snapshot = _snapshot(_repository(inner.group(1)), "")
        return snapshot / inner.group(2) if snapshot is not None and (snapshot / inner.group(2)).exists() else path
    if not _HUB_ID.fullmatch(wanted):
        return path
    name, _, revision = wanted.partition("@")
    snapshot = _snapshot(_repository(name), revision)
    if snapshot is not None:
        return snapshot
    if address is None and (path.suffix or not ("/" in name or _repository(name).is_dir())):
        return path
    option = f" --revision {revision}" if revision else ""
    raise CheckpointError(
        f"{source}: no such file or directory, and the Hub cache ({cache_root()}) does not hold that model; freemerge "
        f"downloads nothing: fetch it with `hf download {name}{option}`, or give a local path"
    )


def _repository(name: str) -> Path:
    return cache_root() / (REPOSITORY + name.replace("/", "--"))


def _snapshot(repository: Path, revision: str) -> Path | None:
    """The directory of one revision in the cache, if it is there."""
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    snapshot = repository / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() and snapshot.parent == repository / "snapshots" else None


def hub_id(path: Path) -> str | None:
    """The Hub id of the model that a path in a cache belongs to; None for any other path."""
    owners = (parent.name for parent in Path(os.path.abspath(path)).parents if parent.name.startswith(REPOSITORY))
    return next((name.removeprefix(REPOSITORY).replace("--", "/") for name in owners), None)


def cache_root() -> Path:
    """Where huggingface_hub keeps models."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def stays_in_one_cache(home: Path, target: Path) -> bool:
    """Whether a link of the directory ``home`` that ends at ``target`` leads into a Hub cache, and no other link of it
    anywhere else.

    A snapshot of the cache may link into the blobs of its own model only.
    """
    root = _cache_of(target)
    if root is None:
        return False
    own = next((parent.parent for parent in home.parents if parent.name == "snapshots"), None)
    if own is not None and own.name.startswith(REPOSITORY):
        return target.parent == own / "blobs"
    with os.scandir(home) as items:
        ends = [Path(item.path).resolve() for item in items if item.is_symlink()]
    return all(home in end.parents or _cache_of(end) == root for end in ends)


def _cache_of(target: Path) -> Path | None:
    """The cache that holds a blob, None for any other file."""
    repository = target.parent.parent
    return repository.parent if target.parent.name == "blobs" and repository.name.startswith(REPOSITORY) else None
