"""The bytes of one tensor of an expert file: numbers and little-endian tensors (docs/expert-format.md)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..checkpoint.finite import all_finite

Bytes = npt.NDArray[np.uint8]


def numbers_to_bytes(*numbers: int) -> Bytes:
    """Unsigned LEB128: seven bits a byte, least significant first, the high bit set on all bytes but the last."""
    groups = bytearray()
    for number in numbers:
        while number >= 128:
            groups.append(number & 127 | 128)
            number >>= 7
        groups.append(number)
    return np.frombuffer(bytes(groups), dtype=np.uint8)


def tensors_to_bytes(*tensors: torch.Tensor) -> Bytes:
    """The elements of contiguous tensors, one tensor after the other."""
    return np.concatenate([tensor.view(torch.uint8).numpy() for tensor in tensors])


def packed_bits(bits: torch.Tensor) -> torch.Tensor:
    """Eight bits a byte, the first in the lowest, padded with zeros."""
    return torch.from_numpy(np.packbits(bits.numpy(), bitorder="little"))


def unpacked_bits(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse of :func:`packed_bits`; ValueError for bytes that it does not make."""
    bits = np.unpackbits(packed.numpy(), bitorder="little")
    if bits[count:].any():
        raise ValueError(f"stray bits after the first {count}")
    return torch.from_numpy(bits[:count].view(np.bool_))


class Reader:
    """Reads a payload from its start. Whatever is wrong with the bytes is a ValueError."""

    def __init__(self, payload: Bytes) -> None:
        self._payload = payload
        self._at = 0
        self.size: int = payload.size  #: of the whole payload

    def number(self) -> int:
        """An unsigned LEB128 number of at most nine bytes."""
        value = 0
        for shift in range(0, 63, 7):
            if self._at >= self.size:
                break
            byte = int(self._payload[self._at])
            self._at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("its header is cut or too large")

    def take(self, count: int) -> Bytes:
        """The next ``count`` bytes: a copy, because the payload may be a memory map."""
        if count > self.size - self._at:
            raise ValueError(f"{count} bytes are missing")
        self._at += count
        taken: Bytes = self._payload[self._at - count : self._at].copy()
        return taken

    def tensors(self, *parts: tuple[torch.dtype, int]) -> list[torch.Tensor]:
        """All bytes that are left, which must be finite vectors of exactly these dtypes and lengths."""
        expected, left = sum(dtype.itemsize * count for dtype, count in parts), self.size - self._at
        if left != expected:
            raise ValueError(f"{left} bytes of values instead of {expected}")
        return [self.tensor(dtype, count) for dtype, count in parts]

    def tensor(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        """The next bytes, as a finite vector."""
        data = self.take(dtype.itemsize * count)
        tensor = torch.from_numpy(data).view(dtype) if count else torch.empty(0, dtype=dtype, device="cpu")
        if dtype.is_floating_point and not all_finite(tensor):
            raise ValueError("non-finite values")
        return tensor
