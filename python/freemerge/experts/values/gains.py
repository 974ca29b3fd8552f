"""One gain for each singular direction of the merged task vector, and what that leaves as a matrix of low rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...errors import ArgumentError
from ...methods.spectra import left_times, singular_triplets
from ..payload import Bytes, Reader, numbers_to_bytes, tensors_to_bytes
from ..select import rows_of
from .base import ExpertTensor, Seen
from .svd2 import Svd2

TOLERANCE = 3e-6  # of the norm: above what arithmetic changes, below what rounding to 16 bits does
LARGEST = 7  # codes are -7 to 7, written as 0 to 14 in four bits
NO_CODES, NO_SCALE = torch.empty(0, dtype=torch.int8, device="cpu"), torch.zeros(1, dtype=torch.float32, device="cpu")
_CLIPPINGS = torch.linspace(1.0, 0.3, 15, dtype=torch.float64, device="cpu")


@dataclass(frozen=True, eq=False)
class Gains(ExpertTensor):
    """theta_0 + U diag(g) V^T + rest in place of theta_m, where theta_m - theta_0 = U diag(s) V^T, s falling.

    Only matrices have gains: how methods see other tensors, a file does not tell. Without them, the rest is added to
    theta_m.

    Attributes:
        codes: int8 [n], g_k = ``scale`` * codes[k]; directions after the first n have no gain.
        scale: float32 [1].
        norm: ||theta_m - theta_0||, float32 [1], by which another merged model or base is noticed.
        rest: what is added beside them, or None.
    """

    coding = "gains"
    takes = ("budget", "backbone")
    of_backbone = "gains are of its directions"
    codes: torch.Tensor
    scale: torch.Tensor
    norm: torch.Tensor
    rest: Svd2 | None

    @property
    def relative(self) -> bool:
        return len(self.codes) > 0

    @property
    def keeps(self) -> bool:
        return self.relative

    @property
    def entries(self) -> int:
        return len(self.codes) + (0 if self.rest is None else self.rest.entries)

    @property
    def gains(self) -> torch.Tensor:
        """g, float64 [n]."""
        return self.codes.double() * self.scale.double()

    @classmethod
    def seen(cls, vector: torch.Tensor) -> Seen:
        """U, s and V^T of theta_m - theta_0 in float32, on its device."""
        return tuple(part.float() for part in directions(vector))

    def check(self, seen: Seen) -> None:
        if len(self.codes):
            if not seen:
                raise ArgumentError("vectors must be given: gains are of the merged task vector's singular directions")
            found, norm = float(torch.linalg.vector_norm(seen[1], dtype=torch.float64)), float(self.norm)
            if abs(found - norm) > TOLERANCE * norm:
                raise ArgumentError(
                    f"theta_m - theta_0 has norm {found:.6g}, but gains are of one with norm {norm:.6g}: "
                    "give as backbone (--backbone) the merged model that they were made of, unrounded, and its base"
                )

    def dense(self, device: torch.device | None = None, seen: Seen = ()) -> torch.Tensor:
        self.check(seen)
        added = torch.zeros(rows_of(self.shape), dtype=torch.float32, device=device or "cpu")
        if len(self.codes):
            left, values, right = (part.to(device) for part in seen)
            changes = -values.double()
            known = self.gains[: len(values)].to(device)
            changes[: len(known)] += known
            added += left_times(left.double() * changes, right)  # in float64, which no autocast and no TF32 lowers
        added = added.view(self.shape)
        return added if self.rest is None else added.add_(self.rest.dense(device))

    def to_bytes(self) -> Bytes:
        parts = [numbers_to_bytes(len(self.codes), int(self.rest is not None))]
        if len(self.codes):
            parts.append(tensors_to_bytes(self.scale, self.norm, _packed(self.codes)))
        if self.rest is not None:
            parts.append(self.rest.to_bytes())
        return np.concatenate(parts)

    @classmethod
    def from_bytes(cls, shape: tuple[int, ...], reader: Reader) -> Gains:
        count, more = reader.number(), reader.number()
        if count > (min(shape) if len(shape) == 2 else 0) or more > 1 or not (count or more):
            raise ValueError(f"{count} gains and {more} remainders of shape {shape}")
        codes, scale, norm = NO_CODES, NO_SCALE, NO_SCALE
        if count:
            scale, norm = reader.tensor(torch.float32, 1), reader.tensor(torch.float32, 1)
            if float(norm) <= 0 or not 0 <= float(scale) * LARGEST <= torch.finfo(torch.float32).max:
                raise ValueError(f"scale {float(scale):g} and norm {float(norm):g}")
            codes = _unpacked(reader.take((count + 1) // 2), count)
        if more:
            return cls(shape, codes, scale, norm, Svd2.from_bytes(shape, reader))
        reader.tensors()  # nothing may be left
        return cls(shape, codes, scale, norm, None)


def directions(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [H, n], s [n] falling and V^T [n, W] of a matrix, in float64, without those that are zero.

    Only float64's rounding can turn them, so whoever decomposes the same weights finds the same directions, but for
    signs, which cancel, and for values that are equal to 1e-10 of the largest.
    """
    left, values, right = singular_triplets(matrix, min(matrix.shape), exact=matrix.dtype == torch.float64)
    count = int((values > 0).sum())
    return left[:, :count], values[:count], right[:count]


def coded(gains: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale for float64 gains: of some scales, the one with the least squared error."""
    largest = gains.abs().max() if len(gains) else gains.new_zeros(())
    if not largest:
        return torch.zeros(len(gains), dtype=torch.int8, device="cpu"), NO_SCALE
    scales = _CLIPPINGS.to(gains.device) * largest / LARGEST
    codes = (gains / scales[:, None]).round().clamp(-LARGEST, LARGEST)
    best = int((codes * scales[:, None] - gains).square().sum(1).argmin())
    return codes[best].to(torch.int8).cpu(), scales[best : best + 1].float().cpu()


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the first in the lower half; a half that is left over is 7, the code of zero."""
    halves = torch.nn.functional.pad(codes + LARGEST, (0, len(codes) % 2), value=LARGEST).to(torch.uint8).view(-1, 2)
    return halves[:, 0] | (halves[:, 1] << 4)


def _unpacked(packed: Bytes, count: int) -> torch.Tensor:
    halves = np.stack([packed & 15, packed >> 4], 1).ravel()
    if (halves > 2 * LARGEST).any():
        raise ValueError("a gain's code above 14")
    if (halves[count:] != LARGEST).any():
        raise ValueError("stray bits after the gains")
    return torch.from_numpy(halves[:count].astype(np.int8) - np.int8(LARGEST))
