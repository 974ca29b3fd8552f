"""State dicts inside of what training programs save: ``{"state_dict": tensors, "epoch": 3}`` and the like."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from ..errors import CheckpointError
from .state_dict import is_extra

SEPARATOR = "::"
_DEPTH = 3
# What a trainer keeps for itself may be a dictionary of tensors, too, but is never the model.
_NEVER_MODELS = re.compile(
    r"(^|[_.\- ])(opt$|optim|(lr)?sched|(grad|loss)?scaler|rng|random|callback|hyper|loop|metric|criterion|loss(es)?$)"
)


def split_key(source: str) -> tuple[str, str]:
    """A path and the key behind it, as in ``model.pt::ema``; a file whose name holds the separator is a path."""
    path, separator, key = source.partition(SEPARATOR)
    return (source, "") if not separator or os.path.exists(source) else (path, key)


def state_dict_in(content: object, source: str, key: str = "") -> Mapping[Any, Any]:
    """The state dict that ``content`` is, or holds under ``key`` (keys joined by ``::``), or holds as the only one.

    Raises CheckpointError that lists the keys to choose from, if there are several.
    """
    for part in key.split(SEPARATOR) if key else ():
        if not isinstance(content, Mapping) or part not in content:
            known = ", ".join(repr(name) for name in content) if isinstance(content, Mapping) else "no keys at all"
            raise CheckpointError(f"{source}: there is no {part!r}, only {known}")
        content = content[part]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{source}: holds a {type(content).__name__}, not a state dict")
    # The first that is more than a number decides: a mapping that makes its tensors on access is not read whole.
    if key or not content or any(map(_is_array, content.values())):
        return content
    if all(isinstance(value, torch.Tensor) for value in content.values()):
        return content
    found = dict(_state_dicts(content, _DEPTH))
    # Numbers alone are no model beside others: losses, scales of gradients.
    candidates = {name: state for name, state in found.items() if any(map(_is_array, state.values()))} or found
    if len(candidates) > 1:
        listed = " or ".join(f"{source.partition(SEPARATOR)[0]}{SEPARATOR}{name}" for name in candidates)
        raise CheckpointError(f"{source}: holds several state dicts; say which by {listed}")
    return next(iter(candidates.values()), content)


def _is_state_dict(content: Mapping[Any, Any]) -> bool:
    """Whether it holds tensors, and nothing else but what modules keep beside them."""
    known = [isinstance(value, torch.Tensor) or is_extra(name, value) for name, value in content.items()]
    return all(known) and any(isinstance(value, torch.Tensor) for value in content.values())


def _is_array(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not is_lazy(value) and value.numel() > 1


def _state_dicts(content: Mapping[Any, Any], depth: int) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Mapping) or _NEVER_MODELS.search(name.lower()):
            continue
        if _is_state_dict(value):
            yield name, value
        elif depth > 1:
            yield from ((f"{name}{SEPARATOR}{inner}", found) for inner, found in _state_dicts(value, depth - 1))
