"""The Hugging Face cache on this machine: models by their Hub id, and links into it. Nothing is downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import CheckpointError

_HUB_ID = re.compile(r"(?:[\w][\w.-]*/)?[\w][\w.-]*(?:@[\w][\w./-]*)?")
REPOSITORY = "models--"


def local_path(source: str | os.PathLike[str]) -> Path:
    """A path as it is, if it exists; else the snapshot that the cache holds of the model with that Hub id.

    ``org/name@revision`` names a branch, tag or commit; without one it is the main branch.
    Raises CheckpointError, saying how to fetch the model, if there is neither.
    """
    path = Path(source)
    if path.exists() or not _HUB_ID.fullmatch(os.fspath(source)):
        return path
    name, _, revision = os.fspath(source).partition("@")
    repository = cache_root() / (REPOSITORY + name.replace("/", "--"))
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    snapshot = repository / "snapshots" / commit if commit else repository
    if commit and snapshot.is_dir() and snapshot.parent == repository / "snapshots":
        return snapshot
    if path.suffix or not ("/" in name or repository.is_dir()):
        return path
    wanted = f" --revision {revision}" if revision else ""
    raise CheckpointError(
        f"{source}: no such file or directory, and the Hub cache ({cache_root()}) does not hold that model; freemerge "
        f"downloads nothing: fetch it with `hf download {name}{wanted}`, or give a local path"
    )


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
