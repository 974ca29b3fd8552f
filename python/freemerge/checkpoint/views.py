"""Checkpoints seen otherwise: under other names, or with tensors that stand in for others."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .architecture import Architecture
from .reader import Checkpoint
from .spec import TensorSpec


class View(Checkpoint):
    """Another checkpoint, whose ``sources`` say which of its tensors each name shows. It closes with the inner one."""

    def __init__(self, inner: Checkpoint, sources: Mapping[str, str], tied: Mapping[str, str]) -> None:
        self.inner = inner
        self.path, self.directory, self.files = inner.path, inner.directory, inner.files
        self.label, self.name, self.module = inner.label, inner.name, inner.module
        self._sources = dict(sorted(sources.items()))
        self.tied = dict(tied)
        self.copies = dict(inner.copies)
        specs = {name: inner.specs[source] for name, source in self._sources.items()}
        self.specs = {name: TensorSpec(name, spec.shape, spec.dtype) for name, spec in specs.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.inner.read(self._sources[name])

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.inner.read_rows(self._sources[name], start, stop)

    def device(self, name: str) -> torch.device:
        return self.inner.device(self._sources[name])

    def origin(self, name: str) -> str:
        return self.inner.origin(self._sources[name])

    def close(self) -> None:
        self.inner.close()

    def _find_architecture(self) -> Architecture | None:
        return self.inner.architecture


def with_stand_ins(inner: Checkpoint, stand_ins: Mapping[str, str]) -> Checkpoint:
    """A checkpoint that has each of the given names as a tensor of its own: its own one, or the one that stands in."""
    sources = {name: name for name in inner.specs} | {
        name: source for name, source in stand_ins.items() if name not in inner.specs
    }
    tied = {name: first for name, first in inner.tied.items() if name not in stand_ins}
    if sources.keys() == inner.specs.keys() and tied == inner.tied:
        return inner
    return View(inner, sources, tied)


def renamed(inner: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """A checkpoint under other names; ``names`` maps some of its own to new ones."""
    changed = {name: new for name, new in names.items() if new != name}
    if not changed:
        return inner
    sources = {changed.get(name, name): name for name in inner.specs}
    tied = {changed.get(name, name): changed.get(first, first) for name, first in inner.tied.items()}
    return View(inner, sources, tied)
