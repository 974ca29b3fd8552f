"""What a method is given: the task vectors of the tensors that are merged together, read when it asks for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from ..lazy import torch
from ..responses import Response
from .layers import is_convolution

if TYPE_CHECKING:
    from torch import Tensor

    from ..accumulate import LateSum

Sides = tuple[int, int]  # rows and columns of a matrix
PIECE = 1 << 18  # entries


@dataclass(frozen=True)
class Deltas:
    """The task vectors v_i = theta_i - theta_0 of one tensor, for i = 1 .. K.

    Every call of :meth:`means`, :meth:`sum` or :meth:`each` reads the base and the models once. What they return is
    new, float32 or float64, and the caller's to change.

    Attributes:
        name, shape: of the tensor.
        base: reads theta_0.
        models: for each model what reads theta_i.
        check: raises CheckpointError if one of the means of |v_i| is not finite.
        transposed: whether it is the weight of a layer stored as [inputs, outputs], not [outputs, inputs]. Known only
            for methods that ask for it (:attr:`freemerge.methods.Method.by_inputs`) and models of known architecture.
    """

    name: str
    shape: tuple[int, ...]
    base: Callable[[], Tensor]
    models: Sequence[Callable[[], Tensor]]
    check: Callable[[Sequence[float]], None]
    transposed: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def means(self) -> list[float]:
        """E(v_i) = mean |v_i| of each model."""
        from ..accumulate import abs_means

        base = self.base()
        means = abs_means(base, [read().to(base.device) for read in self.models])
        self.check(means)
        return means

    def sum(self, weights: Sequence[float]) -> Tensor:
        """sum_i weights[i] v_i in one pass."""
        from ..accumulate import task_vector_sum

        base = self.base()
        total, means = task_vector_sum(base, [read().to(base.device) for read in self.models], weights)
        self.check(means)
        return total

    def filtered_sum(
        self, weights: Sequence[float], response: Response, backend: str
    ) -> tuple[Tensor | LateSum, tuple[float, float] | None]:
        """The same, and its Frobenius norms before and after the filter; None if it is yet to be filtered, see
        :func:`freemerge.accumulate.filtered_sum`."""
        from ..accumulate import filtered_sum

        base = self.base()
        models = [read().to(base.device) for read in self.models]
        total, _, norms = filtered_sum(base, models, weights, response, backend=backend, check=self.check)
        return total, norms

    def pairs(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """theta_i and theta_0 for each model, for what need not have v_i itself; or v_i and None.

        Entries that are not finite are found by the other ways to read them.
        """
        base = self.base()
        for read in self.models:
            yield read().to(base.device), base
            self.check([0.0])

    def pieces(self, at_once: int = 1) -> Iterator[Deltas]:
        """The entries in order, as vectors so short that what is allocated for them stays in a processor's cache, where
        so many task vectors are held at a time; longer ones where the tensor is merged on another device. The tensor
        itself if it is short. Each is to be read once.
        """
        length = max(1, PIECE // at_once)
        if self.numel <= length:
            yield self
            return
        base, models = self.base().flatten(), [read().flatten() for read in self.models]
        means: list[float] = []
        if not base.is_cpu:
            length *= 64
        for begin in range(0, self.numel, length):
            tensors = [tensor[begin : begin + length] for tensor in (base, *models)]
            first, *others = [partial(_same, tensor) for tensor in tensors]
            yield Deltas(self.name, tuple(tensors[0].shape), first, others, means.extend)
        self.check([0.0 if all(map(math.isfinite, means)) else math.inf] * len(models))

    def by_pieces(self, merge: Callable[[Deltas], Tensor], at_once: int = 1) -> Tensor:
        """``merge(self)`` for a function that works entry by entry and reads its argument once, from :meth:`pieces`."""
        from ..accumulate import new_empty

        whole: Tensor | None = None
        begin = 0
        for piece in self.pieces(at_once):
            merged = merge(piece)
            if piece is self:
                return merged
            whole = new_empty(self.shape, merged) if whole is None else whole
            whole.view(-1)[begin : begin + piece.numel].copy_(merged)
            begin += piece.numel
        assert whole is not None
        return whole

    def each(self) -> Iterator[Tensor]:
        """v_1, v_2, ..., v_K, one at a time."""
        from ..accumulate import task_vector_sum

        base = self.base()
        for read in self.models:
            delta, means = task_vector_sum(base, [read().to(base.device)], [1.0])
            self.check(means)
            yield delta


@dataclass(frozen=True)
class TaskVectors:
    """The task vectors of a unit: usually of one tensor, of several where a view stacks them.

    Attributes:
        tensors: the members of the unit.
        as_matrices: whether the recipe treats the unit as matrices (action "filter"), which :meth:`matrices` gives;
            otherwise (action "merge") it is merged entry by entry.
        parts: rows of the matrices that a view splits the (stacked) rows, or those of each matrix of a batch, into;
            empty where they are one matrix.
        backend: the backend that must do the work, or "auto".
        sizes: entries of each of several small tensors, which the only member then is, end to end as one vector.
    """

    tensors: tuple[Deltas, ...]
    as_matrices: bool
    parts: tuple[int, ...] = ()
    backend: str = "auto"
    sizes: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """K, the number of models."""
        return len(self.tensors[0].models)

    def means(self) -> list[list[float]]:
        """E(v_i) = mean |v_i| of each member and model, or of each of the small tensors."""
        if not self.sizes:
            return [tensor.means() for tensor in self.tensors]
        from ..accumulate import part_means

        (flat,) = self.tensors
        base = flat.base()
        means = part_means(base, [read().to(base.device) for read in flat.models], self.sizes)
        flat.check([sum(column) for column in zip(*means, strict=True)])  # not finite where one of them is not
        return means

    def each(self) -> Iterator[list[Tensor]]:
        """For each model its task vectors, one of each member; one model at a time."""
        yield from map(list, zip(*(tensor.each() for tensor in self.tensors), strict=True))

    def sum(self, weights: Sequence[float]) -> list[Tensor]:
        """sum_i weights[i] v_i of each member, in one pass."""
        return [tensor.sum(weights) for tensor in self.tensors]

    def matrices(self, deltas: Sequence[Tensor]) -> list[Tensor]:
        """The matrices [H, W], or batches [..., H, W] of them, that task vectors of the members make up.

        They share memory with the task vectors, unless several are stacked: :meth:`unstack` copies their rows back.
        Of a unit that is merged entry by entry, they are the members that have rows; of a convolution kernel,
        [outputs, all else].
        """
        if not self.as_matrices:
            return [
                delta.flatten(1) if is_convolution(tensor.name, tensor.shape) else delta
                for tensor, delta in zip(self.tensors, deltas, strict=True)
                if delta.ndim > 1
            ]
        matrix = deltas[0] if len(deltas) == 1 else torch.cat(list(deltas))
        if not self.parts:
            return [matrix]
        each = [matrix] if matrix.ndim == 2 else list(matrix)
        return [part for whole in each for part in torch.split(whole, list(self.parts))]

    def linear_maps(self, deltas: Sequence[Tensor]) -> list[Tensor]:
        """:meth:`matrices`, each [..., outputs, inputs], however its layer stores it."""
        return self.turned(self.matrices(deltas))

    def turned(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """What :meth:`matrices` gave as :meth:`linear_maps` gives it: views, transposed where the layer is stored so.

        The members of a unit are all stored in the same way.
        """
        return [matrix.mT if self.tensors[0].transposed else matrix for matrix in matrices]

    def unstack(self, matrices: Sequence[Tensor], deltas: Sequence[Tensor]) -> None:
        """Copy changed :meth:`matrices` of several stacked members back; nothing to do for one."""
        if len(deltas) > 1:
            for delta, rows in zip(deltas, torch.split(matrices[0], [len(delta) for delta in deltas]), strict=True):
                delta.copy_(rows)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def added(each: Iterable[list[Tensor]]) -> list[Tensor]:
    """The sum of task vectors of several models, one tensor a member, in the memory of the first model's.

    One model is read at a time; weights are for the caller to multiply by.
    """
    models = iter(each)
    totals = next(models)
    for deltas in models:
        for total, delta in zip(totals, deltas, strict=True):
            total.add_(delta)
    return totals


@dataclass(frozen=True)
class WatchedVectors(TaskVectors):
    """Task vectors of which the sum and the squared norms are taken when they are first read one by one."""

    inner: TaskVectors = field(kw_only=True)
    sums: list[Tensor] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)

    def each(self) -> Iterator[list[Tensor]]:
        return self.inner.each() if self.squares else self._watched()

    def sum(self, weights: Sequence[float]) -> list[Tensor]:
        return self.inner.sum(weights)

    def read(self) -> None:
        """Read them, unless that has been done."""
        for _ in () if self.squares else self._watched():
            pass

    def _watched(self) -> Iterator[list[Tensor]]:
        from ..accumulate import norm

        for deltas in self.inner.each():
            if self.sums:
                for total, delta in zip(self.sums, deltas, strict=True):
                    total.add_(delta)
            else:
                self.sums.extend(delta.clone() for delta in deltas)
            self.squares.append(norm(deltas) ** 2)
            yield deltas


def watched(vectors: TaskVectors) -> WatchedVectors:
    """The same task vectors, watched."""
    return WatchedVectors(vectors.tensors, vectors.as_matrices, vectors.parts, vectors.backend, inner=vectors)
