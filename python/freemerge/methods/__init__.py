"""Merging methods: task vectors of K models in, merged task vectors out. One file a method.

A module added to this package is imported with it, and its methods are found here by the names of their classes.
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
_found = {method.__name__: method for method in METHODS.values()}
globals().update(_found)
__all__ += [name for name in _found if name not in __all__]
