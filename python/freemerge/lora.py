"""What a model has and its base lacks, as a LoRA adapter in PEFT's format: the first singular vectors of each layer."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arguments import whole_number
from .checkpoint import MERGEABLE, Checkpoint, CheckpointWriter, Source, TensorSpec, open_inputs
from .checkpoint.compare import compare
from .checkpoint.disk import flush_file
from .checkpoint.hub_cache import hub_id
from .checkpoint.json_file import write_json
from .checkpoint.locate import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .checkpoint.prefixes import Rename
from .checkpoint.safetensors_file import SafetensorsFile
from .checkpoint.staging import Staging
from .checkpoint.target import cannot_write, check_target, refuse_inputs, target
from .checkpoint.tied import second_everywhere
from .errors import CheckpointError
from .experts.leading import leading_triplets
from .experts.task_vector import task_vector
from .merging.selection import Action, Rule, check_rules, left_alone, renames_of, rules_of
from .methods.layers import is_embedding

_LAYERS = ("Linear", "Conv1D", "FalconLinear", "EsmFoldLinear")  # of torch and transformers; Conv1D is transposed
_WEIGHT = ".weight"
_MARK = {"writer": "freemerge"}  # in the metadata of the weights: other adapters may have taken days of training


@dataclass(frozen=True)
class Lora:
    """An adapter that was written: its highest rank, how many layers it has, the share of ||model - base||² that it
    holds, over all tensors, and the names of changed tensors that a LoRA of linear layers cannot hold."""

    out: Path
    rank: int
    layers: int
    kept: float
    left_out: tuple[str, ...]
    nbytes: int


def extract_lora(
    base: Source,
    model: Source,
    out: str | os.PathLike[str],
    *,
    rank: int,
    force: bool = False,
    select: Sequence[Rule | tuple[str, Action]] = (),
    rename: Sequence[Rename] = (),
) -> Lora:
    """Write model - base as a LoRA into the new directory ``out``, which PEFT and freemerge read.

    Each weight of a linear layer, [outputs, inputs], changes by B A; B [outputs, rank] and A [rank, inputs] are the
    first singular vectors of the change, each times the root of the singular value: the best approximation of that
    rank. Both are float32. One tensor is in memory at a time, and the adapter.

    Args:
        base, model: state dicts, modules or paths, with the same tensors; the model may be merged, or fine-tuned.
        rank: r, of every layer, but no more than its shorter side (PEFT's ``rank_pattern``); ``lora_alpha`` is the
            same, so that nothing is scaled.
        force: replace an adapter at ``out`` that this function wrote, at once when the new one is complete.
        select: rules as of a recipe: tensors with action "copy" or "drop" are left out.
        rename: changes of prefixes in the model's names, as in a recipe.

    Linear layers are told by the base's config.json, or its module; without one, by the names of matrices, of which
    embeddings are none. Whatever else differs (embeddings, biases, norms) is left out and named in the result.

    Raises ArgumentError for a bad rank, CheckpointError for models that do not match, are not finite or do not differ,
    RefusedError if ``out`` exists, is not empty and may not be replaced, or is one of the inputs.
    """
    rank = whole_number("rank", rank, 1)
    folder = target(out)
    check_target(folder, single_file=False, force=force, foreign=_other_than_ours)
    rules = rules_of(select)
    factors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}  # of the modules
    transposed = False
    left_out, kept, total = [], 0.0, 0.0
    with ExitStack() as stack:
        inputs = open_inputs(
            stack,
            base,
            {"model": model},
            merged=lambda names: not left_alone(names, rules),
            renames=renames_of(rename),
        )
        check_rules(rules, inputs.names, second_everywhere((inputs.base, *inputs.models)))
        start, (tuned,) = inputs.base, inputs.models
        refuse_inputs(folder, (start, tuned))
        staging = Staging(folder)  # before the work begins
        stack.callback(staging.end)
        for name, change in _changes(start, tuned, rules):
            total += float(change.double().square().sum())
            module = _linear_layer(start, name)
            if module is None:
                left_out.append(name)
                continue
            turned = _layer(start, name) == "Conv1D"
            transposed |= turned
            ranks[module] = min(rank, *change.shape)
            left, values, right = leading_triplets(change.t() if turned else change, rank)
            kept += float(values.square().sum())
            root = values.sqrt()
            for letter, factor in (("A", root[:, None] * right), ("B", left * root)):
                factors[f"base_model.model.{module}.lora_{letter}{_WEIGHT}"] = _padded(factor, ranks[module], letter)
        if not ranks:
            raise CheckpointError(f"no linear layer of {tuned.label} differs from that of {start.label}")
        try:
            nbytes = _write(staging.directory, factors, _config(start, ranks, transposed))
        except OSError as error:
            raise cannot_write(folder, error) from error
        staging.publish(None, force=force, foreign=_other_than_ours)
    return Lora(folder, max(ranks.values()), len(ranks), kept / total, tuple(left_out), nbytes)


def _write(folder: Path, factors: Mapping[str, Tensor], config: Mapping[str, Any]) -> int:
    """The files of an adapter, flushed to the disk; the size of its weights."""
    write_json(folder / ADAPTER_CONFIG, config)
    flush_file(folder / ADAPTER_CONFIG)
    specs = [TensorSpec(name, tuple(factor.shape), factor.dtype) for name, factor in factors.items()]
    with CheckpointWriter(folder / ADAPTER_WEIGHTS[0], specs, metadata=_MARK) as writer:
        for name, factor in factors.items():
            writer.write(name, factor)
    return writer.nbytes


def _other_than_ours(folder: Path) -> str | None:
    """Adapters of freemerge are told by a mark in the header of their weights."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or path.name not in (ADAPTER_CONFIG, ADAPTER_WEIGHTS[0]):
            return f"it holds {path.name}"
    try:
        metadata = SafetensorsFile(folder / ADAPTER_WEIGHTS[0]).metadata
    except (CheckpointError, OSError):
        return f"{ADAPTER_WEIGHTS[0]} cannot be read"
    return None if metadata.items() >= _MARK.items() else f"{ADAPTER_WEIGHTS[0]} has no mark of it"


def _changes(base: Checkpoint, model: Checkpoint, rules: Sequence[Rule]) -> Iterator[tuple[str, Tensor]]:
    """The name of each tensor that differs, and by what."""

    def taken(name: str) -> bool:
        return not left_alone((name, *base.aliases(name)), rules)

    for name in compare(base, [model], merged=taken).names:
        if base.specs[name].dtype not in MERGEABLE:
            continue
        change = task_vector(model, base, name)
        if change.any():
            yield name, change.cpu()


def _layer(base: Checkpoint, name: str) -> str | None:
    return None if base.architecture is None else base.architecture.layer(name)


def _linear_layer(base: Checkpoint, name: str) -> str | None:
    """The module of a linear layer whose weight this is, as PEFT names it; None for any other tensor."""
    if len(base.specs[name].shape) != 2 or not name.endswith(_WEIGHT) or name in base.tied.values():
        return None
    if base.architecture is None:
        return None if is_embedding(name) else name.removesuffix(_WEIGHT)
    return base.architecture.loaded_name(name).removesuffix(_WEIGHT) if _layer(base, name) in _LAYERS else None


def _padded(factor: Tensor, rank: int, letter: str) -> Tensor:
    """In float32, with zeros for what a change of lower rank does not need."""
    missing = rank - factor.shape[0 if letter == "A" else 1]
    sides = (0, 0, 0, missing) if letter == "A" else (0, missing)
    return torch.nn.functional.pad(factor.float(), sides).contiguous()


def _config(base: Checkpoint, ranks: Mapping[str, int], transposed: bool) -> dict[str, Any]:
    """The adapter_config.json of PEFT."""
    rank = max(ranks.values())
    own = _own_ranks(ranks, rank)
    kind = type(base.architecture.module).__name__ if base.architecture is not None else ""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if kind.endswith(("ForCausalLM", "LMHeadModel")) else None,
        "base_model_name_or_path": None if base.path is None else hub_id(base.path),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": own,
        "alpha_pattern": own,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "target_modules": list(ranks),
    }


def _own_ranks(ranks: Mapping[str, int], rank: int) -> dict[str, int]:
    """The modules whose ranks have to be told: those of another rank, and whatever their names fit as PEFT reads them.

    To PEFT a name is a pattern for the end of a module's path, and the first that fits counts: longer ones come first,
    and of those of one length those with fewer dots, which fit any letter.
    """
    patterns = {module: re.escape(module).replace(r"\.", ".") for module in ranks}
    other = [patterns[module] for module in ranks if ranks[module] != rank]
    fits = re.compile(rf"(.*\.)?({'|'.join(other)})")
    told = [module for module in ranks if other and fits.fullmatch(module)]
    return {patterns[module]: ranks[module] for module in sorted(told, key=lambda name: (-len(name), name.count(".")))}
