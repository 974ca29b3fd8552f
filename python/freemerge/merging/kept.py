"""What was merged when the scale was looked for, kept in a file until it is merged at that scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from io import RawIOBase

import torch
from torch import Tensor

from ..dense import bytes_of
from ..methods import Merged


@dataclass(frozen=True)
class _Place:
    offset: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Kept:
    """Merged task vectors by the names of their tensors, bit for bit, in ``file``.

    A disk that is full by then is no error, nor is one that fails: what is not kept is merged again.
    """

    def __init__(self, file: RawIOBase) -> None:
        self._file = file
        self._end = 0
        self._merged: dict[tuple[str, ...], tuple[list[_Place], Merged]] = {}

    def close(self) -> None:
        """Free the room."""
        self._merged.clear()
        self._file.close()

    def __contains__(self, names: Sequence[str]) -> bool:
        return tuple(names) in self._merged

    def put(self, names: Sequence[str], merged: Merged) -> None:
        """Keep what the tensors of a unit were merged to."""
        if self._file.closed:
            return
        places = []
        try:
            self._file.seek(self._end)
            for tensor in merged.tensors:
                places.append(_Place(self._end, tensor.shape, tensor.dtype, tensor.device))
                raw = bytes_of(tensor)
                while len(raw):
                    raw = raw[self._file.write(raw) :]
                self._end += tensor.numel() * tensor.itemsize
        except OSError:
            self.close()
            return
        self._merged[tuple(names)] = places, dataclasses.replace(merged, addends=[])

    def take(self, names: Sequence[str]) -> Merged | None:
        """New tensors with what was kept of a unit; None if nothing was."""
        if tuple(names) not in self._merged:
            return None
        places, merged = self._merged[tuple(names)]
        try:
            return dataclasses.replace(merged, addends=list(map(self._read, places)))
        except OSError:
            return None

    def _read(self, place: _Place) -> Tensor:
        tensor = torch.empty(place.shape, dtype=place.dtype, device="cpu")
        self._file.seek(place.offset)
        raw = bytes_of(tensor)
        while len(raw):
            count = self._file.readinto(raw)
            if not count:
                raise OSError("the file has lost its end")
            raw = raw[count:]
        return tensor.to(place.device)
