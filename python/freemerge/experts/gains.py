"""Experts that set each singular direction of the merged task vector to what one task has of it.

In a merged model whose directions come from single tasks, above all one by the method "jsv", that tells the tasks apart
for half a byte a direction. What a number for each direction cannot tell may follow as a matrix of low rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import ArgumentError
from ..lazy import cached_property
from .budget import Offer, allocate, byte_limit
from .expert import Expert, whole_expert
from .format import entry_bytes, least_file_bytes
from .leading import leading_triplets
from .payload import numbers_to_bytes
from .select import rows_of
from .task_vector import task_vector
from .values.gains import NO_CODES, NO_SCALE, Gains, coded, directions
from .values.svd2 import Svd2

LEAST_COSINE = math.sqrt(1 / 3)  # with v_i: gains that told less of its energy did harm, docs/how-to/experts.md
_FIRST = 8  # components that every matrix offers, beside four times its even share of a budget


@dataclass(frozen=True)
class _Sketch:
    """One tensor of an expert before bytes are given out: coded gains, and what coded components would add.

    ``square``: ||U diag(g) V^T||^2; ``overlaps``: its inner product with each component; ``along``: its inner product
    with v_i, and ``norm``: ||v_i||; ``own``: that of v_i with each component; ``merged``: ||theta_m - theta_0||.
    """

    shape: tuple[int, ...]
    codes: Tensor
    scale: Tensor
    square: float
    norm: float
    merged: Tensor
    energies: list[float]
    components: Svd2 | None
    overlaps: Tensor
    along: float
    own: Tensor

    def made(self, rank: int) -> tuple[float, float]:
        """Of gains and the first components together: the inner product with v_i, and the square of the norm."""
        square = self.square
        if rank:
            left, right = (factor.double() for factor in self._first(rank).decoded())
            square += 2 * float(self.overlaps[:rank].sum()) + float(((left.mT @ left) * (right @ right.mT)).sum())
        return self.along + float(self.own[:rank].sum()), square

    def _first(self, rank: int) -> Svd2:
        assert self.components is not None
        return self.components.first(rank)

    def tensor(self, rank: int) -> Gains | None:
        """With the first components, and the norm of the task vector; None if nothing is left."""
        rest = self._first(rank) if rank else None
        if not len(self.codes):
            return None if rest is None else Gains(self.shape, self.codes, self.scale, self.merged, rest)
        factor, (along, square) = 1.0, self.made(rank)
        if square > 0:
            near = 2 * along > self.norm * math.sqrt(square)  # else at full length it is farther off than nothing
            factor = self.norm / math.sqrt(square) if near else max(0.0, along / square)
        if rest is not None:
            rest = Svd2(rest.shape, rest.left, rest.right, (rest.scales.double() * factor).to(rest.scales.dtype))
        return Gains(self.shape, self.codes, self.scale * factor, self.merged, rest)


def _tell_enough(sketches: Mapping[str, _Sketch], ranks: Mapping[str, int]) -> bool:
    """Whether matrices that have gains, at the length of v_i in each, tell enough of v_i, all together."""
    along, own = [], []
    for name, sketch in sketches.items():
        if len(sketch.codes):
            product, square = sketch.made(ranks[name])
            along.append(product * sketch.norm / math.sqrt(square) if square > 0 else 0.0)
            own.append(sketch.norm**2)
    return not own or math.fsum(along) > LEAST_COSINE * math.fsum(own)


@dataclass(frozen=True)
class GainExtraction:
    """Experts of a merged model's tensors ``names``: gains of all matrices, and components as a ``budget`` allows.

    With U diag(s) V^T = theta_m - theta_0, the gains are the diagonal of U^T v_i V, the nearest in least squares. What
    they and the components make of v_i is shorter than v_i, and is given its norm, if that is nearer to v_i than
    nothing: the directions that are missing are not there to be scaled. Of other tensors, components are of
    v_i - (theta_m - theta_0). So they are of matrices, too, where gains with their components tell less than a third of
    the energy of v_i, over all matrices: then the merged model's directions are not the task's. The experts of the
    ``chosen`` models are made in one pass and held in memory; each matrix offers at most eight components beside four
    times its even share of the budget.
    """

    base: Checkpoint
    backbone: Checkpoint
    models: Sequence[Checkpoint]
    names: Sequence[str]
    budget: float | None
    chosen: Sequence[int]
    statistics: Sequence[str]

    def expert(self, i: int) -> Expert:
        """The expert of model i."""
        sketches = self._sketches[i]
        ranks = self._ranks(sketches)
        if not _tell_enough(sketches, ranks):
            sketches = {name: self._without_gains(i, name) for name in self.names}
            ranks = self._ranks(sketches)
        tensors = {name: sketch.tensor(ranks[name]) for name, sketch in sketches.items()}
        return self._expert({name: tensor for name, tensor in tensors.items() if tensor is not None})

    def _ranks(self, sketches: Mapping[str, _Sketch]) -> dict[str, int]:
        """How many components of each tensor the budget allows beside the gains."""
        if self.budget is None:
            return dict.fromkeys(sketches, 0)
        limit = byte_limit(self.budget, map(self._shape, self.names))
        without = {name: sketch.tensor(0) for name, sketch in sketches.items()}
        gains = {name: tensor for name, tensor in without.items() if tensor is not None}
        kept = (self.base.specs[name] for name in self.statistics)
        least = least_file_bytes(self._expert({}).metadata, kept, limit)
        least += sum(self._entry_bytes(name, limit) + tensor.to_bytes().size for name, tensor in gains.items())
        if least > limit:
            raise ArgumentError(f"budget: {limit} bytes are less than the gains alone take, which is {least}")
        offers = {
            name: Offer(
                sketch.energies,
                Svd2.component_bits(sketch.shape),
                8 * (3 if name in gains else self._entry_bytes(name, limit) + 3),
            )
            for name, sketch in sketches.items()
        }
        return allocate(offers, 8 * (limit - least))

    def _without_gains(self, i: int, name: str) -> _Sketch:
        merged = task_vector(self.backbone, self.base, name)
        return self._sketch(task_vector(self.models[i], self.base, name), merged, None)

    @cached_property
    def _sketches(self) -> dict[int, dict[str, _Sketch]]:
        """Of each chosen model and tensor."""
        found: dict[int, dict[str, _Sketch]] = {i: {} for i in self.chosen}
        for name in self.names:
            merged = task_vector(self.backbone, self.base, name)
            basis = directions(merged) if merged.ndim == 2 and merged.any() else None
            for i, sketches in found.items():
                sketches[name] = self._sketch(task_vector(self.models[i], self.base, name), merged, basis)
        return found

    def _sketch(self, own: Tensor, merged: Tensor, basis: tuple[Tensor, Tensor, Tensor] | None) -> _Sketch:
        matrix = own.view(rows_of(own.shape))
        codes, scale = NO_CODES, NO_SCALE
        made, rest = own.new_zeros((), dtype=torch.float64), own - merged
        if basis is not None:
            left, _, right = basis
            codes, scale = coded(((left.mT @ matrix.double()) * right).sum(1))
            made = left * (codes.to(left.device) * scale.double().to(left.device)) @ right
            rest = (matrix - made).to(own.dtype)
        count = self._offered(own.shape)
        components, energies = None, []
        overlaps = owned = torch.zeros(0, dtype=torch.float64, device="cpu")
        if count:
            first, values, last = (part.cpu() for part in leading_triplets(rest.view(matrix.shape), count))
            energies = values.square().tolist()
        if energies:
            components = Svd2.encode(tuple(own.shape), first, values, last)
            factors = (factor.double() for factor in components.decoded())
            if basis is not None:
                here, there = factors
                overlaps, owned = (((here.mT @ x.double().cpu()) * there).sum(1) for x in (made, matrix))
        norm = float(torch.linalg.vector_norm(own, dtype=torch.float64))
        length = torch.linalg.vector_norm(merged, dtype=torch.float64).float().view(1).cpu()
        square = float(made.square().sum())
        along = float((made * matrix).sum())
        shape = tuple(own.shape)
        return _Sketch(shape, codes, scale, square, norm, length, energies, components, overlaps, along, owned)

    def _offered(self, shape: Sequence[int]) -> int:
        if self.budget is None:
            return 0
        even = self.budget * 16 * math.prod(shape) / Svd2.component_bits(tuple(shape))
        return min(*rows_of(shape), _FIRST + math.ceil(4 * even))

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.base.specs[name].shape

    def _entry_bytes(self, name: str, limit: int) -> int:
        shape = self._shape(name)
        return entry_bytes(name, limit) + len(numbers_to_bytes(len(shape), *shape))

    def _expert(self, tensors: dict[str, Gains]) -> Expert:
        return whole_expert(tensors, Gains.coding, self.budget)
