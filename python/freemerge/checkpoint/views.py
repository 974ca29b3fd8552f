"""Checkpoints seen otherwise: under other names, with tensors that stand in for others, in another layout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from inspect import get_annotations

import torch

from .architecture import Architecture
from .conversion import Layout
from .reader import Checkpoint
from .spec import TensorSpec

# What else a Checkpoint tells is told of it as a whole, whatever its tensors are called.
_BY_NAME = frozenset({"specs", "tied", "made", "copies"})
_WHOLE = tuple(name for name in get_annotations(Checkpoint) if name not in _BY_NAME)


class Wrapped(Checkpoint):
    """Another checkpoint, ``inner``, shown otherwise; it closes with that.

    ``parts``: the tensors of the inner one that a tensor is made from, if not from the one of its own name alone.
    ``computed``: the tensors that are not as the inner one has them.
    """

    def __init__(
        self, inner: Checkpoint, parts: Mapping[str, Sequence[str]], computed: Collection[str] = frozenset()
    ) -> None:
        self.inner, self._parts, self._computed = inner, parts, frozenset(computed)
        for name in _WHOLE:
            setattr(self, name, getattr(inner, name))

    def read(self, name: str) -> torch.Tensor:
        return self.inner.read(self._source(name))

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name in self._computed:
            return super().read_rows(name, start, stop)
        return self.inner.read_rows(self._source(name), start, stop)

    def read_flat(self, names: Sequence[str]) -> torch.Tensor:
        if self._computed.isdisjoint(names):
            return self.inner.read_flat(list(map(self._source, names)))
        return super().read_flat(names)

    def will_need(self, names: Sequence[str]) -> None:
        self.inner.will_need([part for name in names for part in self._parts.get(name, (name,))])

    def device(self, name: str) -> torch.device:
        return self.inner.device(self._source(name))

    def origin(self, name: str) -> str:
        return self.inner.origin(self._source(name))

    def aliases(self, name: str) -> tuple[str, ...]:
        return self.inner.aliases(self._source(name))

    def restored(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.inner.restored(tensors)

    def close(self) -> None:
        self.inner.close()

    def _source(self, name: str) -> str:
        """The tensor of the inner one that this one is made from, or the first of several."""
        parts = self._parts.get(name)
        return name if parts is None else parts[0]

    def _find_architecture(self) -> Architecture | None:
        return self.inner.architecture


class View(Wrapped):
    """Another checkpoint, whose ``sources`` say which of its tensors each name shows."""

    def __init__(self, inner: Checkpoint, sources: Mapping[str, str], tied: Mapping[str, str]) -> None:
        super().__init__(inner, {name: (source,) for name, source in sources.items() if source != name})
        self.tied = dict(tied)
        self.copies = dict(inner.copies)
        self.made = {name: inner.made[source] for name, source in sources.items() if source in inner.made}
        specs = {name: inner.specs[source] for name, source in sorted(sources.items())}
        self.specs = {name: TensorSpec(name, spec.shape, spec.dtype) for name, spec in specs.items()}


def with_stand_ins(inner: Checkpoint, stand_ins: Mapping[str, str]) -> Checkpoint:
    """A checkpoint that has each of the given names as a tensor of its own: its own one, or the one that stands in."""
    sources = {name: name for name in inner.specs} | {
        name: source for name, source in stand_ins.items() if name not in inner.specs
    }
    apart = {frozenset(pair) for pair in stand_ins.items()}  # sources may list a pair in either order
    tied = {name: first for name, first in inner.tied.items() if frozenset((name, first)) not in apart}
    if sources.keys() == inner.specs.keys() and tied == inner.tied:
        return inner
    return _WithStandIns(inner, sources, tied)


class _WithStandIns(View):
    def aliases(self, name: str) -> tuple[str, ...]:
        return self.inner.aliases(name)  # not those of what it stands in for, which is another tensor from now on


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
    """Another checkpoint in another layout; tensors that the layout does not know are as they are.

    ``shapes`` and ``pieces``: of the tensors of this layout their shapes, and the tensors of the other one that they
    consist of; ``replaced``: the tensors of that. ``put_together`` makes one, given its name and what reads the others.
    """

    def __init__(
        self,
        inner: Checkpoint,
        shapes: Mapping[str, tuple[int, ...]],
        pieces: Mapping[str, Sequence[str]],
        replaced: Container[str],
        put_together: Callable[[str, Callable[[str], torch.Tensor]], torch.Tensor],
    ) -> None:
        parts = {
            name: tuple(dict.fromkeys(names))
            for name, names in pieces.items()
            if all(part in inner.specs for part in names)
        }
        super().__init__(inner, parts, parts)
        self._put_together = put_together
        known = {name: TensorSpec(name, shapes[name], inner.specs[names[0]].dtype) for name, names in parts.items()}
        self._others = {name: spec for name, spec in inner.specs.items() if name not in replaced}
        self.specs = dict(sorted((known | self._others).items()))
        self.tied = {}

    def read(self, name: str) -> torch.Tensor:
        return self._put_together(name, self.inner.read) if name in self._parts else self.inner.read(name)


class InFileLayout(_Relaid):
    """The tensors of a module, named and shaped as transformers writes them to files."""

    def __init__(self, inner: Checkpoint, layout: Layout) -> None:
        pieces = {name: [piece.module for piece in found] for name, found in layout.pieces.items()}
        super().__init__(inner, layout.files, pieces, layout.module, layout.file_tensor)
        self.layout = layout
        self.made = {name: inner.made[name] for name in self._others if name in inner.made}
        for name in self._parts:
            parts = sum(inner.made.get(piece.module, 0) for piece in layout.pieces[name])
            if put_together := parts + (0 if layout.is_view(name) else self.specs[name].nbytes):
                self.made[name] = put_together
        tied = {layout.file_name(name): layout.file_name(first) for name, first in inner.tied.items()}
        self.tied = {name: first for name, first in tied.items() if name is not None and first is not None}

    def restored(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        known = {
            name: self.layout.module_tensor(name, tensors.__getitem__)
            for name in self.inner.specs
            if name in self.layout.module and all(piece.file in tensors for piece in self.layout.module[name])
        }
        others = {name: tensor for name, tensor in tensors.items() if name not in self.layout.pieces}
        return self.inner.restored(known | others)

    def aliases(self, name: str) -> tuple[str, ...]:
        modules = dict.fromkeys(piece.module for piece in self.layout.pieces.get(name, ())) or {name: None}
        return tuple(n for module in modules for n in (module, *self.inner.aliases(module)) if n != name)


class InModuleLayout(_Relaid):
    """The tensors of files, named and shaped as transformers holds them in a module."""

    def __init__(self, inner: Checkpoint, layout: Layout) -> None:
        pieces = {name: [piece.file for piece in found] for name, found in layout.module.items()}
        super().__init__(inner, layout.shapes, pieces, layout.pieces, layout.module_tensor)
