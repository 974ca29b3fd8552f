"""Checkpoints seen otherwise: under other names, with tensors that stand in for others, in another layout."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from .architecture import Architecture
from .conversion import Layout
from .reader import Checkpoint
from .spec import TensorSpec


class Wrapped(Checkpoint):
    """Another checkpoint, ``inner``, shown otherwise; it closes with that."""

    def __init__(self, inner: Checkpoint) -> None:
        self.inner = inner
        self.path, self.directory, self.files, self.metadata = inner.path, inner.directory, inner.files, inner.metadata
        self.label, self.name, self.module = inner.label, inner.name, inner.module
        self.dequantised, self.widened, self.set_aside = inner.dequantised, inner.widened, inner.set_aside

    def device(self, name: str) -> torch.device:
        return self.inner.device(self._source(name))

    def origin(self, name: str) -> str:
        return self.inner.origin(self._source(name))

    def restored(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.inner.restored(tensors)

    def close(self) -> None:
        self.inner.close()

    def _source(self, name: str) -> str:
        """The tensor of the inner one that this one is made from, or the first of several."""
        return name

    def _find_architecture(self) -> Architecture | None:
        return self.inner.architecture


class View(Wrapped):
    """Another checkpoint, whose ``sources`` say which of its tensors each name shows."""

    def __init__(self, inner: Checkpoint, sources: Mapping[str, str], tied: Mapping[str, str]) -> None:
        super().__init__(inner)
        self._sources = dict(sorted(sources.items()))
        self.tied = dict(tied)
        self.copies = dict(inner.copies)
        self.made = {name: inner.made[source] for name, source in self._sources.items() if source in inner.made}
        specs = {name: inner.specs[source] for name, source in self._sources.items()}
        self.specs = {name: TensorSpec(name, spec.shape, spec.dtype) for name, spec in specs.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.inner.read(self._sources[name])

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.inner.read_rows(self._sources[name], start, stop)

    def will_need(self, names: Sequence[str]) -> None:
        self.inner.will_need([self._sources[name] for name in names])

    def read_flat(self, names: Sequence[str]) -> torch.Tensor:
        return self.inner.read_flat([self._sources[name] for name in names])

    def aliases(self, name: str) -> tuple[str, ...]:
        return self.inner.aliases(name)

    def _source(self, name: str) -> str:
        return self._sources[name]


def with_stand_ins(inner: Checkpoint, stand_ins: Mapping[str, str]) -> Checkpoint:
    """A checkpoint that has each of the given names as a tensor of its own: its own one, or the one that stands in."""
    sources = {name: name for name in inner.specs} | {
        name: source for name, source in stand_ins.items() if name not in inner.specs
    }
    apart = {frozenset(pair) for pair in stand_ins.items()}  # sources may list a pair in either order
    tied = {name: first for name, first in inner.tied.items() if frozenset((name, first)) not in apart}
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


def without(inner: Checkpoint, names: Collection[str]) -> Checkpoint:
    """A checkpoint without some of its tensors; what is :meth:`restored` has them as they are."""
    hidden = {name: name for name in inner.specs if name in names}
    return _Without(inner, hidden) if hidden else inner


class _Without(View):
    def __init__(self, inner: Checkpoint, hidden: Mapping[str, str]) -> None:
        shown = {name: name for name in inner.specs if name not in hidden}
        tied = {name: first for name, first in inner.tied.items() if name in shown and first in shown}
        super().__init__(inner, shown, tied)
        self._hidden = hidden

    def restored(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {name: self.inner.read(name).clone(memory_format=torch.contiguous_format) for name in self._hidden}
        return self.inner.restored({**tensors, **kept})


class _Relaid(Wrapped):
    """Another checkpoint in another layout; tensors that the layout does not know are as they are."""

    def __init__(self, inner: Checkpoint, layout: Layout) -> None:
        super().__init__(inner)
        self.layout = layout


class InFileLayout(_Relaid):
    """The tensors of a module, named and shaped as transformers writes them to files."""

    def __init__(self, inner: Checkpoint, layout: Layout) -> None:
        super().__init__(inner, layout)
        known = {
            name: TensorSpec(name, shape, inner.specs[layout.pieces[name][0].module].dtype)
            for name, shape in layout.files.items()
            if all(piece.module in inner.specs for piece in layout.pieces[name])
        }
        others = {name: spec for name, spec in inner.specs.items() if name not in layout.module}
        self.specs = dict(sorted((known | others).items()))
        self.made = {name: inner.made[name] for name in others if name in inner.made}
        for name in known:
            parts = sum(inner.made.get(piece.module, 0) for piece in layout.pieces[name])
            if put_together := parts + (0 if layout.is_view(name) else self.specs[name].nbytes):
                self.made[name] = put_together
        tied = {layout.file_name(name): layout.file_name(first) for name, first in inner.tied.items()}
        self.tied = {name: first for name, first in tied.items() if name is not None and first is not None}

    def read(self, name: str) -> torch.Tensor:
        if name not in self.layout.pieces:
            return self.inner.read(name)
        return self.layout.file_tensor(name, self.inner.read)

    def restored(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        known = {
            name: self.layout.module_tensor(name, tensors.__getitem__)
            for name in self.inner.specs
            if name in self.layout.module and all(piece.file in tensors for piece in self.layout.module[name])
        }
        others = {name: tensor for name, tensor in tensors.items() if name not in self.layout.pieces}
        return self.inner.restored(known | others)

    def aliases(self, name: str) -> tuple[str, ...]:
        pieces = self.layout.pieces.get(name, [])
        modules = dict.fromkeys(piece.module for piece in pieces) if pieces else {name: None}
        return tuple(n for module in modules for n in (module, *self.inner.aliases(module)) if n != name)

    def _source(self, name: str) -> str:
        return self.layout.pieces[name][0].module if name in self.layout.pieces else name


class InModuleLayout(_Relaid):
    """The tensors of files, named and shaped as transformers holds them in a module."""

    def __init__(self, inner: Checkpoint, layout: Layout) -> None:
        super().__init__(inner, layout)
        known = {
            name: TensorSpec(name, shape, inner.specs[layout.module[name][0].file].dtype)
            for name, shape in layout.shapes.items()
            if all(piece.file in inner.specs for piece in layout.module[name])
        }
        others = {name: spec for name, spec in inner.specs.items() if name not in layout.pieces}
        self.specs = dict(sorted((known | others).items()))
        self.tied = {}

    def read(self, name: str) -> torch.Tensor:
        if name not in self.layout.module:
            return self.inner.read(name)
        return self.layout.module_tensor(name, self.inner.read)

    def _source(self, name: str) -> str:
        return self.layout.module[name][0].file if name in self.layout.module else name
