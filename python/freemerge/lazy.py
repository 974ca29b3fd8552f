"""What takes long to import, torch above all, is imported when it is first used: `freemerge --help` needs none of it.

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
    import torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch, name)

    torch = _Torch()

__all__ = ["attach", "torch"]


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
