"""Values as floats of 32 or 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...checkpoint.finite import all_finite
from ...errors import ArgumentError
from ..payload import Bytes, Reader, tensors_to_bytes
from .sparse import SparseTensor


@dataclass(frozen=True, eq=False)
class _Floats(SparseTensor):
    dtype: ClassVar[torch.dtype]
    data: torch.Tensor

    @classmethod
    def rounded(cls, shape: tuple[int, ...], indices: torch.Tensor, values: torch.Tensor) -> _Floats:
        data = values.to(cls.dtype)
        if not all_finite(data):
            raise ArgumentError(f"values: {cls.coding} cannot hold {float(values.abs().max()):g}")
        return cls(shape, indices, data)

    def values(self) -> torch.Tensor:
        return self.data.float()

    def values_to_bytes(self) -> Bytes:
        return tensors_to_bytes(self.data)

    @classmethod
    def values_from_bytes(cls, shape: tuple[int, ...], indices: torch.Tensor, reader: Reader) -> _Floats:
        (data,) = reader.tensors((cls.dtype, indices.numel()))
        return cls(shape, indices, data)


class Float32(_Floats):
    coding = "fp32"
    dtype = torch.float32


class BFloat16(_Floats):
    coding = "bf16"
    dtype = torch.bfloat16


class Float16(_Floats):
    coding = "fp16"
    dtype = torch.float16
