"""How much memory a piece of work takes, as Linux counts it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which the resident set grew at most while the work ran; 0 where it cannot be told."""
    gc.collect()
    if not _RESET.exists():
        work()
        return 0
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still resident would hide what is taken
    _RESET.write_text("5")  # resets the high-water mark
    before = _high_water_mark()
    work()
    return max(0, _high_water_mark() - before)


def _high_water_mark() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
