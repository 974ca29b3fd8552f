"""What LoRA, DoRA and IA3 do to one weight, as PEFT's merge does it, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .spec import TensorSpec

Read = Callable[[str], Tensor]


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

    def apply(self, weight: Tensor, read: Read) -> Tensor:
        # In float64, which autocast and lowered matmul precisions leave alone.
        a, b = (read(key).to(weight.device, torch.float64) for key in (self.a, self.b))
        start = weight.double()
        if self.initialisation:
            start = _without_initialisation(weight, self.initialisation, a.shape[0], self.scale, turned=self.turned)
        product: Tensor = b.flatten(1) @ a.flatten(1)
        adapted = start + self.scale * (product.T if self.turned else product.view(weight.shape))
        if self.magnitude:
            rows = adapted.T if self.turned else adapted.flatten(1)
            magnitude = read(self.magnitude).to(weight.device, torch.float64).flatten()
            factor = magnitude / torch.linalg.vector_norm(rows, dim=1)
            adapted = adapted * (factor if self.turned else factor.view(-1, *[1] * (weight.ndim - 1)))
        return adapted.to(weight.dtype)


def fits(a: TensorSpec, b: TensorSpec, expected: tuple[int, ...], *, turned: bool) -> bool:
    """Whether B A has the shape of the base's weight."""
    if len(a.shape) != len(b.shape) or len(a.shape) < 2 or a.shape[0] != b.shape[1] or math.prod(b.shape[2:]) != 1:
        return False
    product = (b.shape[0], *a.shape[1:])
    return expected == (product[::-1] if turned else product)


def _without_initialisation(weight: Tensor, kind: str, rank: int, scale: float, *, turned: bool) -> Tensor:
    """What PiSSA or OLoRA left of a matrix; in float32, as PEFT computes it."""
    if kind == "olora":
        q, r = torch.linalg.qr(weight.float())
        part: Tensor = scale * q[:, :rank].double() @ r[:rank].double()
        return weight.double() - part
    matrix = (weight.T if turned else weight).float()
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    part = (u[:, :rank] * s[:rank]).double() @ v[:rank].double()
    return weight.double() - (part.T if turned else part)


@dataclass(frozen=True)
class Ia3:
    """A weight times learned factors: of its outputs, or of its inputs for ``feedforward`` modules."""

    key: str
    feedforward: bool
    turned: bool

    def apply(self, weight: Tensor, read: Read) -> Tensor:
        factors = read(self.key).to(weight).flatten()
        axis = int(self.feedforward != self.turned) if weight.ndim > 1 else 0
        shape = [1] * weight.ndim
        shape[axis] = -1
        if self.feedforward and factors.numel() != weight.shape[axis]:  # a convolution with groups
            per_group = weight.shape[1]
            groups = factors.numel() // per_group
            factors = factors.view(groups, 1, per_group).expand(-1, weight.shape[0] // groups, -1)
            shape[0] = weight.shape[0]
        return weight * factors.reshape(shape)


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
