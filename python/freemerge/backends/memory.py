"""Tensors as the backends see them: dtype codes, addresses, strides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from .. import _core
from ..dense import address
from ..errors import ArgumentError

_SAMPLE = (16, 64)  # rows and columns that estimate a matrix's mean

DTYPE_CODES: dict[torch.dtype, int] = {getattr(torch, name): code for name, code in _core.DTYPES.items()}


def dtype_code(tensor: torch.Tensor, name: str) -> int:
    """The native code of a tensor's dtype; :class:`ArgumentError` naming the argument when there is none."""
    try:
        return DTYPE_CODES[tensor.dtype]
    except KeyError:
        raise ArgumentError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}") from None


def arithmetic_of(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """The arithmetic of an operation on vectors: float64 if any of them is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def matrices(batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Each matrix of the batches."""
    for x in batches:
        if x.ndim == 2:
            yield x
        else:
            yield from x.unbind(0)


def sample(x: torch.Tensor) -> torch.Tensor:
    """The entries of each matrix that estimate its mean."""
    rows, columns = (max(1, n // count) for n, count in zip(x.shape[-2:], _SAMPLE, strict=True))
    return x[..., ::rows, ::columns]


def pointer(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a tensor begins, and the code of its dtype, as the compiled modules take them."""
    return address(tensor), DTYPE_CODES[tensor.dtype]


def addresses(batches: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
    """The address of each matrix of the batches, and its row stride in elements."""
    pointers: list[int] = []
    strides: list[int] = []
    for x in batches:
        (height, width), first = x.shape[-2:], address(x)
        stride = x.stride(-2) if height > 1 else width
        if x.ndim == 2:
            pointers.append(first)
            strides.append(stride)
        else:
            count, step = x.shape[0], x.stride(0) * x.element_size()
            pointers.extend(first + i * step for i in range(count))
            strides.extend([stride] * count)
    return pointers, strides


def multiply_(batches: Sequence[torch.Tensor], factor: float) -> None:
    """Multiply in place; a factor of 0 clears even what is not finite."""
    if factor != 1.0:
        for x in batches:
            x.mul_(factor) if factor else x.zero_()
