"""What is made when it is first used. Imports that take long, torch's above all: `freemerge --help` needs none of them.

What declares options takes torch from here, and imports the rest of the package where it is used.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from functools import cached_property

    import torch
else:

    class cached_property:
        """That of functools as it is from Python 3.12 on: before, all objects of a class share a lock, which a forked
        process takes over as another thread holds it, and waits for. Two threads may make a value once each."""

        def __init__(self, function: Callable[[Any], Any]) -> None:
            self._function, self.__doc__ = function, function.__doc__

        def __set_name__(self, owner: type, name: str) -> None:
            self._name = name

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is None:
                return self
            value = instance.__dict__[self._name] = self._function(instance)  # found before this from now on
            return value

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch, name)

    torch = _Torch()

__all__ = ["attach", "cached_property", "torch"]


def attach(package: str, file: str) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """``__all__``, ``__getattr__`` and ``__dir__`` of a package whose names its stub file lists with their origins.

    Each module is imported when one of its names is first used.
    """
    tree = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    origins = {
        alias.asname or alias.name: "." * node.level + (node.module or alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    (listed,) = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]

    def get(name: str) -> Any:
        if name not in origins:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(origins[name], package)
        value = module if origins[name] == f".{name}" else getattr(module, name)
        # What a folder has the name of is the folder, which importing has put here: freemerge.backends can be called.
        return vars(sys.modules[package]).setdefault(name, value)

    return listed, get, lambda: sorted({*vars(sys.modules[package]), *origins})
