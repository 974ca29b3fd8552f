"""Everything of a model directory that is not weights: copied from the base to the merged model."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from ..dense import dtype_name
from ..errors import CheckpointError
from .architecture import CONFIG
from .json_file import read_json, write_json
from .locate import entry
from .quantised import without_quantisation
from .reader import Checkpoint
from .regular_file import open_regular
from .side_files import is_tokenizer_file, part_weights
from .target import MANIFEST, WEIGHT_SUFFIXES
from .tied import with_untied_embeddings
from .vocabulary import token_ids

_FORMAT_DIRECTORIES = frozenset({"onnx", "openvino", "coreml", "gguf", "original", "runs", "logs"})
# The card is written anew, and an adapter's or a trainer's record does not describe the merged model.
_LEFT_OUT = frozenset({"README.md", MANIFEST, "adapter_config.json"})
# Weights, their indexes, of variants too, and the parts that TensorFlow writes.
_WEIGHT = re.compile(
    rf"({'|'.join(map(re.escape, WEIGHT_SUFFIXES))})(\.index(\.\w+)?\.json|\.index|\.meta|\.data-\d+-of-\d+)?$"
)
_DTYPE_KEYS = ("torch_dtype", "dtype")


def carry_over(
    base: Path,
    target: Path,
    *,
    out_dtype: torch.dtype | None = None,
    untied: bool = False,
    dequantised: bool = False,
    in_floats: bool = False,
    tokenizer: Checkpoint | None = None,
) -> None:
    """Copy config, tokenizer, generation settings, chat templates, licence and custom code from ``base`` to ``target``.

    Left out are weights in any format and their indexes, but for further modules of sentence-transformers, exports
    (``onnx/`` and the like), training checkpoints and their results, hidden files and the model card. ``out_dtype``, if
    given, is written into ``config.json``; so is that the embeddings are not tied, if they are ``untied``. How weights
    were quantised is left out of it if they are ``dequantised``, to float32 without ``out_dtype``, or are stored
    ``in_floats`` whatever it says. The files of the tokenizer and the special tokens come from ``tokenizer``, if it is
    given.

    Raises what :func:`carried` does, before anything is copied, CheckpointError for what cannot be read, and OSError
    for what cannot be written.
    """
    sources = carried(base, tokenizer)
    for name in sorted(sources):
        destination = target / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        with open(open_regular(sources[name]), "rb") as source, open(destination, "wb") as sink:
            for piece in _pieces(source, sources[name]):
                sink.write(piece)
    if dequantised and out_dtype is None:
        out_dtype = torch.float32
    ids = {} if tokenizer is None else token_ids(tokenizer)
    if (out_dtype is not None or untied or ids or in_floats) and CONFIG in sources:
        config = read_json(base / CONFIG)
        if not isinstance(config, dict):
            raise CheckpointError(f"{base / CONFIG}: not a JSON object")
        config |= ids
        if out_dtype is not None:
            _set_dtype(config, dtype_name(out_dtype))
        if dequantised or in_floats:
            config = without_quantisation(config)
        if untied:
            config = with_untied_embeddings(config)
        write_json(target / CONFIG, config)


def _pieces(source: BinaryIO, path: Path) -> Iterator[bytes]:
    """What a file holds."""
    while True:
        try:
            piece = source.read(1 << 20)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        if not piece:
            return
        yield piece


def carried(base: Path, tokenizer: Checkpoint | None = None) -> dict[str, Path]:
    """What :func:`carry_over` copies, by the relative names.

    Raises CheckpointError for a symbolic link among it that leads nowhere or out of its directory, and for what is no
    regular file.
    """
    other = None if tokenizer is None else tokenizer.directory
    if other is None:
        return {name: base / name for name in _carried(base, base)} | part_weights(base)
    own = _carried(base, base, lambda name: not is_tokenizer_file(name))
    theirs = _carried(other, other, is_tokenizer_file)
    return {name: base / name for name in own} | part_weights(base) | {name: other / name for name in theirs}


def _carried(base: Path, directory: Path, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    names: list[str] = []
    for item in sorted(os.scandir(directory), key=lambda item: item.name):
        path = Path(item.path)
        if item.is_dir(follow_symlinks=False):
            if not item.name.startswith((".", "checkpoint-", "global_step")) and item.name not in _FORMAT_DIRECTORIES:
                names += _carried(base, path, wanted)
            continue
        if item.name.startswith((".", "trainer_")) or item.name.endswith("_results.json"):
            continue
        name = path.relative_to(base).as_posix()
        if item.name in _LEFT_OUT or _WEIGHT.search(name) or not wanted(name):
            continue
        if not entry(directory, item.name, home=base).is_file():
            raise CheckpointError(f"{path} is not a regular file")
        names.append(name)
    return names


def _set_dtype(config: dict[str, object], dtype: str) -> None:
    if not any(key in config for key in _DTYPE_KEYS):
        config[_DTYPE_KEYS[0]] = dtype
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _DTYPE_KEYS:
            if isinstance(part.get(key), str):
                part[key] = dtype
