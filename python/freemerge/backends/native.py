"""What the thin wrappers around ``_core`` share: dtype codes, contiguity, threads, and which backend runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .. import _core
from ..errors import ArgumentError

# The values of `enum class DType` in csrc/common/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def dtype_code(tensor: torch.Tensor, name: str) -> int:
    """The native code of a tensor's dtype; :class:`ArgumentError` naming the argument when there is none."""
    try:
        return DTYPE_CODES[tensor.dtype]
    except KeyError:
        raise ArgumentError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}") from None


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.empty`` for a result that is about to be written as a whole: on a CPU in huge pages where there are any,
    because touching 4 KB at a time for the first time takes longer than computing most of what we write."""
    result = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        _core.prefer_huge_pages(result.data_ptr(), result.nbytes)
    return result


def runs_native(backend: str, tensors: Iterable[torch.Tensor]) -> bool:
    """Whether the native CPU kernels run: always for "cpu", on CPU tensors for "auto", else never."""
    if backend not in ("auto", "cpu", "cuda", "torch"):
        raise ArgumentError(f"backend must be 'auto', 'cpu', 'cuda' or 'torch', got {backend!r}")
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    if backend == "cpu" and not on_cpu:
        raise ArgumentError("backend 'cpu' needs CPU tensors")
    return on_cpu and backend in ("auto", "cpu")
