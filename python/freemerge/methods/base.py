"""What a merging method is: validated parameters, and a function from task vectors to merged task vectors."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..responses import Response
from .interference import Interference, interference_terms, least_interference
from .rules import Weights, inner_product, projection_scale, weights_by_rule
from .vectors import Sides, TaskVectors, watched
from .whole import Whole

if TYPE_CHECKING:
    from torch import Tensor

    from ..accumulate import LateSum

METHODS: dict[str, type[Method]] = {}
"""All methods by name. Defining a subclass of :class:`Method` adds it."""


@dataclass(frozen=True)
class Measured:
    """What a method found out about the whole model before any unit is merged.

    ``weights`` holds lambda_i of each model; it is empty where every tensor has its own, or the method has none.
    ``scale`` is the global scale, which the caller fills in. A method that needs more returns a subclass.
    """

    weights: tuple[float, ...] = ()
    scale: float = 1.0


@dataclass(frozen=True)
class Merged:
    """The merged task vector of each member of a unit, and for each what the manifest should say about it.

    The task vectors are ``factor`` times ``addends``, in float32 or float64: who adds them to a base multiplies on the
    way, and runs what passes of theirs are yet to run, others ask for :meth:`complete`.
    """

    addends: Sequence[Tensor | LateSum]
    notes: list[dict[str, object]] = dataclasses.field(default_factory=list)
    factor: float = 1.0

    @property
    def tensors(self) -> list[Tensor]:
        """The ``addends``, whose passes have all run then."""
        from ..accumulate import finished

        return list(map(finished, self.addends))

    def complete(self) -> Merged:
        """The same with a factor of 1: ``tensors`` are multiplied in place."""
        tensors = self.tensors if self.factor == 1.0 else [tensor.mul_(self.factor) for tensor in self.tensors]
        return dataclasses.replace(self, addends=tensors, factor=1.0)


Keep = Callable[[TaskVectors, Merged], None]  # told what a unit was merged to


def keep_nothing(vectors: TaskVectors, merged: Merged) -> None:
    """The :data:`Keep` of those who merge once."""


@dataclass(frozen=True)
class Method(ABC):
    """Base class of merging methods: frozen dataclasses whose fields are their parameters.

    To add one, write one file into this folder: a subclass with a ``name`` and :meth:`merge`. Its parameters are fields
    made by :func:`freemerge.methods.parameters.parameter`, each with a default; they are checked here, are fields of
    recipes and options of the command line. A method works on the tensors that :class:`TaskVectors` gives, on any
    device. It knows no files, keeps nothing between units, and gives the same result whatever the order of the units.

    The result is ``theta_0 + scale * merged``. The caller adds, rounds, and checks that it is finite.
    """

    name: ClassVar[str]
    title: ClassVar[str]  #: as papers write it
    paper: ClassVar[str | None] = None  #: arXiv number
    sees_matrices: ClassVar[bool] = True  #: False: the method is the same for matrices and other tensors
    regained: ClassVar[float] = 1.0  #: how much of the task vectors a scale that is a projection gives back
    strengthened: ClassVar[float] = 1.0  #: what :meth:`strength` is a multiple of
    fewest: ClassVar[int] = 1  #: models that it takes

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__ and METHODS.setdefault(cls.name, cls) is not cls:
            raise TypeError(f"there are two methods called {cls.name!r}")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if "parameter" in field.metadata:
                checked = field.metadata["parameter"].check(field.name, getattr(self, field.name))
                object.__setattr__(self, field.name, checked)

    @property
    def weights(self) -> Weights | None:
        """The rule for lambda_i, or K numbers: a field, made by :func:`weights_parameter`, of methods that have any."""
        return None

    @property
    def response(self) -> Response | None:
        """The frequency response that filters matrices, for :func:`freemerge.inspect`, if there is one."""
        return None

    @property
    def passes(self) -> int:
        """How often :meth:`measure` reads the whole model."""
        return 0

    def reads(self, as_matrices: bool) -> int:
        """How often :meth:`merge` reads a unit (see :attr:`TaskVectors.as_matrices`)."""
        return 1

    @abstractmethod
    def holds(self, count: int, matrix: Sides | None) -> float:
        """The most that is allocated at a time for a unit of ``count`` models, as multiples of the unit.

        A unit counts as its entries in the dtype of the arithmetic; what reading base and models takes comes on top,
        and up to 32 MB that do not grow with the unit. Merging and measuring need no more.

        ``matrix``: rows and columns of the largest matrix that the unit is seen as; None where it is merged entry by
        entry.
        """

    def holds_of_piece(self, count: int) -> int:
        """What a method that goes by pieces of a tensor (:meth:`Deltas.pieces`) holds, as multiples of a piece."""
        return 5

    @property
    def by_entries(self) -> bool:
        """Whether a merged entry of what is not treated as a matrix depends on that entry of the models alone, and on
        what was measured, so that :meth:`merge` and :meth:`measure` may be given several small tensors end to end, as
        one vector (:attr:`TaskVectors.sizes`)."""
        return False

    @property
    def by_inputs(self) -> bool:
        """Whether the inputs of a linear layer are not the same to it as the outputs, so that it has to know which way
        a matrix is stored, for which transformers may be asked: it then goes by :meth:`TaskVectors.linear_maps`."""
        return False

    @property
    def linear(self) -> bool:
        """Whether what is merged is ``sum_i weights[i] X_i`` with ``weights`` as measured, X_i depending on none."""
        return False

    @property
    def linear_hint(self) -> str:
        """What would make it :attr:`linear`; empty where that is not up to one parameter."""
        return ""

    @property
    def left_out(self) -> str:
        """By which parameters nothing of the task vectors is kept, in words; empty where something is."""
        return ""

    def default_scale(self, count: int) -> float | None:
        """The scale that a recipe's "auto" stands for, with ``count`` models; None if the weights have to tell."""
        return 1.0

    def measure_scale(self, units: Whole[TaskVectors], keep: Keep = keep_nothing) -> float:
        """The scale where :meth:`default_scale` is None, from one look at ``units`` with the reads of a merge.

        It is asked for only if the recipe's scale is "auto". The merged task vector then projects on the sum of the
        task vectors as they do themselves (:func:`freemerge.methods.rules.projection_scale`), times :attr:`regained`.
        ``keep`` gets what :meth:`merge` will make of each unit, which must not depend on what is measured.
        """

        def measured(vectors: TaskVectors) -> tuple[list[float], list[float]]:
            seen = watched(vectors)
            merged = self.merge(seen, Measured()).complete()
            seen.read()
            keep(vectors, merged)
            return seen.squares, list(map(inner_product, seen.sums, merged.tensors))

        found = units.map(measured)
        squares = [square for unit, _ in found for square in unit]
        return self.regained * projection_scale(squares, [overlap for _, unit in found for overlap in unit])

    def in_the_mean(self) -> Method:
        """The method that merges what this one does in the mean over its random numbers, if it draws any."""
        return self

    def interference_scale(self, units: Whole[TaskVectors], measured: Measured, count: int) -> float:
        """The scale of a recipe's "interference", from one look at ``units`` with the reads of a merge and one more.

        At it, what is merged in the mean interferes least with the tasks (:mod:`freemerge.methods.interference`); times
        :meth:`strength`. 1 where there is no matrix, or what is merged has nothing in common with the task vectors.
        """
        mean = self.in_the_mean()
        found = units.map(lambda unit: interference_terms(unit, lambda: mean.merge(unit, measured).complete().tensors))
        least = least_interference((terms for unit in found for terms in unit), count)
        return 1.0 if least is None else self.strength(least) * least.scale

    def strength(self, least: Interference) -> float:
        """By how much more than the scale of least interference helps, as measured (docs/methods.md)."""
        return self.strengthened if self.sees_matrices else self.strengthened * least.emphasis

    def measure(self, units: Whole[TaskVectors], count: int) -> Measured:
        """What merging needs to know about the whole model. Every look at ``units`` reads all tensors."""
        return Measured(weights_by_rule(self.weights, count) if self.weights is not None else ())

    @abstractmethod
    def merge(self, vectors: TaskVectors, measured: Measured) -> Merged:
        """Merge one unit."""

    def replace(self, **changes: Any) -> Method:
        """A copy with some parameters changed, validated again."""
        return dataclasses.replace(self, **changes)
