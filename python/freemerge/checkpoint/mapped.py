"""Mapped tensors are read from their file when they are touched; here that happens at once, and may fail in order."""

from __future__ import annotations

import ctypes
import errno
import mmap

import torch

from ..errors import CheckpointError

_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14
_LEAST_BYTES = 1 << 20


def fetched(tensor: torch.Tensor, origin: str) -> torch.Tensor:
    """The same tensor, its pages in memory; CheckpointError naming ``origin`` if its file has become too short for it.

    Touching such a page would end the process. Nothing happens to tensors that are small or not in main memory, and on
    systems that cannot do this.
    """
    if tensor.is_cpu and tensor.nbytes >= _LEAST_BYTES and tensor.is_contiguous():
        first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        nbytes = tensor.data_ptr() + tensor.nbytes - first
        failed = _madvise is not None and _madvise(ctypes.c_void_p(first), ctypes.c_size_t(nbytes), _POPULATE_READ)
        if failed and ctypes.get_errno() == errno.EFAULT:
            raise CheckpointError(f"{origin} was cut short while it was being read")
    return tensor


def _find() -> ctypes._NamedFuncPointer | None:
    try:
        return ctypes.CDLL(None, use_errno=True).madvise
    except (AttributeError, OSError, TypeError):
        return None


_madvise = _find()
