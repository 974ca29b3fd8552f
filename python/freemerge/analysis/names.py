"""What the names of tensors tell: the type of module and its depth."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a dotted name


def module_type(name: str) -> str:
    """The name with ``*`` for the numbers of layers, as ``layers.*.mlp.up.weight``: equal for all layers."""
    return _NUMBER.sub("*", name)


def depth(name: str) -> int | None:
    """The number of the layer, the first number in the name; None outside of layers."""
    found = _NUMBER.search(name)
    return int(found.group()) if found else None
