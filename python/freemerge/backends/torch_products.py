"""Matrix products of the torch backend, the same for any number of threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TypeVar

import torch

from ..planner.plan import Plan

Tables = TypeVar("Tables")
Run = Callable[[Plan, Tables, Sequence[torch.Tensor], float], None]

_lock = threading.RLock()


def exact_products() -> bool:
    """Whether products of float32 matrices are computed in float32, as far as torch can tell."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by torch's newer interface, for some operation or device
        return False


def faithful_products(run: Run[Tables]) -> Run[Tables]:
    """Makes ``run`` compute its products in their own dtype, whatever autocast says, and on a CPU on one thread.

    The library cuts long sums by thread, so that their rounding would depend on the number of threads. That is the
    process's, hence the lock; a Python thread that starts meanwhile keeps the one thread. The native CPU backend has no
    such limit.
    """

    @wraps(run)
    def wrapped(plan: Plan, tables: Tables, batches: Sequence[torch.Tensor], scale: float) -> None:
        device = plan.device.partition(":")[0]
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                wrapped(plan, tables, batches, scale)
            return
        if device != "cpu":
            run(plan, tables, batches, scale)
            return
        with _lock:
            threads = torch.get_num_threads()
            if threads == 1:
                run(plan, tables, batches, scale)
                return
            torch.set_num_threads(1)
            try:
                run(plan, tables, batches, scale)
            finally:
                torch.set_num_threads(threads)

    return wrapped
