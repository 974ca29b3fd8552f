"""What a weight file is, by how it begins; names mislead."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..errors import CheckpointError
from .regular_file import open_regular

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt"})
GGUF_ADVICE = (
    "a GGUF file, which is quantised or in another layout; dequantise it first, for instance with transformers: "
    "torch.save(AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME).state_dict(), 'NEW.bin')"
)
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_OTHERS = {
    b"GGUF": GGUF_ADVICE,
    b"version https://git-lfs": "a pointer of Git LFS in place of the weights, which were not fetched",
    b"<!DOCTYPE": "a web page, not weights: the download failed",
    b"<!doctype": "a web page, not weights: the download failed",
    b"<html": "a web page, not weights: the download failed",
    b"\x89HDF": "an HDF5 file (Keras or TensorFlow); only safetensors and torch files are read",
    b"\x93NUMPY": "a NumPy array; only safetensors and torch files are read",
}


def file_format(path: Path) -> Literal["safetensors", "pickled"]:
    """The format of a weight file. Raises CheckpointError, saying what it is instead, for others."""
    with open(open_regular(path), "rb") as stream:
        beginning = stream.read(32)
    if beginning[8:9] == b"{":
        return "safetensors"
    for start, found in _OTHERS.items():
        if beginning.startswith(start):
            raise CheckpointError(f"{path}: {found}")
    if beginning.startswith((_ZIP, _PICKLE)):
        if path.suffix == ".safetensors":  # torch.load goes by the name
            raise CheckpointError(f"{path}: a torch file, in spite of its name; rename it to {path.stem}.bin")
        return "pickled"
    if path.suffix == ".safetensors":  # what is wrong with it, its reader says
        return "safetensors"
    if path.suffix in PICKLE_SUFFIXES:
        return "pickled"
    raise CheckpointError(f"{path}: not a model directory, and neither a safetensors nor a torch file")


def is_mapped(path: Path) -> bool:
    """Whether a torch file is an archive, whose tensors can be mapped: all since torch 1.6."""
    with open(open_regular(path), "rb") as stream:
        return stream.read(4) == _ZIP
