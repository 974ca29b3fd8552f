"""Merging methods: task vectors of K models in, merged task vectors out. One file a method.

A module added to this package is imported with it, and methods of any module are found here by the names of their classes.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from .average import Average
from .base import METHODS, Measured, Merged, Method
from .breadcrumbs import Breadcrumbs
from .dare import DARE
from .emr import EMR
from .fr import FR
from .iso import IsoC, IsoCTS
from .jsv import JSV
from .model_stock import ModelStock
from .pcb import PCB
from .task_arithmetic import TaskArithmetic
from .ties import TIES
from .tsv import TSVM
from .wudi import WUDI

__all__ = [
    "Average",
    "Breadcrumbs",
    "DARE",
    "EMR",
    "FR",
    "IsoC",
    "IsoCTS",
    "JSV",
    "METHODS",
    "Measured",
    "Merged",
    "Method",
    "ModelStock",
    "PCB",
    "TIES",
    "TSVM",
    "TaskArithmetic",
    "WUDI",
]

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
__all__ += [method.__name__ for method in METHODS.values() if method.__name__ not in __all__]


def __getattr__(name: str) -> type[Method]:
    """Methods of other modules by the names of their classes."""
    for method in METHODS.values():
        if method.__name__ == name:
            return method
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
