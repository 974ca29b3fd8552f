"""Tied tensors: output layers that are the embeddings under another name, stored once, twice, or no longer tied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ..dense import bits, bytes_of, same_bits
from ..errors import CheckpointError
from .architecture import built_from_config, read_config, text_entry
from .reader import Checkpoint
from .views import with_stand_ins
from .vocabulary import VOCABULARY

# Their forward pass scales hidden states by whether the config ties the embeddings.
_SCALED_BY_TYING = frozenset({"longt5", "mt5", "pop2piano", "switch_transformers", "t5", "t5gemma", "udop", "umt5"})
_PROBE = 256


@dataclass(frozen=True)
class Untied:
    """A base and models in which every tensor that one of them does not tie is a tensor of its own.

    ``names``: second names that are tied in some of the checkpoints, but not in the merged model. Where a checkpoint
    ties or lacks one, the embeddings are its value.
    """

    base: Checkpoint
    models: tuple[Checkpoint, ...]
    names: tuple[str, ...]


def untie(base: Checkpoint, models: Sequence[Checkpoint], merged: Callable[[str], bool] = lambda name: True) -> Untied:
    """Make tied tensors separate where one of the checkpoints has them with values of their own."""
    everyone = (base, *models)
    declared = _declared(base)
    pairs = {name: first for name, first in (declared | _pairs(everyone, merged)).items() if merged(name)}
    separate = {name for name, first in pairs.items() if any(_is_separate(model, name, first) for model in everyone)}
    for model in everyone:
        model.copies = {
            name: first
            for name, first in pairs.items()
            if name not in separate and name not in model.tied and {name, first} <= model.specs.keys()
        }
    if not separate:
        return Untied(base, tuple(models), ())
    stand_ins = {name: pairs[name] for name in separate} | _no_longer_tied(base)
    for model in everyone:
        for name, first in stand_ins.items():
            if name not in model.specs and first not in model.specs:
                raise CheckpointError(f"{model.label} has neither {name} nor {first}, which other models tie")
    opened = [with_stand_ins(model, stand_ins) for model in everyone]
    return Untied(opened[0], tuple(opened[1:]), tuple(sorted(stand_ins)))


def second_everywhere(everyone: Sequence[Checkpoint]) -> dict[str, str]:
    """Second name -> first name of what no checkpoint has as a tensor of its own."""
    return {
        name: first
        for checkpoint in everyone
        for name, first in checkpoint.tied.items()
        if all(name in other.tied for other in everyone if name in other.specs)
    }


def first_names(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Second name -> first name, where one source may list a pair in the other order than another."""
    found: dict[str, str] = {}
    for name, first in pairs:
        root = found.get(first, first)
        if name != root:
            found.setdefault(name, root)
    return found


def _pairs(everyone: Sequence[Checkpoint], merged: Callable[[str], bool]) -> dict[str, str]:
    """Second name -> first name of what one checkpoint ties and another might store on its own."""
    pairs = first_names(pair for checkpoint in everyone for pair in checkpoint.tied.items())
    for name in sorted(_not_in_all(everyone)):
        if name not in pairs and merged(name):
            lacking = [checkpoint for checkpoint in everyone if name not in checkpoint.specs]
            declared = next((other.absent_ties[name] for other in lacking if name in other.absent_ties), None)
            embeddings = declared or _embeddings_of(name, everyone)
            if embeddings is not None:
                pairs[name] = embeddings
    return pairs


def _not_in_all(everyone: Sequence[Checkpoint]) -> set[str]:
    """Names that some checkpoint has and another lacks."""
    first = everyone[0].specs.keys()
    return set().union(*(checkpoint.specs.keys() ^ first for checkpoint in everyone))


def _embeddings_of(name: str, everyone: Sequence[Checkpoint]) -> str | None:
    """The embeddings that a head belongs to which the base does not have, where nothing but names can tell."""
    base = everyone[0]
    if name in base.specs or not VOCABULARY.search(name) or base.architecture is not None:
        return None
    if read_config(base.directory).get("tie_word_embeddings") is False:
        return None
    holder = next(checkpoint for checkpoint in everyone if name in checkpoint.specs)
    found = [
        other
        for other in base.specs
        if VOCABULARY.search(other)
        and base.specs[other].shape == holder.specs[name].shape
        and all(other in checkpoint.specs for checkpoint in everyone)
    ]
    return found[0] if len(found) == 1 else None


def _declared(base: Checkpoint) -> dict[str, str]:
    """Pairs of which the base stores both names, although its config ties them."""
    config = read_config(base.directory)
    rows = text_entry(config, "vocab_size")
    if not config or config.get("tie_word_embeddings") is False or not isinstance(rows, int):
        return {}
    shapes = [spec.shape for spec in base.specs.values() if len(spec.shape) == 2 and spec.shape[0] == rows]
    if len(set(shapes)) == len(shapes) or base.architecture is None:  # no two of one shape: do not ask transformers
        return {}
    return {
        name: first
        for name, first in base.architecture.ties().items()
        if name in base.specs and first in base.specs and name not in base.tied
    }


def _no_longer_tied(base: Checkpoint) -> dict[str, str]:
    """What else transformers does not tie any more, once the config no longer ties the embeddings."""
    config = read_config(base.directory)
    if not config:
        return {}
    if config.get("model_type") in _SCALED_BY_TYING:
        raise CheckpointError(
            f"{base.label}: one of the models has a head of its own, and the base ties its head to the embeddings; a "
            f"{config['model_type']} model computes otherwise without that tie, so they cannot be merged"
        )
    tied = {} if base.architecture is None else base.architecture.ties()
    apart = built_from_config(with_untied_embeddings(config), len(base.specs))
    still = tied if apart is None else apart.ties()
    return {name: first for name, first in tied.items() if name not in still and first in base.specs}


def with_untied_embeddings(config: dict[str, object]) -> dict[str, object]:
    """A config whose embeddings and head are not tied."""
    nested = {
        name: {**value, "tie_word_embeddings": False}
        for name, value in config.items()
        if isinstance(value, dict) and "tie_word_embeddings" in value
    }
    return {**config, **nested, "tie_word_embeddings": False}


def _is_separate(checkpoint: Checkpoint, name: str, first: str) -> bool:
    return name in checkpoint.specs and first in checkpoint.specs and not same_values(checkpoint, name, first)


def copied_names(
    checkpoint: Checkpoint, everyone: Sequence[Checkpoint], merged: Callable[[str], bool]
) -> dict[str, str]:
    """Tensors that some other checkpoint lacks and that are copies of one that all have, with its name.

    A tensor that is the same number throughout is taken for a copy only beside another copy in the same module: a
    norm of ones is no copy of every other norm.
    """
    some = _not_in_all(everyone)
    extra = [name for name in checkpoint.specs if name in some and name not in checkpoint.tied and merged(name)]
    if not extra:
        return {}
    shared = checkpoint.specs.keys() - some
    kinds = {(checkpoint.specs[name].shape, checkpoint.specs[name].dtype) for name in extra}
    alike: dict[object, list[str]] = {}
    for name in sorted(shared):
        spec = checkpoint.specs[name]
        if (spec.shape, spec.dtype) in kinds:
            alike.setdefault(_beginning(checkpoint, name), []).append(name)
    copies: dict[str, str] = {}
    constant: dict[str, str] = {}
    for name in extra:
        found = [first for first in alike.get(_beginning(checkpoint, name), ()) if same_values(checkpoint, name, first)]
        if found and not _is_constant(checkpoint.read(name)):
            copies[name] = found[0]
        elif len(found) == 1:
            constant[name] = found[0]
    modules = {name.rpartition(".")[0] for name in copies}
    return copies | {name: first for name, first in constant.items() if name.rpartition(".")[0] in modules}


def same_values(checkpoint: Checkpoint, name: str, first: str) -> bool:
    """Whether two tensors of a checkpoint are one, or have the same bytes."""
    if checkpoint.tied.get(name, name) == checkpoint.tied.get(first, first):
        return True
    ours, theirs = checkpoint.specs[name], checkpoint.specs.get(first)
    if theirs is None or (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return False
    if _beginning(checkpoint, name) != _beginning(checkpoint, first):
        return False
    return same_bits(checkpoint.read(name), checkpoint.read(first))


def _beginning(checkpoint: Checkpoint, name: str) -> tuple[object, ...]:
    """Shape, dtype and the first bytes of a tensor: what differs most cheaply."""
    spec = checkpoint.specs[name]
    return spec.shape, spec.dtype, bytes(bytes_of(checkpoint.read(name).reshape(-1)[:_PROBE]))


def _is_constant(tensor: torch.Tensor) -> bool:
    """Whether each entry has the bytes of the next."""
    whole = bits(tensor)
    return torch.equal(whole[tensor.itemsize :], whole[: -tensor.itemsize])
