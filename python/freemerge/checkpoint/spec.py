"""What a tensor on disk is: its name, shape and dtype, and how safetensors spells the dtype."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..dense import dtype_name
from ..errors import ArgumentError

# Types that this torch has no name for cannot be held in a tensor, so a file that uses them is refused by name.
# F4 and F6 are absent on purpose: their elements are smaller than a byte and a tensor's shape would not say so.
_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
TORCH_DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _TORCH_NAMES.items() if hasattr(torch, name)
}
DTYPE_CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in TORCH_DTYPES.items()}

MERGEABLE = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
"""The dtypes that arithmetic is done on. Everything else (integers, booleans, fp8, complex) is only ever copied."""


class TensorSpec(NamedTuple):
    """One tensor without its values; a tuple, as models have very many."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes, contiguous."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """The dtype's name: ``bfloat16``."""
        return dtype_name(self.dtype)

    def with_dtype(self, dtype: torch.dtype) -> TensorSpec:
        """The same tensor stored as ``dtype``."""
        return TensorSpec(self.name, self.shape, dtype)


def dtype_code(spec: TensorSpec) -> str:
    """The safetensors name of a spec's dtype; ArgumentError if safetensors has none."""
    try:
        return DTYPE_CODES[spec.dtype]
    except KeyError:
        raise ArgumentError(f"{spec.name}: safetensors cannot store {spec.dtype_name}") from None
