"""Names that differ by a prefix: wrappers that add nothing, and parts of larger models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from torch import nn

from ..lazy import cached_property
from .spec import TensorSpec

# Attributes under which torch.compile, FSDP, activation checkpointing, DDP, DataParallel, Fabric and Opacus keep the
# module they wrap.
_ANYWHERE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_IN_FRONT = frozenset({"module", "_forward_module", "_module"})
WRAPPERS = _ANYWHERE | _IN_FRONT
_COUNTERS = frozenset({"n_averaged"})  # what AveragedModel holds beside the module
_TRIED = 5

Rename = tuple[str, str]  # (old, new): names that begin with old begin with new


def unwrapped(name: str) -> str:
    """A name without what wrappers add to it."""
    parts = [part for part in name.split(".") if part not in _ANYWHERE]
    while len(parts) > 1 and parts[0] in _IN_FRONT:
        parts = parts[1:]
    return ".".join(parts)


def inner_module(module: nn.Module) -> tuple[str, nn.Module]:
    """The module inside of a wrapper, and what the wrapper puts before its names; itself, if it is none."""
    prefix = ""
    while len(module._modules) == 1 and not module._parameters and module._buffers.keys() <= _COUNTERS:
        name, inner = next(iter(module._modules.items()))
        if name not in WRAPPERS or inner is None:
            break
        prefix, module = f"{prefix}{name}.", inner
    return prefix, module


def counters(names: Collection[str]) -> set[str]:
    """What a wrapper counts, among the names of a model that it wraps."""
    found = {name for name in names if _inside_wrappers(name) in _COUNTERS}
    wrapped = all(name in found or name.partition(".")[0] in WRAPPERS for name in names)
    return found if wrapped else set()


def _inside_wrappers(name: str) -> str:
    parts = name.split(".")
    while parts[0] in WRAPPERS and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts)


class Naming:
    """What the base calls a model's tensors.

    Wrappers are seen through; otherwise the first of ``renames`` that gives a name of the base counts, or else what
    ``loaded_name`` makes of a name and of one of the base's. A name that the base has in no form stays as it is.
    """

    def __init__(
        self,
        base: Iterable[str],
        renames: Sequence[Rename] = (),
        loaded_name: Callable[[str], str] | None = None,
    ) -> None:
        self._renames = renames
        self._loaded_name = loaded_name
        self._base = set(base)

    @cached_property
    def _unwrapped(self) -> dict[str, str]:
        return {unwrapped(name): name for name in sorted(self._base, reverse=True)}

    @cached_property
    def _loaded(self) -> dict[str, str]:
        return {} if self._loaded_name is None else {self._loaded_name(name): name for name in sorted(self._base)}

    def __call__(self, name: str) -> str:
        changed = (new + name[len(old) :] for old, new in self._renames if name.startswith(old))
        for candidate in (name, *changed):
            if candidate in self._base:
                return candidate
            if unwrapped(candidate) in self._unwrapped:
                return self._unwrapped[unwrapped(candidate)]
        if self._loaded_name is not None:
            return self._loaded.get(self._loaded_name(unwrapped(name)), name)
        return name

    def of(self, names: Collection[str]) -> dict[str, str]:
        """The new name of each that the base lacks; those that would take another's stay as they are."""
        new = {name: self(name) for name in names if name not in self._base}
        taken = Counter(new.values())
        return {name: to if taken[to] == 1 and to not in names else name for name, to in new.items()}


def prefix_change(
    found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec], *, of_modules: bool = False
) -> Rename | None:
    """The change of prefix that gives most of the names ``found`` the names ``expected``, with the same shapes.

    None unless it explains half of the names on the smaller side. ``of_modules``: for names beside others that agree; a
    prefix is then that of a module, all of whose names have to fit: a classifier is no other name of a head that it is
    partly like.
    """
    by_ending: dict[tuple[str, ...], list[str]] = {}
    for name in expected:
        parts = name.split(".")
        for start in range(len(parts)):
            by_ending.setdefault(tuple(parts[start:]), []).append(name)
    ordered = sorted(found, key=len)
    changes: dict[Rename, None] = {}
    for name in (*ordered[:_TRIED], *ordered[-_TRIED:]):
        parts = name.split(".")
        for start in range(len(parts)):
            alike = by_ending.get(tuple(parts[start:]), ())
            for other in alike[:_TRIED]:
                changes[_prefix(parts[:start]), other[: len(other) - len(".".join(parts[start:]))]] = None
            if alike:  # the longest common ending
                break

    if of_modules:
        begun = {old: sum(name.startswith(old) for name in found) for old, _ in changes if old}
        changes = {c: None for c in changes if not c[0] or explained(c, found, expected) == begun[c[0]]}
    best = max(changes, key=lambda change: explained(change, found, expected), default=None)
    if best is None or 2 * explained(best, found, expected) < min(len(found), len(expected)):
        return None
    return best


def explained(change: Rename, found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec]) -> int:
    """How many of the names ``found`` a change makes names ``expected``, with the same shapes."""
    names = ((change[1] + name[len(change[0]) :], spec) for name, spec in found.items() if name.startswith(change[0]))
    return sum(name in expected and expected[name].shape == spec.shape for name, spec in names)


def _prefix(parts: Sequence[str]) -> str:
    return "".join(f"{part}." for part in parts)
