"""State dicts saved by torch.save, loaded without running code from the file."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import CheckpointError
from .safetensors_file import open_regular
from .state_dict import dense_tensors, specs_of, tied_names

_RELEASE_AFTER_BYTES = 256 << 20


class PickledFile:
    """One ``.bin``, ``.pt`` or ``.pth`` file holding a state dict, memory-mapped if it is in torch's zip format.

    The map is of the whole file, so pages that were read stay resident until it is released; the next read maps it
    anew. Files in torch's format from before 1.6 cannot be mapped and are held in memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(open_regular(path), "rb") as stream:
            self._mapped = stream.read(4) == b"PK\x03\x04"
        state = self._load()
        self.specs = specs_of(state)
        self.tied = tied_names(state)
        self._state: dict[str, torch.Tensor] | None = state
        self._touched = 0

    def read(self, name: str) -> torch.Tensor:
        """One tensor, a view of the mapped file."""
        if self._touched > _RELEASE_AFTER_BYTES:
            self.release()
        state = self._state
        if state is None:
            state = self._state = self._load()
        self._touched += self.specs[name].nbytes
        return state[name]

    def release(self) -> None:
        """Let go of the pages read so far, but for those of tensors still in use."""
        if self._mapped:
            self._state = None
            self._touched = 0

    def _load(self) -> dict[str, torch.Tensor]:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._mapped)
        except pickle.UnpicklingError as error:
            reason = str(error).split("\n")[0]
            raise CheckpointError(f"{self.path}: refused, it is not plain tensors (weights_only): {reason}") from None
        except Exception as error:  # a damaged or hostile file can make the unpickler raise anything
            raise CheckpointError(f"{self.path}: not a readable torch file: {error}") from None
        if not isinstance(state, Mapping):
            raise CheckpointError(f"{self.path}: holds a {type(state).__name__}, not a state dict")
        return dense_tensors(str(self.path), state)
