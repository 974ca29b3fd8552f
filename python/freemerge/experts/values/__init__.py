"""How the tensors of experts are written down. One file a coding; docs/expert-format.md describes the bytes."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from .base import CODINGS, ExpertTensor, coding_of
from .low_rank import LowRankTensor
from .sparse import SparseTensor

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["CODINGS", "ExpertTensor", "LowRankTensor", "SparseTensor", "coding_of"]
