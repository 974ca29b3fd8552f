"""What LoRA, DoRA and IA3 do to one weight, as PEFT's merge does it, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .spec import TensorSpec

Read = Callable[[str], Tensor]
_BLOCK = 1 << 20  # entries in float64 that are computed at a time
DECOMPOSED = 8  # of a matrix in float32, what taking an initialisation out of one holds at most


class Change(Protocol):
    """What an adapter does to one tensor of the base."""

    def apply(self, tensor: Tensor, read: Read, dtype: torch.dtype) -> Tensor:
        """The changed tensor, in ``dtype``; ``read`` gives the adapter's tensors."""


@dataclass(frozen=True)
class Lora:
    """W + s B A for one weight: ``Linear``, a convolution, or, ``turned``, ``Conv1D`` and ``Embedding``.

    ``a``, ``b`` and ``magnitude`` are keys of the adapter's file; ``magnitude`` is DoRA's, "" without.
    ``initialisation``: the part that was taken out of the base's matrix before training.
    """

    a: str
    b: str
    scale: float
    turned: bool
    magnitude: str = ""
    initialisation: str = ""

    @property
    def by_rows(self) -> bool:
        """Whether some rows of the result take no others of the base's weight."""
        return not self.initialisation and not (self.turned and self.magnitude)

    def apply(self, tensor: Tensor, read: Read, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """Of the whole weight, or if it goes :attr:`by_rows` of some, which ``tensor`` then holds."""
        if self.turned and self.magnitude:  # which goes by outputs
            return replace(self, turned=False).apply(tensor.T, read, dtype).T
        # In float64, which autocast and lowered matmul precisions leave alone, and a few rows at a time.
        a, b = (read(key).to(tensor.device, torch.float64).flatten(1) for key in (self.a, self.b))
        left, right = (a.T[rows], b.T) if self.turned else (b[rows], a)
        taken = _taken(tensor, self.initialisation, len(a), self.scale, turned=self.turned)
        magnitude = read(self.magnitude).to(b).flatten()[rows] if self.magnitude else None
        changed = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
        before, after = tensor.flatten(1), changed.flatten(1)
        length = max(1, _BLOCK // max(1, right.shape[1]))
        for block in (slice(begin, begin + length) for begin in range(0, len(left), length)):
            values = before[block].to(torch.float64, copy=True)
            if taken is not None:
                values -= taken[0][block] @ taken[1]
            values += (left[block] @ right).mul_(self.scale)
            if magnitude is not None:
                values *= (magnitude[block] / torch.linalg.vector_norm(values, dim=1)).view(-1, 1)
            after[block] = values
        return changed


@dataclass(frozen=True)
class Bias:
    """A bias and ``scale`` times what the adapter adds to it."""

    key: str
    scale: float

    def apply(self, tensor: Tensor, read: Read, dtype: torch.dtype) -> Tensor:
        return tensor.to(dtype) + self.scale * read(self.key).to(tensor.device, dtype)


def fits(a: TensorSpec, b: TensorSpec, expected: tuple[int, ...], *, turned: bool) -> bool:
    """Whether B A has the shape of the base's weight."""
    if len(a.shape) != len(b.shape) or len(a.shape) < 2 or a.shape[0] != b.shape[1] or math.prod(b.shape[2:]) != 1:
        return False
    product = (b.shape[0], *a.shape[1:])
    return expected == (product[::-1] if turned else product)


def _taken(weight: Tensor, kind: str, rank: int, scale: float, *, turned: bool) -> tuple[Tensor, Tensor] | None:
    """Factors of what PiSSA or OLoRA took out of a matrix, if one did; found in float32, as PEFT does."""
    if not kind:
        return None
    if kind == "olora":
        q, r = torch.linalg.qr(weight.float())
        return scale * q[:, :rank].double(), r[:rank].double()
    u, s, v = torch.linalg.svd((weight.T if turned else weight).float(), full_matrices=False)
    left, right = (u[:, :rank] * s[:rank]).double(), v[:rank].double()
    return (right.T, left.T) if turned else (left, right)


@dataclass(frozen=True)
class Ia3:
    """A weight times learned factors: of its outputs, or of its inputs for ``feedforward`` modules."""

    key: str
    feedforward: bool
    turned: bool

    def apply(self, tensor: Tensor, read: Read, dtype: torch.dtype) -> Tensor:
        factors = read(self.key).to(tensor.device, dtype).flatten()
        axis = int(self.feedforward != self.turned) if tensor.ndim > 1 else 0
        shape = [1] * tensor.ndim
        shape[axis] = -1
        if self.feedforward and factors.numel() != tensor.shape[axis]:  # a convolution with groups
            per_group = tensor.shape[1]
            groups = factors.numel() // per_group
            factors = factors.view(groups, 1, per_group).expand(-1, tensor.shape[0] // groups, -1)
            shape[0] = tensor.shape[0]
        return tensor * factors.reshape(shape)


def fits_ia3(factors: tuple[int, ...], weight: tuple[int, ...], *, feedforward: bool, turned: bool) -> bool:
    """Whether IA3's factors belong to a weight of this shape."""
    if len(weight) < 2 or len(factors) != len(weight):
        return False
    count = math.prod(factors)
    if len(weight) == 2:
        size = weight[int(feedforward != turned)]
        return factors == ((1, size) if feedforward else (size, 1))
    expected = weight[1] if feedforward else weight[0]
    if not expected or factors[1] != count:
        return False
    groups = count // expected if feedforward else 1
    return groups > 0 and count == groups * expected and weight[0] % groups == 0
