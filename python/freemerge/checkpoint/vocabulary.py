"""Does a tokenizer fit the rows of an embedding? Asked of names, shapes and the files beside the weights alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .architecture import CONFIG, read_config, text_entry
from .reader import Checkpoint

# Names of tensors with one row per vocabulary entry, over the common architectures.
VOCABULARY = re.compile(
    r"(embed_tokens|tok_embeddings|word_embeddings|wte|embed_in|embed_out|shared|lm_head|predictions\.decoder)\.(weight|bias)$"
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id")


def token_ids(source: Checkpoint) -> dict[str, Any]:
    """The special tokens in a config.json."""
    config = read_config(source.directory)
    return {name: config[name] for name in TOKEN_IDS if name in config}


def misfit(source: Checkpoint, contents: Mapping[str, object], base: Checkpoint) -> str | None:
    """Why the tokenizer of ``source``, whose files hold ``contents``, does not fit a model with the base's tensors.

    None where it fits, or nothing tells.
    """
    for name in sorted(filter(VOCABULARY.search, base.specs.keys() & source.specs.keys())):
        ours, theirs = base.specs[name].shape, source.specs[name].shape
        if ours[:1] != theirs[:1]:
            return f"{name} has {theirs[0]} rows in {source.label}, {ours[0]} in the merged model"
    rows = [spec.shape[0] for name, spec in base.specs.items() if VOCABULARY.search(name) and spec.shape]
    said, other = _said_size(base), _said_size(source)
    if not rows and None not in (said, other) and said != other:
        return f"vocab_size is {other} in {source.label}, {said} in the merged model"
    size = max([*rows, said or 0])  # a name that only looks like an embedding's must not set the limit
    for file, number in _ids({CONFIG: token_ids(source), **contents}) if size else ():
        if number >= size:
            return f"{file} of {source.label} has the token {number}, the merged model no more than {size} tokens"
    return None


def _said_size(checkpoint: Checkpoint) -> int | None:
    size = text_entry(read_config(checkpoint.directory), "vocab_size")
    return size if isinstance(size, int) else None


def _ids(contents: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """The ids of tokens that files say, each with the file's name."""
    for file, content in contents.items():
        if not isinstance(content, dict):
            continue
        if file in (CONFIG, "generation_config.json"):
            found = [value for name in TOKEN_IDS for value in _listed(content.get(name))]
        elif file in ("added_tokens.json", "vocab.json"):
            found = list(content.values())
        elif file == "tokenizer.json":
            found = [token.get("id") for token in _listed(content.get("added_tokens")) if isinstance(token, dict)]
            model = content.get("model")
            vocabulary = model.get("vocab") if isinstance(model, dict) else None
            found += vocabulary.values() if isinstance(vocabulary, dict) else range(len(_listed(vocabulary)))[-1:]
        else:
            continue
        yield from ((file, number) for number in found if isinstance(number, int))


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]
