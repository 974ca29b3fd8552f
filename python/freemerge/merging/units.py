"""Which tensors of a checkpoint are filtered, merged or copied, and how they are seen as matrices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor

from ..checkpoint import MERGEABLE, TensorSpec
from ..checkpoint.quantised import FLOAT8, FLOAT8_ADVICE
from ..dense import same_bits
from ..errors import ArgumentError, CheckpointError
from ..methods.layers import is_convolution
from .selection import Action, Rule, Split, Stack, View, check_rules, left_alone, rule_of
from .statistics_buffers import is_statistic

SMALL_ENTRIES = 1 << 16  # a tensor of at most so many is merged together with others, of
FLAT_ENTRIES = 1 << 20  # at most so many entries together, and
FLAT_NAMES = 1 << 11  # so many tensors


@dataclass(frozen=True)
class Unit:
    """Tensors that are merged together: usually one; several where a view stacks them.

    ``parts``: rows of each matrix the (stacked) rows are filtered as; empty where the tensor is filtered whole.
    ``flat``: small tensors that are merged end to end, as one vector. ``must_agree``: a copied tensor that has to be
    equal in all models, because no rule asked for the base's.
    """

    names: tuple[str, ...]
    action: Action
    parts: tuple[int, ...] = ()
    must_agree: bool = False
    flat: bool = False

    @property
    def by_method(self) -> bool:
        """Whether the method merges it, and so measures it; others are averaged or copied whatever the method."""
        return self.action in ("filter", "merge")

    @property
    def base_alone(self) -> bool:
        """Whether it is copied without a look at the models."""
        return self.action == "copy" and not self.must_agree


def default_action(spec: TensorSpec) -> Action:
    """Matrices (and stacks of matrices, as mixture-of-experts weights) are filtered; other floats are merged.

    One-dimensional and empty tensors and convolution kernels (3-D ones have a short side, or "conv" in their name) are
    merged unfiltered; integer and other buffers are copied.
    """
    if spec.dtype not in MERGEABLE:
        return "copy"
    matrices = spec.ndim > 1 and spec.numel > 0 and not is_convolution(spec.name, spec.shape)
    return "filter" if matrices else "merge"


def plan_units(
    specs: Mapping[str, TensorSpec],
    select: Sequence[Rule] = (),
    views: Sequence[View] = (),
    *,
    others: Iterable[str] = (),
    second: Mapping[str, str] | None = None,
    aliases: Callable[[str], Sequence[str]] = lambda name: (),
    buffers: Collection[str] = (),
) -> list[Unit]:
    """Decide what happens to every tensor of ``specs``, in their order. The first matching rule wins.

    Args:
        specs: the base's tensors; those that a rule drops get no unit.
        others: names that only other inputs have, which rules may match, too.
        second: second names of tied tensors, with the first ones, which rules have to match.
        aliases: further names of a tensor, which rules may use.
        buffers: names of tensors that are not parameters: they are averaged as running statistics are.

    Raises ArgumentError for a rule or view that matches nothing or cannot apply: a misspelt pattern must not pass.
    """
    known = {name: (name, *aliases(name)) for name in (*specs, *others)}
    check_rules(select, known, second)
    rules = {name: rule_of(known[name], select) for name in specs}
    actions = {
        name: _action(spec, rules[name], statistic=name in buffers or is_statistic(name))
        for name, spec in specs.items()
    }
    stacked, splits = _resolve_views(specs, actions, views)
    units: list[Unit] = []
    for name, spec in specs.items():
        action = actions[name]
        if name in stacked:
            group = stacked[name]
            if group[0] == name:
                units.append(Unit(group, "filter"))
        elif name in splits:
            units.append(Unit((name,), "filter", splits[name].rows(name, spec.shape[-2])))
        elif action != "drop":
            agree = action == "copy" and not (left_alone(known[name], select) or is_statistic(name))
            units.append(Unit((name,), action, must_agree=agree))
    return units


def without_matrices(units: Iterable[Unit]) -> Iterator[Unit]:
    """The same tensors for a method that does not treat matrices differently: each one merged entry by entry."""
    for unit in units:
        yield from (Unit((name,), "merge") for name in unit.names) if unit.action == "filter" else (unit,)


def together(units: Iterable[Unit], specs: Mapping[str, TensorSpec], kind: Callable[[str], Hashable]) -> Iterator[Unit]:
    """The same units, but as one small tensors of one kind that are merged entry by entry and follow each other."""
    names: list[str] = []
    entries = 0
    shared: Hashable = None
    for unit in units:
        numel = specs[unit.names[0]].numel
        small = unit.action == "merge" and len(unit.names) == 1 and numel <= SMALL_ENTRIES
        own = kind(unit.names[0]) if small else None
        full = entries + numel > FLAT_ENTRIES or len(names) == FLAT_NAMES
        if names and (not small or own != shared or full):
            yield Unit(tuple(names), "merge", flat=len(names) > 1)
            names, entries = [], 0
        if small:
            names.append(unit.names[0])
            entries, shared = entries + numel, own
        else:
            yield unit
    if names:
        yield Unit(tuple(names), "merge", flat=len(names) > 1)


def _action(spec: TensorSpec, rule: Rule | None, *, statistic: bool) -> Action:
    if rule is not None and rule.action in ("copy", "drop"):
        return rule.action
    if spec.dtype not in MERGEABLE:
        if rule is not None and rule.pattern == spec.name:
            raise ArgumentError(f"select: {spec.name} has dtype {spec.dtype}, which can only be copied")
        return "copy"
    if statistic:
        return "average"
    if rule is None:
        return default_action(spec)
    return rule.action if rule.action == "average" or (spec.shape and spec.numel) else "merge"


def _resolve_views(
    specs: Mapping[str, TensorSpec], actions: Mapping[str, Action], views: Iterable[View]
) -> tuple[dict[str, tuple[str, ...]], dict[str, Split]]:
    """Map each viewed tensor to its stack of names (in stacking order) or to its split."""
    stacked: dict[str, tuple[str, ...]] = {}
    splits: dict[str, Split] = {}
    for view in views:
        found = False
        pattern = view.patterns[0] if isinstance(view, Stack) else view.pattern
        for name, spec in specs.items():
            if not fnmatchcase(name, pattern) or actions[name] != "filter":
                continue
            if len(spec.shape) != 2 and not (isinstance(view, Split) and len(spec.shape) == 3):
                raise ArgumentError(
                    f"views: {name} has shape {spec.shape}; only matrices can be stacked, and stacks of them split"
                )
            group = _stack_of(name, view, specs) if isinstance(view, Stack) else (name,)
            for member in group:
                if member in stacked or member in splits:
                    raise ArgumentError(f"views: {member} is in more than one view")
                if actions[member] != "filter":
                    raise ArgumentError(f"views: {member} is stacked for filtering, but selected to {actions[member]}")
                if isinstance(view, Stack):
                    stacked[member] = group
                else:
                    splits[member] = view
            found = True
        if not found:
            raise ArgumentError(f"views: pattern {pattern!r} matches no filtered tensor")
    return stacked, splits


def _stack_of(name: str, view: Stack, specs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    head, tail = view.patterns[0].split("*")
    shared = name[len(head) : len(name) - len(tail)]
    group = tuple(pattern.replace("*", shared) for pattern in view.patterns)
    for member in group:
        if member not in specs:
            raise ArgumentError(f"views: {name} is to be stacked with {member}, which does not exist")
        if len(specs[member].shape) != 2 or specs[member].shape[1] != specs[name].shape[1]:
            raise ArgumentError(
                f"views: {member} {specs[member].shape} cannot be stacked below {name} {specs[name].shape}"
            )
    return group


def require_equal(name: str, base: Tensor, model: Tensor, source: str) -> None:
    """Raise CheckpointError unless a tensor that cannot be merged has the same bytes in the base and in a model."""
    if not same_bits(base, model):
        if base.dtype in FLOAT8:
            raise CheckpointError(f"{source}: tensor {name} differs from the base's and is {FLOAT8_ADVICE}")
        raise CheckpointError(
            f"{source}: tensor {name} ({base.dtype}) cannot be merged and differs from the base's; "
            f"select it with action 'copy' to take the base's"
        )
