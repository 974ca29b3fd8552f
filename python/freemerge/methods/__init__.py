"""Merging methods: task vectors of K models in, merged task vectors out. One file a method."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

from .base import METHODS, Measured, Merged, Method

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Measured", "Merged", "Method", *sorted(_method.__name__ for _method in METHODS.values())]


def __getattr__(name: str) -> Any:
    """The methods by the names of their classes, as in ``fm.methods.FR``."""
    for method in METHODS.values():
        if method.__name__ == name:
            return method
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
