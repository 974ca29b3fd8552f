"""Which weight files a model directory consists of, and which names in it may be trusted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import CheckpointError
from .file_format import GGUF_ADVICE, PICKLE_SUFFIXES
from .hub_cache import hub_id, stays_in_one_cache
from .json_file import read_json, unique_keys
from .regular_file import Identity, identities

MODEL, DIFFUSERS = "model", "diffusion_pytorch_model"  # how the weight files of transformers and diffusers begin
SAFETENSORS = f"{MODEL}.safetensors"
INDEX = ".index.json"  # ends the name of the list of a model's weight files
# What transformers and diffusers call their weights: the beginning and the end of the name, in order of preference.
_NAMES = (
    (MODEL, ".safetensors"),
    (DIFFUSERS, ".safetensors"),
    ("pytorch_model", ".bin"),
    (DIFFUSERS, ".bin"),
)
_FULL_WEIGHTS = re.compile(
    r"((diffusion_)?(pytorch_)?model|consolidated)([.-].*)?\.(safetensors|bin|pt|pth)(\.index\.json)?"
)
_SHARD = re.compile(r"\w+-\d{5,}-of-\d{5,}\.(safetensors|bin)")
# What trainers write beside the weights.
_RECORDS = re.compile(r"((optimizer|scheduler|scaler|sampler|rng_state|random_states|training_args)[._]|.*_states).*")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MAX_INDEX_BYTES = 100_000_000


@dataclass(frozen=True)
class Located:
    """The files of a checkpoint. ``weight_map`` (tensor -> file) is present if an index says what is where."""

    files: tuple[Path, ...]
    directory: Path | None = None  # where config and tokenizer lie; None if only a weight file was named
    index: Path | None = None
    weight_map: dict[str, Path] | None = None
    stray: tuple[str, ...] = ()  # shards beside the index that it does not name
    settings: Mapping[Path, Identity] = field(default_factory=dict)  # the JSON files, before any of them was read


def locate(path: Path) -> Located:
    """Find the weight files of a model directory, of an ``*.index.json``, or of a single weight file.

    A directory is read as transformers would, except that one with both a single file and an index is refused: it is
    what a merge over an older, differently sharded model leaves behind, and the stale half would be loaded silently.
    """
    if os.path.isdir(path):  # False, as below, for a name that the system refuses
        settings = settings_in(path)
        return replace(_locate_in_directory(path), settings=settings)
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: no such file or directory (models are not downloaded; give a local path)")
    if path.name.endswith(INDEX):
        settings = settings_in(path.parent)
        return replace(_read_index(path.parent, path), settings=settings)
    return Located((path,))


def settings_in(directory: Path) -> dict[Path, Identity]:
    """The JSON files of a model's directory, and what they are now."""
    return identities(directory.glob("*.json"))


def adapter_weights(directory: Path) -> Path | None:
    """The weights of a PEFT adapter, if a directory is one.

    A directory that is also a full model is refused: loaders disagree on which of the two it is. A leftover
    adapter_config.json without weights makes no adapter.
    """
    weights = _named_as_adapter(directory)
    if weights is None or not (directory / ADAPTER_CONFIG).is_file():
        return None
    full = next((name for name in sorted(os.listdir(directory)) if _FULL_WEIGHTS.fullmatch(name)), None)
    if full is not None:
        raise CheckpointError(
            f"{directory} holds a full model ({full}) and an adapter ({weights.name}): give {directory / full} or "
            f"{weights}, whichever is meant"
        )
    return weights


def _named_as_adapter(directory: Path) -> Path | None:
    return next((directory / name for name in ADAPTER_WEIGHTS if os.path.lexists(directory / name)), None)


def _locate_in_directory(directory: Path) -> Located:
    if adapter_weights(directory) is not None:
        raise CheckpointError(
            f"{directory} is a PEFT adapter, not a full model; it can be one of the models, beside the base that it "
            "was trained on"
        )
    for stem, suffix in _NAMES:
        single, index = f"{stem}{suffix}", f"{stem}{suffix}{INDEX}"
        has_single, has_index = os.path.lexists(directory / single), os.path.lexists(directory / index)
        if has_single and has_index:
            raise CheckpointError(f"{directory} holds both {single} and {index}: remove the stale one, or name one")
        if has_single:
            return Located((entry(directory, single),), directory)
        if has_index:
            return _read_index(directory, entry(directory, index))
    names = sorted(path.name for path in directory.iterdir() if not path.is_dir())
    indexes = [name for name in names if name.endswith(f".safetensors{INDEX}")]
    if len(indexes) == 1:
        return _read_index(directory, entry(directory, indexes[0]))
    _refuse_adapter_without_config(directory)
    others = [name for name in names if name.endswith(".safetensors")]
    others = others or [n for n in names if Path(n).suffix in PICKLE_SUFFIXES and not _RECORDS.fullmatch(n)]
    if len(others) == 1:
        return Located((entry(directory, others[0]),), directory)
    found = _found(directory, names, others)
    if ADAPTER_CONFIG in names:
        found = f"the {ADAPTER_CONFIG} of a PEFT adapter without {' or '.join(ADAPTER_WEIGHTS)}, and {found}"
    raise CheckpointError(f"{directory}: not a model directory ({found})")


def _refuse_adapter_without_config(directory: Path) -> None:
    weights = _named_as_adapter(directory)
    if weights is not None and not (directory / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{directory} holds {weights.name} without {ADAPTER_CONFIG}, which says how to apply it: the adapter "
            "cannot be merged without it"
        )


def _found(directory: Path, names: Sequence[str], weights: Sequence[str]) -> str:
    """What a directory holds that is no model, with the way to one."""
    if weights and all(_SHARD.fullmatch(name) for name in weights):
        return f"shards without their index: {', '.join(weights[:10])}"
    if weights:
        return f"several files and no index: {', '.join(weights[:10])}; give one of them"
    gguf = next((name for name in names if name.endswith(".gguf")), None)
    if gguf is not None:
        return f"{gguf} is {GGUF_ADVICE}"
    if ".metadata" in names:
        return (
            "a distributed checkpoint of torch; put it together first: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {directory} NEW.pt"
        )
    inner = [path.name for path in sorted(directory.iterdir()) if path.is_dir() and _looks_like_model(path)]
    if inner:
        return f"the models are in {', '.join(inner[:10])}; give one of these directories"
    return f"no {SAFETENSORS} or pytorch_model.bin"


def _looks_like_model(directory: Path) -> bool:
    names = os.listdir(directory)
    weights = any(_FULL_WEIGHTS.fullmatch(name) or name in ADAPTER_WEIGHTS for name in names)
    return weights or ".metadata" in names


def _read_index(directory: Path, index: Path) -> Located:
    content = read_json(index, _MAX_INDEX_BYTES, unique_keys)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map that names a file for each tensor")
    suffixes = {".safetensors"} if ".safetensors." in index.name else PICKLE_SUFFIXES
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain(name) or Path(name).suffix not in suffixes:
            raise CheckpointError(
                f"{index}: tensor {tensor!r} is said to be in {name!r}, which is not a weight file beside the index"
            )
    files = {name: entry(directory, name) for name in sorted(set(weight_map.values()))}
    shards = (
        name for name in sorted(os.listdir(directory)) if _SHARD.fullmatch(name) and Path(name).suffix in suffixes
    )
    stray = tuple(name for name in shards if name not in files)
    return Located(
        tuple(files.values()), directory, index, {tensor: files[name] for tensor, name in weight_map.items()}, stray
    )


def _is_plain(name: str) -> bool:
    return bool(name) and name not in (".", "..") and not any(c in name for c in ("/", "\\", "\0"))


def entry(directory: Path, name: str, *, home: Path | None = None) -> Path:
    """``directory / name``, provided that it exists and does not lead elsewhere.

    A symbolic link may only end inside the directory (or the ``home`` it belongs to) or in a Hugging Face cache, if
    all links of the directory end in that one: otherwise a downloaded model could name, and a merged one publish, any
    file of this machine.
    """
    path = directory / name
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise CheckpointError(f"{path}: no such file") from None
    home = (home or directory).resolve()
    if home in target.parents or stays_in_one_cache(home, target):
        return path
    raise CheckpointError(
        f"{path} is a symbolic link out of its directory; copy the files to where the links are, as with "
        f"`cp -rL {directory} COPY`, and give the copy"
    )


def stem_of(directory: Path | None, files: Sequence[Path]) -> str:
    """How the weight files of a merged model begin, so that the library of the base finds them."""
    return DIFFUSERS if directory is not None and files[0].name.startswith(DIFFUSERS) else MODEL


def display_name(path: Path) -> str:
    """A name for manifests and model cards without this machine's paths: ``org/model`` for a cache snapshot, the name
    of a directory, ``directory/file`` for a file."""
    absolute = Path(os.path.abspath(path))
    if (known := hub_id(absolute)) is not None:
        return known
    return absolute.name if absolute.is_dir() else f"{absolute.parent.name}/{absolute.name}"


def distinct_names(names: Sequence[str], paths: Sequence[Path | None]) -> list[str]:
    """Names of several checkpoints by :func:`display_name`; those that are alike become what tells their paths apart.

    The path of a checkpoint in memory is None.
    """
    absolute = [path and Path(os.path.abspath(path)) for path in paths]
    alike: dict[str, set[Path]] = {}
    for name, path in zip(names, absolute, strict=True):
        alike.setdefault(name, set()).update([path] if path else [])
    return [
        _distinct(name, path, alike[name]) if path and len(alike[name]) > 1 else name
        for name, path in zip(names, absolute, strict=True)
    ]


def _distinct(name: str, path: Path, alike: Iterable[Path]) -> str:
    own = told_apart(path, alike)
    revision = hub_id(path) is not None  # of one repository, by the name of its folder alone
    return f"{name}-{own}" if revision else own


def told_apart(path: Path, paths: Iterable[Path]) -> str:
    """The last part of a path, and as many before it as paths that end like this one differ by:
    ``math-checkpoint-500``."""
    own = _parts(path)
    alike = [parts for parts in map(_parts, paths) if parts[-1] == own[-1]]
    enough = (n for n in range(1, len(own) + 1) if len({parts[-n:] for parts in alike}) == len(alike))
    return "-".join(own[-next(enough, 1) :])


def _parts(path: Path) -> tuple[str, ...]:
    return *path.parent.parts[1:], path.name.removesuffix(".safetensors")
