"""State dicts: which entries can be read, and which are second names of the same memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from ..dense import address, dense
from ..errors import CheckpointError, counted
from .prefixes import counters
from .spec import TensorSpec


def dense_tensors(source: str, state: Mapping[Any, object]) -> dict[str, torch.Tensor]:
    """The state dict, detached, in its own order; CheckpointError naming the first entry that is no ordinary tensor.

    What modules keep beside tensors and what wrappers count is left out.
    """
    out = counters([str(name) for name in state])
    return {
        str(name): dense_tensor(source, name, value)
        for name, value in state.items()
        if name not in out and not is_extra(name, value)
    }


def is_extra(name: object, value: object) -> bool:
    """Whether it is what a module keeps beside tensors (``get_extra_state``), as Transformer Engine does."""
    return str(name).endswith("_extra_state") and not isinstance(value, torch.Tensor)


def left_out(source: str, names: Sequence[str]) -> tuple[str, ...]:
    """A sentence about entries that :func:`dense_tensors` left out, if there are any."""
    count = counted(len(names), "such entry", "such entries")
    return (f"{source}: {names[0]} is no weight and left out ({count})",) if names else ()


def specs_of(state: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    """The specs of a state dict, sorted by name."""
    return {name: TensorSpec(name, tuple(state[name].shape), state[name].dtype) for name in sorted(state)}


def tied_names(state: Mapping[str, torch.Tensor], second: Collection[str] = ()) -> dict[str, str]:
    """Second names of the same memory, each with the first name.

    First is what comes first in the state dict's own order, as embeddings come before the head, but none of the names
    that are known to be ``second``; it is also the name that transformers keeps when it saves.
    """
    first: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in sorted(state.items(), key=lambda item: item[0] in second):
        if tensor.numel() == 0:
            continue
        key = (tensor.device, address(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if first.setdefault(key, name) != name:
            tied[name] = first[key]
    return tied


def dense_tensor(source: str, name: object, value: object) -> torch.Tensor:
    """One entry of :func:`dense_tensors`."""
    if not isinstance(name, str):
        raise CheckpointError(f"{source}: not a state dict (it has the key {name!r})")
    if "_packed_params" in name and not isinstance(value, torch.Tensor):
        raise CheckpointError(f"{source} is quantised by torch ({name}); pass the model that it was quantised from")
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f"{source}: not a state dict ({name!r} is a {type(value).__name__}, not a tensor)")
    return dense(value, f"{source}: tensor {name!r}", CheckpointError).detach()
