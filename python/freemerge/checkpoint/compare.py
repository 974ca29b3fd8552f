"""Do a base and its fine-tuned models fit together? Asked before any tensor is read or written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from ..dense import dtype_name
from ..errors import CheckpointError, counted
from .patterns import patterns_for
from .prefixes import explained, prefix_change
from .reader import Checkpoint
from .spec import MERGEABLE
from .tied import copied_names, first_names, same_values
from .vocabulary import VOCABULARY

_LISTED = 10
_RULES = 20


@dataclass(frozen=True)
class Comparison:
    """What a base and its models agree on.

    Attributes:
        names: the tensors that all have and that ``merged`` selected, sorted, without second names of tied tensors.
        tied: second name -> first name, for sources that show both (in memory, torch files). The first is in ``names``.
        mixed_dtypes: tensors whose float dtype differs, with the dtypes of base and models in order.
    """

    names: tuple[str, ...]
    tied: dict[str, str]
    mixed_dtypes: dict[str, tuple[torch.dtype, ...]]


def compare(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    *,
    merged: Callable[[str], bool] = lambda name: True,
    heeded: Callable[[str], bool] = lambda name: True,
) -> Comparison:
    """Check that every model has the base's tensors, and no others, in the same shapes.

    ``merged(name)`` tells which tensors take part; the rest come from the base alone, so models may differ in them.
    ``heeded(name)``: whether what lies under a second name has to be the tensor that it is tied to.
    Raises CheckpointError that names tensors and models. Reads no tensor, except to explain a tied head.
    """
    everyone = (base, *models)
    tied = _tied_names(everyone, merged, heeded)
    chosen = {name for name in set().union(*(one.specs for one in everyone)) if merged(name)} - tied.keys()
    expected = chosen & base.specs.keys()
    for model in models:
        _check_names(base, model, expected, chosen & model.specs.keys())
    # What is stored in the same shape and dtype everywhere, most tensors as a rule, needs no look one by one.
    odd = {model: sorted(expected & dict(model.specs.items() - base.specs.items()).keys()) for model in models}
    for model, names in odd.items():
        _check_shapes(base, model, names)
        _check_kinds(base, model, names)
    mixed = {}
    for name in sorted(set().union(*odd.values())):
        dtypes = tuple(checkpoint.specs[name].dtype for checkpoint in everyone)
        if len(set(dtypes)) > 1:
            mixed[name] = dtypes
    return Comparison(tuple(sorted(expected)), tied, mixed)


def mixed_dtype_notices(comparison: Comparison, models: Sequence[Checkpoint]) -> list[str]:
    """A line for each model, and pair of dtypes, whose tensors are stored otherwise than the base's."""
    found: dict[tuple[int, str, str], int] = {}
    for dtypes in comparison.mixed_dtypes.values():
        for i, dtype in enumerate(dtypes[1:]):
            if dtype != dtypes[0] and not models[i].widened:
                key = i, dtype_name(dtype), dtype_name(dtypes[0])
                found[key] = found.get(key, 0) + 1
    return [
        f"models[{i}] ({models[i].name}) stores {counted(count, 'tensor')} in {theirs}, the base in {ours}"
        for (i, theirs, ours), count in sorted(found.items())
    ]


def _tied_names(
    everyone: Sequence[Checkpoint], merged: Callable[[str], bool], heeded: Callable[[str], bool]
) -> dict[str, str]:
    """Second name -> first name of every tensor that one of the checkpoints ties.

    A file leaves second names out, a state dict lists them, and some exporters write a copy under each name. All three
    are the same model, so copies are recognised by their values. One that differs is an error: the model is not tied,
    and has to be taken apart first (:func:`freemerge.checkpoint.tied.untie`).
    """
    pairs = (one.tied | dict(one.copies) | copied_names(one, everyone, merged) for one in everyone)
    tied = first_names((name, first) for own in pairs for name, first in own.items() if merged(name))
    for name, first in tied.items():
        for checkpoint in everyone:
            if name in checkpoint.specs and heeded(name) and not same_values(checkpoint, name, first):
                raise CheckpointError(
                    f"{checkpoint.label}: {name} is not the same as {first}, but another of the models ties the two"
                )
    return tied


def _check_names(base: Checkpoint, model: Checkpoint, expected: set[str], found: set[str]) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if not missing and not unexpected:
        return
    parts, advice = [], []
    if missing:
        parts.append(f"lacks {counted(len(missing), 'tensor')} of the base: {_some(missing)}")
    if unexpected:
        parts.append(f"has {counted(len(unexpected), 'tensor')} that the base lacks: {_some(unexpected)}")
    only_model = {name: model.specs[name] for name in unexpected}
    shown = {name: base.specs[name] for name in missing}
    in_memory = {alias: base.specs[name] for name in missing for alias in base.aliases(name)}
    beside = not expected.isdisjoint(found)
    changes = [(prefix_change(only_model, names, of_modules=beside), names) for names in (shown, in_memory)]
    ranked = [(explained(change, only_model, names), change) for change, names in changes if change is not None]
    if ranked:
        change = max(ranked)[1]
        advice.append(
            f"the names differ by a prefix: rename {change[0]!r} to {change[1]!r} (--rename '{'='.join(change)}')"
        )
        renamed = {change[1] + name[len(change[0]) :]: name for name in unexpected if name.startswith(change[0])}
        missing = [name for name in missing if name not in renamed]
        unexpected = [name for name in unexpected if name not in {renamed[new] for new in renamed.keys() & expected}]
        if any(base.aliases(name) for name in missing):  # they may be known by those names, once they are changed
            raise CheckpointError(f"{model.label} {' and '.join(parts)} ({base.label}); {'; '.join(advice)}")
    everything = base.specs.keys() | model.specs.keys()
    if set(missing) == expected and missing:  # to take the base's would be no merge
        advice.append("the two have no tensor in common")
        raise CheckpointError(f"{model.label} {' and '.join(parts)} ({base.label}); {'; '.join(advice)}")
    if missing:
        advice.append(f"take the base's with {_rules(missing, everything, 'copy')}, or leave them out with =drop")
    if unexpected:
        advice.append(f"leave out what only the model has with {_rules(unexpected, everything, 'drop')}")
    raise CheckpointError(f"{model.label} {' and '.join(parts)} ({base.label}); {'; '.join(advice)}")


def _rules(names: Sequence[str], everything: Iterable[str], action: str) -> str:
    """The rules of a recipe's select, or of --select, that match some tensors and no others."""
    patterns = list(islice(patterns_for(names, everything), _RULES + 1))
    listed = " ".join(f"'{pattern}={action}'" for pattern in patterns[:_RULES])
    return f"select {listed}{' and more' if len(patterns) > _RULES else ''}"


def _check_shapes(base: Checkpoint, model: Checkpoint, names: Iterable[str]) -> None:
    wrong = [name for name in names if base.specs[name].shape != model.specs[name].shape]
    if not wrong:
        return
    vocabulary = _vocabulary(base, model, wrong)
    if vocabulary:
        rows, other = base.specs[vocabulary[0]].shape[0], model.specs[vocabulary[0]].shape[0]
        rules = _rules(vocabulary, base.specs.keys() | model.specs.keys(), "copy")
        raise CheckpointError(
            f"token embeddings differ: {rows} rows in {base.label}, {other} in {model.label} ({_some(vocabulary)}); "
            f"resize one vocabulary to the other before merging, or take the base's with {rules}"
        )
    shapes = [f"{name} {base.specs[name].shape} and {model.specs[name].shape}" for name in wrong]
    message = f"shapes differ between {base.label} and {model.label}: {_some(shapes)}"
    if len(wrong) < len(base.specs.keys() & model.specs.keys()):  # to take the base's everywhere would be no merge
        rules = _rules(wrong, base.specs.keys() | model.specs.keys(), "copy")
        message += f"; take the base's with {rules}, or leave them out with =drop"
    raise CheckpointError(message)


def _vocabulary(base: Checkpoint, model: Checkpoint, wrong: Sequence[str]) -> list[str]:
    """Those of the tensors of other shapes that have a row for each token: embeddings, and what has rows as many."""
    shapes = {name: (base.specs[name].shape, model.specs[name].shape) for name in wrong}
    alike = {name: pair for name, pair in shapes.items() if all(pair) and pair[0][1:] == pair[1][1:]}
    rows = {name: (ours[0], theirs[0]) for name, (ours, theirs) in alike.items()}
    known = next((rows[name] for name in rows if VOCABULARY.search(name)), None)
    return [name for name in rows if rows[name] == known]


def _check_kinds(base: Checkpoint, model: Checkpoint, names: Iterable[str]) -> None:
    wrong = []
    for name in names:
        ours, theirs = base.specs[name], model.specs[name]
        if ours.dtype != theirs.dtype and not {ours.dtype, theirs.dtype} <= MERGEABLE:
            wrong.append(f"{name} {ours.dtype_name} and {theirs.dtype_name}")
    if wrong:
        raise CheckpointError(f"dtypes of {base.label} and {model.label} cannot be combined: {_some(wrong)}")


def _some(items: Sequence[str]) -> str:
    rest = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
