"""State dicts saved by torch.save, loaded without running code from the file."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path

import torch

from ..errors import CheckpointError
from .containers import SEPARATOR, state_dict_in
from .file_format import is_mapped
from .legacy_storages import stored_entries
from .regular_file import check_unchanged, identity
from .state_dict import dense_tensors, specs_of, tied_names

_RELEASE_AFTER_BYTES = 256 << 20


class PickledFile:
    """One ``.bin``, ``.pt``, ``.pth`` or ``.ckpt`` file holding a state dict; mapped if it is in torch's zip format.

    ``key`` says where in the file the state dict is, if there is more than one. The map is of the whole file, so pages
    that were read stay resident until it is released; the next read maps it anew. Files in torch's format from before
    1.6 cannot be mapped and are held in memory. A file that was replaced or rewritten since it was opened is refused.
    """

    def __init__(self, path: Path, key: str = "") -> None:
        self.path, self._place, self._key = path, path.absolute(), key
        self._mapped = is_mapped(path)
        self.identity = identity(path)
        self._bytes = self.identity[0]
        if self._mapped:
            _check_archive(path, self._bytes)
        else:
            _check_storages(path, self._bytes)
        state = self._load()
        self.specs = specs_of(state)
        self.tied = tied_names(state)
        self._state: dict[str, torch.Tensor] | None = state
        self._touched = 0

    def read(self, name: str) -> torch.Tensor:
        """One tensor, a view of the mapped file."""
        check_unchanged(self._place, self.identity, self.path)
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
            content = torch.load(self._place, map_location="cpu", weights_only=True, mmap=self._mapped)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{self.path}: {_not_tensors(str(error))}") from None
        except Exception:  # a damaged or hostile file can make the unpickler raise anything
            raise CheckpointError(f"{self.path}: not a readable torch file: damaged, cut, or of another kind") from None
        source = f"{self.path}{SEPARATOR}{self._key}" if self._key else str(self.path)
        found = state_dict_in(content, source, self._key)
        state = dense_tensors(source, found)
        self.left_out = [str(name) for name in found if name not in state]
        for name, tensor in state.items():
            if tensor.nbytes > self._bytes:
                raise CheckpointError(
                    f"{source}: tensor {name!r} would take {tensor.nbytes} bytes, the whole file has {self._bytes}"
                )
        return state


def _check_storages(path: Path, file_bytes: int) -> None:
    """Refuse a file whose tensors have more entries than it has bytes."""
    try:
        entries = stored_entries(path)
    except Exception:
        raise CheckpointError(f"{path}: not a readable torch file: damaged, cut, or of another kind") from None
    if entries > file_bytes:
        raise CheckpointError(f"{path}: its tensors have {entries} entries, the whole file has {file_bytes} bytes")


def _not_tensors(reason: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", reason)
    what = f"objects of {found.group(1)}" if found else "objects"
    return (
        f"refused, it holds {what}, not plain tensors, and opening it could run code; if you trust it, open it with "
        "torch.load(PATH, weights_only=False) and save the state dict alone with torch.save"
    )


def _check_archive(path: Path, file_bytes: int) -> None:
    """Refuse an archive that would be expanded: torch maps its records as they are."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        raise CheckpointError(f"{path}: not a readable torch file: damaged, cut, or of another kind") from None
    if any(record.filename.endswith("/constants.pkl") for record in records):
        raise CheckpointError(
            f"{path}: a TorchScript program; save its tensors: torch.save(torch.jit.load(PATH).state_dict(), NEW)"
        )
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise CheckpointError(
            f"{path}: its records are compressed, which torch.save does not do; write it again: "
            "torch.save(torch.load(PATH, weights_only=True), NEW)"
        )
    if sum(record.file_size for record in records) > file_bytes:
        raise CheckpointError(f"{path}: not a readable torch file: its records are larger than the file")
