"""Opening what a merge is given: a base, and models of it, which may be adapters."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import ArgumentError, CheckpointError
from ..lazy import cached_property
from .adapter import AdaptedCheckpoint
from .alike import alike
from .conversion import Layout
from .hub_cache import local_path
from .locate import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_weights
from .prefixes import Naming, Rename
from .quantised import dequantised, needless_quantisation
from .reader import Checkpoint, Source
from .spec import MERGEABLE
from .tied import untie
from .views import InFileLayout, renamed, without

# Of kohya's scripts, diffusers, LyCORIS, MLX, loralib, and what PEFT calls its other kinds.
_ADAPTER_WEIGHT = re.compile(
    r"(^|[._])(lora_(embedding_)?[AB]|lora_[ab]|lora[._](up|down|mid)|lora_linear_layer|lora_magnitude_vector|dora_scale"
    r"|ia3_l|hada_[wt][12](_[ab])?|lokr_(w[12](_[ab])?|t2)|b?oft_(R|S|s|blocks)|vera_lambda_[bd]|vblora_\w+|hra_u"
    r"|(fourierft|waveft)_spectrum|randlora_\w+|shira_weight|c3a_kernel|road_(theta|alpha)|bone_block|miss_block)(\.|$)"
)
_LORA_HALF = re.compile(r"(?:^|[._])lora[._](?:embedding_|linear_layer\.)?(A|a|down)(?=\.|$)")
_OTHER_HALF = {"A": "B", "a": "b", "down": "up"}


@dataclass(frozen=True)
class Inputs:
    """A base and its models, made to fit together.

    ``untied``: names that are tied in the base, but not any more. ``notices``: what looks like a mistake.
    """

    base: Checkpoint
    models: Sequence[Checkpoint]
    untied: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    @cached_property
    def names(self) -> dict[str, tuple[str, ...]]:
        """Every tensor of any input, with all names that it has."""
        everything = dict.fromkeys(name for source in (self.base, *self.models) for name in source.specs)
        return {name: (name, *self.base.aliases(name)) for name in everything}


def open_inputs(
    stack: ExitStack,
    base: Source | Checkpoint,
    models: Mapping[str, Source | Checkpoint],
    *,
    merged: Callable[[Sequence[str]], bool] = lambda names: True,
    renames: Sequence[Rename] = (),
) -> Inputs:
    """Open a base and models of it, which the caller's ``stack`` closes. ``models`` have the arguments' names as keys.

    ``merged(names)`` tells, by all names of a tensor, whether it takes part; ``renames`` change prefixes of the models'
    names that the base does not have. Raises CheckpointError for what cannot be read, ArgumentError for a rename of
    no model's names: a misspelt prefix must not pass.
    """
    opened, plain = _open_all(stack, base, models)
    notices = [notice for checkpoint in (opened, *plain.values()) for notice in checkpoint.set_aside]
    theirs = {name for model in plain.values() for name in model.specs}
    opened, plain, naming = _under_one_naming(opened, plain, renames)
    _refuse_adapter_of_its_own(opened, merged)
    for other in plain.values():
        _refuse_unmerged_adapter(other, opened)

    def of_adapters(name: str) -> str:
        theirs.add(name)
        return naming(name)

    sources = [
        plain[argument] if argument in plain else stack.enter_context(open_model(model, opened, naming=of_adapters))
        for argument, model in models.items()
    ]
    for old, new in renames:
        if not any(name.startswith(old) for name in theirs):
            raise ArgumentError(f"rename: {old!r} (to {new!r}) begins no name of the models")
    untied = untie(opened, sources, lambda name: merged((name, *opened.aliases(name))))
    twice = _given_twice({"base": base, **models})
    named = {"base": opened, **dict(zip(models, sources, strict=True))}
    notices += [f"{argument} is the same as {first}" for argument, first in twice.items()]
    notices += alike({argument: source for argument, source in named.items() if argument not in twice})
    notices += _changes(opened, untied.names)
    return Inputs(untied.base, untied.models, untied.names, tuple(notices))


def _open_all(
    stack: ExitStack, base: Source | Checkpoint, models: Mapping[str, Source | Checkpoint]
) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """The base, and the models that are no adapters of it, in floating point."""
    opened = dequantised(stack.enter_context(Checkpoint.open(base, argument="base")))
    plain = {
        argument: dequantised(stack.enter_context(Checkpoint.open(model, argument=argument)))
        for argument, model in models.items()
        if adapter_directory(model) is None
    }
    if not any(spec.dtype in MERGEABLE for spec in opened.specs.values()):
        raise CheckpointError(f"{opened.label} holds no tensor in float32, float64, bfloat16 or float16 to merge")
    return opened, plain


def _under_one_naming(
    base: Checkpoint, models: Mapping[str, Checkpoint], renames: Sequence[Rename]
) -> tuple[Checkpoint, dict[str, Checkpoint], Naming]:
    """Base and models in the layout of files, the models with the base's names, tied tensors included; and by what."""
    opened, *others = in_file_layout([base, *models.values()], renames)
    more = any(other.specs.keys() - opened.specs.keys() for other in others)
    # Asked only where it can help: for a directory it may import transformers.
    known = opened.architecture if more or opened.module is not None else None
    if known is not None:
        opened, *others = (without(checkpoint, known.unsaved) for checkpoint in (opened, *others))
    naming = Naming(opened.specs, renames, known.loaded_name if known is not None else None)
    others = [renamed(other, naming.of(other.specs)) for other in others]
    groups = _tied_groups([opened, *others])
    others = [renamed(other, _as_the_base_stores(other, opened, groups)) for other in others]
    for checkpoint in (opened, *others):
        checkpoint.tied = _with_common_roots(checkpoint.tied, [opened, *others])
    return opened, dict(zip(models, others, strict=True)), naming


def _changes(base: Checkpoint, untied: Sequence[str]) -> Iterator[str]:
    """How the merged model's config differs from the base's."""
    method = needless_quantisation(base)
    if method is not None:
        yield (
            f"{base.label}: config.json says that weights are quantised ({method}), but they are floats; the merged "
            "model's config does not say so"
        )
    if untied:
        yield f"the merged model does not tie {', '.join(untied)} to the embeddings, as not all models do"


def _refuse_adapter_of_its_own(base: Checkpoint, merged: Callable[[Sequence[str]], bool]) -> None:
    """Refuse two factors of one change, or models of such, which would be merged apart: A and B, not B A."""
    for name in base.specs:
        found = _LORA_HALF.search(name)
        if found is None:
            continue
        other = f"{name[: found.start(1)]}{_OTHER_HALF[found.group(1)]}{name[found.end(1) :]}"
        if other in base.specs and all(merged((half, *base.aliases(half))) for half in (name, other)):
            raise _unmerged(base, name)


def _refuse_unmerged_adapter(model: Checkpoint, base: Checkpoint) -> None:
    """Refuse weights that change others in a way that only the library which trained them knows."""
    adapted = next((n for n in model.specs if n not in base.specs and _ADAPTER_WEIGHT.search(n)), None)
    if adapted is not None:
        raise _unmerged(model, adapted)


def _unmerged(checkpoint: Checkpoint, adapted: str) -> CheckpointError:
    way_out = "merge it with the library that trained it, and pass the full model"
    if adapted.startswith("base_model."):
        way_out = "pass what its merge_and_unload() returns, or the directory that its save_pretrained() writes"
    return CheckpointError(f"{checkpoint.label} holds an adapter that is not merged ({adapted}); {way_out}")


def _with_common_roots(tied: Mapping[str, str], everyone: Sequence[Checkpoint]) -> dict[str, str]:
    """Second names with first ones that every checkpoint has, where there are such: files store any one of them."""
    groups: dict[str, list[str]] = {}
    for second, first in tied.items():
        groups.setdefault(first, [first]).append(second)
    changed: dict[str, str] = {}
    for names in groups.values():
        everywhere = (name for name in names if all(name in checkpoint.specs for checkpoint in everyone))
        root = next(everywhere, names[0])
        changed |= {name: root for name in names if name != root}
    return changed


def _as_the_base_stores(model: Checkpoint, base: Checkpoint, groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """New names, those of the base, of tied tensors that a file stores under another of their names alone."""
    new = {}
    for names in groups:
        theirs, ours = (
            next((name for name in names if name in checkpoint.specs and name not in checkpoint.tied), None)
            for checkpoint in (model, base)
        )
        alone = ours not in model.specs and (theirs not in base.specs or theirs in base.tied)
        if theirs is not None and ours is not None and alone:
            new[theirs] = ours
    return new


def _tied_groups(everyone: Iterable[Checkpoint]) -> Iterable[Sequence[str]]:
    """The names of each tensor that one of the checkpoints ties."""
    groups: dict[str, tuple[str, ...]] = {}
    for checkpoint in everyone:
        for second, first in checkpoint.tied.items():
            together = (*groups.get(first, (first,)), *groups.get(second, (second,)))
            groups |= dict.fromkeys(together, tuple(dict.fromkeys(together)))
    return set(groups.values())


def _given_twice(sources: Mapping[str, object]) -> dict[str, str]:
    """Inputs that are the same object or path as an earlier one: a model that counts twice, or one that is the base."""
    first: dict[object, str] = {}
    twice: dict[str, str] = {}
    for argument, source in sources.items():
        key = os.path.realpath(local_path(source)) if isinstance(source, (str, os.PathLike)) else id(source)
        if first.setdefault(key, argument) != argument:
            twice[argument] = first[key]
    return twice


def in_file_layout(checkpoints: Sequence[Checkpoint], renames: Sequence[Rename] = ()) -> list[Checkpoint]:
    """Models of one architecture, all with the names and shapes that transformers' files have.

    Modules show their layout. What else was saved from a module's memory is recognised where another of the models is
    a module, or, if their names differ, where the first has a config.json.
    """
    layouts = [c.architecture.layout if c.module is not None and c.architecture else None for c in checkpoints]
    known = next((layout for layout in layouts if layout is not None), None)
    first = checkpoints[0]
    if known is None and any(c.specs.keys() != first.specs.keys() for c in checkpoints):
        known = first.architecture.layout if first.architecture is not None else None
    shown = []
    for checkpoint, own in zip(checkpoints, layouts, strict=True):
        inner, layout = checkpoint, own
        if own is None and known is not None:
            inner = renamed(checkpoint, Naming(known.module, renames).of(checkpoint.specs))
            layout = _in_memory_layout(inner, known)
        shown.append(checkpoint if layout is None else InFileLayout(inner, layout))
    return shown


def _in_memory_layout(checkpoint: Checkpoint, layout: Layout) -> Layout | None:
    """``layout``, if the checkpoint has names that only the module has, and none that only files have."""
    if not checkpoint.specs.keys() & (layout.module.keys() - layout.files.keys()):
        return None
    return None if checkpoint.specs.keys() & (layout.files.keys() - layout.module.keys()) else layout


def open_model(
    source: Source | Checkpoint, base: Checkpoint, naming: Callable[[str], str] = lambda name: name
) -> Checkpoint:
    """Open a fine-tuned model of ``base``: any checkpoint, or a PEFT adapter trained on it (its directory or file)."""
    adapter = adapter_directory(source)
    if adapter is None:
        return Checkpoint.open(source)

    def named(name: str) -> str:
        """PEFT names modules as they are in memory."""
        name = naming(name)
        if name in base.specs or base.architecture is None:
            return name
        file_name = base.architecture.file_name(name)
        return file_name if file_name in base.specs else as_loaded()(file_name)

    @cache
    def as_loaded() -> Naming:
        """And some were trained on a model without the head, or with one."""
        assert base.architecture is not None
        return Naming(base.specs, (), base.architecture.loaded_name)

    return AdaptedCheckpoint(adapter, base, named)


def adapter_directory(source: object) -> Path | None:
    """The directory of the PEFT adapter that ``source`` names, by the directory itself or by its weight file."""
    if not isinstance(source, (str, os.PathLike)) or source == "":
        return None
    path = local_path(source)
    if path.name in ADAPTER_WEIGHTS and (path.parent / ADAPTER_CONFIG).is_file():
        return path.parent
    return path if adapter_weights(path) is not None else None
