"""State dicts saved by torch.save, loaded without running code from the file."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import CheckpointError
from .safetensors_file import open_regular

_REOPEN_AFTER_BYTES = 256 << 20


class PickledFile:
    """One ``.bin``, ``.pt`` or ``.pth`` file holding a state dict, memory-mapped if it is in torch's zip format.

    The map is of the whole file, so pages that were read stay resident; it is opened anew after every few hundred
    megabytes read, which lets go of them. Files in torch's format from before 1.6 are loaded into memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = self._load()
        self._handed_out = 0

    @property
    def state(self) -> Mapping[str, torch.Tensor]:
        """The tensors by name, in the file's order."""
        return self._state

    def read(self, name: str) -> torch.Tensor:
        """One tensor, a view of the mapped file."""
        if self._handed_out > _REOPEN_AFTER_BYTES:
            self._state = self._load()
            self._handed_out = 0
        tensor = self._state[name]
        self._handed_out += tensor.nbytes
        return tensor

    def _load(self) -> dict[str, torch.Tensor]:
        with open(open_regular(self.path), "rb") as stream:
            is_zip = stream.read(4) == b"PK\x03\x04"
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError as error:
            reason = str(error).split("\n")[0]
            raise CheckpointError(f"{self.path}: refused, it is not plain tensors (weights_only): {reason}") from None
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path}: not a readable torch file: {error}") from None
        if not isinstance(state, Mapping):
            raise CheckpointError(f"{self.path}: holds a {type(state).__name__}, not a state dict")
        return {name: check_dense(str(self.path), name, value) for name, value in state.items()}


def check_dense(source: str, name: object, value: object) -> torch.Tensor:
    """A state dict's entry if it is an ordinary tensor with data; CheckpointError naming it otherwise."""
    if not isinstance(name, str):
        raise CheckpointError(f"{source}: not a state dict (it has the key {name!r})")
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f"{source}: not a state dict ({name!r} is a {type(value).__name__}, not a tensor)")
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        kind = "on the meta device" if value.is_meta else "quantized" if value.is_quantized else str(value.layout)
        raise CheckpointError(f"{source}: tensor {name!r} is {kind}; only dense tensors with data can be read")
    return value.detach()
