"""Mapped tensors are read from their file when they are touched; here that happens at once, and may fail in order."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

import torch

from ..errors import CheckpointError
from .reader import Checkpoint
from .regular_file import was_cut_short

_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14
_LEAST_BYTES = 1 << 20


def fetched(tensor: torch.Tensor, source: Checkpoint, name: str) -> torch.Tensor:
    """A tensor that was read as ``name``, its pages in memory; CheckpointError naming its file if they cannot be had.

    The file has become too short, or its disk fails: touching such a page would end the process. Nothing happens to
    tensors that are small or not in main memory, and on systems that cannot do this.
    """
    if tensor.is_cpu and tensor.nbytes >= _LEAST_BYTES and tensor.is_contiguous():
        first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        nbytes = tensor.data_ptr() + tensor.nbytes - first
        failed = _madvise is not None and _madvise(ctypes.c_void_p(first), ctypes.c_size_t(nbytes), _POPULATE_READ)
        if failed and ctypes.get_errno() == errno.EFAULT:
            for file, opened in source.identities.items():
                if was_cut_short(file, opened):
                    raise CheckpointError(f"{file} was cut short while it was being read")
            raise CheckpointError(f"cannot read {source.origin(name)}: {os.strerror(errno.EIO)}")
    return tensor


def _find() -> ctypes._NamedFuncPointer | None:
    try:
        return ctypes.CDLL(None, use_errno=True).madvise
    except (AttributeError, OSError, TypeError):
        return None


_madvise = _find()
