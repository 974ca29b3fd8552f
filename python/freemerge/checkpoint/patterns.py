"""The shortest rules that match given tensors and no others, for messages that say which rule helps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

_SPECIAL = re.compile(r"([*?[])")


def patterns_for(names: Sequence[str], others: Iterable[str]) -> Iterator[str]:
    """Shell patterns that together match all ``names`` and none of ``others``.

    A whole module where it can be (``vision_tower.*``), the same tensor of every layer, or a name as it is.
    """
    apart = set(others) - set(names)
    left = sorted(names)
    while left:
        pattern = next(found for found in _candidates(left[0]) if not any(fnmatchcase(name, found) for name in apart))
        yield pattern
        left = [name for name in left if not fnmatchcase(name, pattern)]


def _candidates(name: str) -> list[str]:
    """Patterns that match a name, from those that match most; the last one matches nothing else."""
    parts = [_SPECIAL.sub(r"[\1]", part) for part in name.split(".")]
    layers = ["*" if part.isdecimal() else part for part in parts]
    modules = [".".join(parts[:i]) + ".*" for i in range(1, len(parts))]
    every = [".".join(layers[:i]) + ".*" for i in range(1, len(parts)) if "*" in layers[:i] and layers[i - 1] != "*"]
    return [*modules[:1], *every, *modules[1:], ".".join(layers), ".".join(parts)]
