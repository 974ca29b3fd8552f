"""Where operations run: one protocol, one registry, one module a backend.

The package is called as the function that lists them, ``freemerge.backends()``, so it can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import BackendInfo


class _Backends(ModuleType):
    def __call__(self) -> dict[str, BackendInfo]:
        from .registry import backends

        return backends()


sys.modules[__name__].__class__ = _Backends
