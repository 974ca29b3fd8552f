"""What lies beside the weights: whose tokenizer the merged model gets, and what of the others is not taken over."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from filecmp import cmp
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from ..errors import ArgumentError, CheckpointError
from .architecture import CONFIG, read_config
from .json_file import read_json
from .locate import entry
from .reader import Checkpoint
from .vocabulary import TOKEN_IDS, misfit

TokenizerFrom = Literal["base", "auto"] | int

# The tokenizer, and what has to agree with it: chat template, special tokens, and where generation stops.
_TOKENIZER = (
    *("tokenizer*.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("spiece.model", "sentencepiece*.model", "*.tiktoken", "tekken.json", "chat_template.*", "generation_config.json"),
    *("additional_chat_templates/*", "tokenization_*.py"),
    # What single classes of transformers call their vocabularies.
    *("*.spm", "spm*.model", "bpe.codes", "dict.txt", "*_vocab.json", "vocab-*.json", "word_*.json", "*.tokenizer"),
    *("normalizer.json", "byte_maps.json", "emoji.json"),
)
# Entries of a config.json that do not change what the merged model computes or how it is used.
_INCIDENTAL = frozenset(
    {"_name_or_path", "name_or_path", "transformers_version", "use_cache", "_attn_implementation", "auto_map"}
    | {"attn_implementation", "torchscript", "gradient_checkpointing", "tie_word_embeddings", "unsloth_version"}
    | {"quantization_config", "compression_config"}
)
_MAX_COMPARED_BYTES = 50_000_000
_LISTED = 12


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of a model directory, by its relative name, belongs to the tokenizer."""
    return any(fnmatchcase(name, pattern) for pattern in _TOKENIZER)


def part_weights(directory: Path | None) -> dict[str, Path]:
    """Weights of the modules that sentence-transformers keeps in directories beside the model: dense layers."""
    listed: object = None
    if directory is not None and (directory / "modules.json").is_file():
        with suppress(CheckpointError):
            listed = read_json(entry(directory, "modules.json"))
    modules = [module.get("path") for module in listed if isinstance(module, dict)] if isinstance(listed, list) else []
    found: dict[str, Path] = {}
    for path in modules:
        if directory is None or not isinstance(path, str) or path in ("", ".", "..") or Path(path).name != path:
            continue
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (directory / path / name).is_file():
                found[f"{path}/{name}"] = entry(directory / path, name, home=directory)
    return found


def tokenizer_source(base: Checkpoint, models: Sequence[Checkpoint], choice: TokenizerFrom) -> Checkpoint:
    """The input whose tokenizer, chat template and generation settings the merged model gets.

    ``"base"``; the number of a model; or ``"auto"``: the models', if all that have a tokenizer have the same one and it
    fits the base's embeddings, else the base's. Raises ArgumentError for a number that is none, and for the tokenizer
    of a model with another vocabulary: tokens without a row of their own would be read, and written, as others.
    """
    if choice == "base":
        return base
    if choice == "auto":
        having = [model for model in models if _files(model)]
        contents = [_contents(model) for model in having]
        same = bool(having) and all(content == contents[0] for content in contents)
        return having[0] if same and misfit(having[0], contents[0], base) is None else base
    if isinstance(choice, bool) or not isinstance(choice, int) or not 0 <= choice < len(models):
        numbers = f"the number of a model from 0 to {len(models) - 1}"
        raise ArgumentError(f"tokenizer_from must be 'base', 'auto' or {numbers}, got {choice!r}")
    if not _files(models[choice]):
        raise ArgumentError(f"tokenizer_from: {models[choice].label} holds no tokenizer files")
    reason = misfit(models[choice], _contents(models[choice]), base)
    if reason is not None:
        raise ArgumentError(f"tokenizer_from: {reason}; the tokenizer of another vocabulary does not fit")
    return models[choice]


def differences(base: Checkpoint, models: Sequence[Checkpoint], tokenizer: Checkpoint) -> list[str]:
    """A line for each difference among the inputs that the merged model does not take over."""
    others = {f"models[{i}] ({model.name})": model for i, model in enumerate(models) if model.directory is not None}
    if tokenizer is not base:
        others = {"the base": base} | {name: model for name, model in others.items() if model is not tokenizer}
    lines = [*_file_differences(tokenizer, others, "the base" if tokenizer is base else tokenizer.name)]
    others = {f"models[{i}] ({model.name})": model for i, model in enumerate(models) if model.directory is not None}
    lines += _part_differences(base, others)
    lines += _config_differences(base, others, tokenizer)
    lines.sort(key=lambda line: not line.startswith((f"{CONFIG}: architectures", f"{CONFIG}: model_type")))
    return lines[:_LISTED] + ([f"and {len(lines) - _LISTED} more such differences"] if len(lines) > _LISTED else [])


def _file_differences(taken: Checkpoint, others: Mapping[str, Checkpoint], name: str) -> Iterator[str]:
    ours = _contents(taken)
    theirs = {label: _contents(other) for label, other in others.items()}
    for file in sorted({file for contents in (ours, *theirs.values()) for file in contents}):
        having = [label for label, contents in theirs.items() if file in contents and contents[file] != ours.get(file)]
        if having:
            what = "another" if file in ours else "one"
            kept = f"that of {name} is taken" if file in ours else f"{name} has none, and none is taken"
            yield f"{file}: {_and(having)} {'have' if len(having) > 1 else 'has'} {what}; {kept} (see tokenizer_from)"


def _part_differences(base: Checkpoint, others: Mapping[str, Checkpoint]) -> Iterator[str]:
    for name, ours in part_weights(base.directory).items():
        theirs = {label: part_weights(other.directory).get(name) for label, other in others.items()}
        differing = [label for label, path in theirs.items() if path is not None and not cmp(ours, path, shallow=False)]
        if differing:
            have = "have" if len(differing) > 1 else "has"
            yield f"{name}: {_and(differing)} {have} another; that of the base is taken"


def _config_differences(base: Checkpoint, others: Mapping[str, Checkpoint], tokenizer: Checkpoint) -> Iterator[str]:
    ours = _flat(read_config(base.directory))
    theirs = {label: _flat(read_config(other.directory)) for label, other in others.items()}
    for label, other in others.items():
        if other.directory is not None and (other.directory / CONFIG).is_file() and not theirs[label]:
            yield f"{CONFIG}: that of {label} cannot be read and is not compared"
    theirs = {label: config for label, config in theirs.items() if config}  # an adapter has none
    if not ours:
        return
    taken = set(TOKEN_IDS) if tokenizer is not base else set()
    for key in sorted({key for config in (ours, *theirs.values()) for key in config} - taken):
        if key.rpartition(".")[2] in _INCIDENTAL:
            continue
        values: dict[str, list[str]] = {}
        for label, config in theirs.items():
            if config.get(key) != ours.get(key):
                values.setdefault(_shown(config.get(key)), []).append(label)
        for value, labels in values.items():
            kept = _shown(ours.get(key))
            yield f"{CONFIG}: {key} is {value} in {_and(labels)}; the merged model has the base's, {kept}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config") and key not in _INCIDENTAL:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{'dtype' if key == 'torch_dtype' else key}"] = value
    return flat


def _shown(value: object) -> str:
    text = "not set" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _and(labels: Sequence[str]) -> str:
    return " and ".join([", ".join(labels[:-1]), labels[-1]] if len(labels) > 1 else labels)


def _files(checkpoint: Checkpoint) -> dict[str, Path]:
    directory = checkpoint.directory
    if directory is None:
        return {}
    found = [path for path in (*directory.iterdir(), *directory.glob("additional_chat_templates/*")) if path.is_file()]
    names = {path.relative_to(directory).as_posix(): path for path in found}
    return {
        name: entry(path.parent, path.name, home=directory)
        for name, path in sorted(names.items())
        if is_tokenizer_file(name)
    }


def _contents(checkpoint: Checkpoint) -> dict[str, object]:
    """What the tokenizer files hold: JSON by its values, which outlive another order of keys."""
    contents: dict[str, object] = {}
    for name, path in _files(checkpoint).items():
        raw = path.read_bytes() if path.stat().st_size <= _MAX_COMPARED_BYTES else str(path.stat().st_size).encode()
        contents[name] = raw
        if name.endswith(".json"):
            try:
                content = json.loads(raw)
            except (ValueError, RecursionError):
                continue
            if isinstance(content, dict):
                content = {key: value for key, value in content.items() if key not in _INCIDENTAL}
            contents[name] = content
    return contents
