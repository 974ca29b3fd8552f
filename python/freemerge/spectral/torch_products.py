"""Matrix products of the torch backend, the same for any number of threads."""

from __future__ import annotations

import threading

import torch

_lock = threading.RLock()


def exact_products() -> bool:
    """Whether products of float32 matrices are computed in float32, as far as torch can tell."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by torch's newer interface, for some operation or device
        return False


class one_thread:
    """Run CPU products on one thread: the library cuts long sums by thread, so that their rounding would depend on it.

    The thread count is the process's, hence the lock; a Python thread that starts meanwhile keeps the one thread. The
    native CPU backend has no such limit.
    """

    __slots__ = ("_cpu", "_threads")

    def __init__(self, device: str) -> None:
        self._cpu = device == "cpu"

    def __enter__(self) -> None:
        if self._cpu:
            _lock.acquire()
            self._threads = torch.get_num_threads()
            if self._threads != 1:
                torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if self._cpu:
            if self._threads != 1:
                torch.set_num_threads(self._threads)
            _lock.release()
