"""Bytes: what is read, worked on and written of each unit of a merge, and the memory that it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch

from ..checkpoint import Checkpoint, TensorSpec
from ..lazy import cached_property
from ..methods.interference import sampled
from ..methods.layers import is_convolution
from ..methods.vectors import Sides
from .inspection import matrix_shapes
from .recipe import Recipe
from .units import Unit

PROCESS_BYTES = 160_000_000  # of Python, torch and this package


class Accounting:
    """The bytes of a merge of ``models`` by ``recipe``, whose tensors are the base's ``specs``.

    ``out_spec``: shape and dtype of a merged tensor, by its name.

    Attributes:
        dtypes: of each tensor in base and models, the base's first.
        nbytes: what one look at a tensor reads of all of them.
        scale: the global scale; None if it has to be found.
    """

    def __init__(
        self,
        base: Checkpoint,
        models: Sequence[Checkpoint],
        recipe: Recipe,
        specs: Mapping[str, TensorSpec],
        out_spec: Callable[[str], TensorSpec],
    ) -> None:
        self._out_spec = out_spec
        self._base, self._models, self._recipe, self._specs = base, models, recipe, specs
        self._method = recipe.merging
        self._widest: torch.dtype = getattr(torch, recipe.compute_dtype)
        everywhere = [source.specs for source in (base, *models)]
        self.dtypes = {name: tuple([held[name].dtype for held in everywhere if name in held]) for name in specs}
        self.nbytes = {
            name: spec.numel * sum([dtype.itemsize for dtype in self.dtypes[name]]) for name, spec in specs.items()
        }
        self.scale = recipe.global_scale(len(models))
        self.interference = recipe.scale == "interference"

    def compute_dtype(self, name: str) -> torch.dtype:
        """In what a tensor is merged."""
        return torch.float64 if torch.float64 in self.dtypes[name] else self._widest

    def has_matrices(self, unit: Unit) -> bool:
        return any(len(self._specs[name].shape) > 1 for name in unit.names)

    # Of a unit

    def look(self, unit: Unit) -> int:
        """What one look at it reads."""
        if unit.base_alone:
            return sum(self._base.specs[name].nbytes for name in unit.names)
        return sum(map(self.nbytes.__getitem__, unit.names))

    def worked(self, unit: Unit) -> int:
        """Its size in the dtype of the arithmetic."""
        return sum(self._specs[name].numel * self.compute_dtype(name).itemsize for name in unit.names)

    def merge(self, unit: Unit) -> int:
        """What merging it reads."""
        once = unit.action in ("copy", "average")
        return self.look(unit) * (1 if once else self._method.reads(unit.action == "filter"))

    def find_scale(self, unit: Unit) -> int:
        """What finding the scale reads of it: what a merge does, for "interference" of matrices and once more."""
        if not self.interference:
            return self.merge(unit)
        if unit.flat:
            return sum(self.find_scale(Unit((name,), unit.action)) for name in unit.names)
        return self.look(unit) + self.merge(unit) if self.has_matrices(unit) else 0

    # Of units

    def reads(self, units: Iterable[Unit]) -> tuple[int, int]:
        """What is read to measure and to merge them."""
        units = list(units)
        seen = [unit for unit in units if unit.by_method]
        measured = self._method.passes * sum(map(self.look, seen))
        if self.scale is None:
            measured += sum(map(self.find_scale, seen))
        return measured, sum(map(self.merge, units))

    def keepable(self, units: Iterable[Unit]) -> int:
        """What is merged to find the scale, at most; 0 if nothing is."""
        if self.interference or self.scale is not None:
            return 0
        return sum(self.worked(unit) for unit in units if unit.action == "filter")

    def memory(self, units: Iterable[Unit], transposed: Collection[str]) -> int:
        """What the largest unit takes, with what reading it takes of all inputs at once, and its output twice, as the
        former one may wait to be written.

        ``transposed``: the tensors that are stored as [inputs, outputs].
        """
        return max((int(self._held(unit, transposed)) for unit in units), default=0)

    def _held(self, unit: Unit, transposed: Collection[str]) -> float:
        def sides(shape: Sequence[int]) -> Sides:
            """Rows and columns of a matrix, as :meth:`TaskVectors.linear_maps` gives it."""
            rows, columns = (1, *shape)[-2:]  # a vector that a rule filters is one row
            return (columns, rows) if unit.names[0] in transposed else (rows, columns)

        shapes = matrix_shapes(unit, self._specs) if unit.action == "filter" else ()
        matrix = max(map(sides, shapes), key=math.prod, default=None)
        held = 1.0 if unit.action == "copy" else self._method.holds(len(self._models), matrix)
        if self.interference:
            rows = [
                shape[0] if unit.action == "merge" and is_convolution(name, shape) else sides(shape)[0]
                for name in unit.names
                if len(shape := self._specs[name].shape) > 1
            ]
            held += sampled(len(self._models), min(rows)) if rows else 0.0
        written = sum(self._out_spec(name).nbytes for name in unit.names)
        made = sum(source.made.get(name, 0) for source in self._making for name in unit.names)
        return held * self.worked(unit) + made + 2 * written

    @cached_property
    def _making(self) -> list[Checkpoint]:
        return [source for source in (self._base, *self._models) if source.made]
