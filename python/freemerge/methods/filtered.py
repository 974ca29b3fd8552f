"""A frequency filter before or after any method. The only file of this folder that filters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from ..errors import ArgumentError
from ..responses import HighPass, Response, from_config
from .base import Keep, Measured, Merged, Method, keep_nothing
from .interference import Interference
from .parameters import NUMBER, parameter
from .rules import energy_factor
from .vectors import Deltas, Sides, TaskVectors, added
from .whole import Whole

if TYPE_CHECKING:
    from torch import Tensor

    from ..accumulate import LateSum

When = Literal["before", "after"]
WHEN: tuple[When, ...] = get_args(When)
CUTOFF_HELP = (
    "cutoff of the response, by default HighPass(0.4), as a fraction of the shorter side; a response without one "
    "becomes a high-pass"
)


def checked_response(response: object, cutoff: float | None) -> Response:
    """A response, also from plain data, with another cutoff if one is given: a high-pass if it has none to change."""
    made: object = from_config(response) if isinstance(response, dict) else response
    if not isinstance(made, Response):
        raise ArgumentError(f"response must be a frequency response, got {made!r}")
    if cutoff is None:
        return made
    has_cutoff = any(field.name == "cutoff" for field in dataclasses.fields(made))
    changes: dict[str, Any] = {"cutoff": cutoff}
    return dataclasses.replace(made, **changes) if has_cutoff else HighPass(cutoff)


@dataclass(frozen=True)
class Filter:
    """A filter of matrices ``"before"`` a method, of every task vector, or ``"after"`` it, of the merged one.

    What is filtered keeps its Frobenius norm, as with :class:`FR`, so that a method's scale suits every cutoff.
    """

    when: When
    response: Response = HighPass(0.4)
    cutoff: InitVar[float | None] = parameter(None, CUTOFF_HELP, kind=NUMBER)

    def __post_init__(self, cutoff: float | None) -> None:
        if self.when not in WHEN:
            raise ArgumentError(f"filter must be one of {', '.join(map(repr, WHEN))}, got {self.when!r}")
        object.__setattr__(self, "response", checked_response(self.response, cutoff))

    def replace(self, **changes: Any) -> Filter:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **{"cutoff": None, **changes})


def filter_members(vectors: TaskVectors, deltas: Sequence[Tensor], response: Response) -> None:
    """Filter the matrices that task vectors of the members of a unit make up, in place."""
    from ..filter import filter_

    matrices = vectors.matrices(deltas)
    filter_(matrices, response, backend=vectors.backend)
    vectors.unstack(matrices, deltas)


def filter_keeping_norm(vectors: TaskVectors, deltas: Sequence[Tensor], response: Response) -> float:
    """The same, and the Frobenius norm of all of them stays what it was; returns the factor that does it."""
    from ..accumulate import norm

    before = norm(deltas)
    filter_members(vectors, deltas, response)
    factor = energy_factor(before, norm(deltas))
    for delta in deltas:
        delta.mul_(factor)
    return factor


def filtered_sums(
    vectors: TaskVectors, weights: Sequence[float], response: Response, *, norms: bool
) -> tuple[Sequence[Tensor | LateSum], float, float]:
    """sum_i weights[i] v_i of each member, filtered, and the Frobenius norm of all of them before and after the filter,
    or 0 unless ``norms`` are wanted."""
    from ..accumulate import finished, norm

    tensors = vectors.tensors
    if len(tensors) == 1 and not vectors.parts:
        total, filtered = tensors[0].filtered_sum(weights, response, vectors.backend)
        if filtered is not None:
            return [total], *filtered
        sums = [finished(total)]
    else:
        sums = vectors.sum(weights)
    before = norm(sums) if norms else 0.0
    filter_members(vectors, sums, response)
    return sums, before, norm(sums) if norms else 0.0


@dataclass(frozen=True)
class Filtered(Method):
    """A method with a filter around it: it sees filtered task vectors, or what it merges is filtered."""

    sees_matrices: ClassVar[bool] = True

    method: Method
    filter: Filter

    @property
    def response(self) -> Response:
        return self.filter.response

    @property
    def passes(self) -> int:
        return self.method.passes

    def reads(self, as_matrices: bool) -> int:
        return self.method.reads(as_matrices)

    def holds(self, count: int, matrix: Sides | None) -> float:
        held = self.method.holds(count, matrix)
        if matrix is None:
            return held
        # What is filtered and was before, a stack, the spectrum of a single row. A filtered tensor is one piece.
        return held + (3 + self.method.holds_of_piece(count) if self.filter.when == "before" else 4)

    @property
    def by_entries(self) -> bool:
        return self.method.by_entries

    @property
    def by_inputs(self) -> bool:
        return self.method.by_inputs

    @property
    def linear(self) -> bool:
        return self.filter.when == "before" and self.method.linear

    def default_scale(self, count: int) -> float | None:
        return self.method.default_scale(count)

    def measure_scale(self, units: Whole[TaskVectors], keep: Keep = keep_nothing) -> float:
        if self.filter.when == "before":
            return self.method.measure_scale(units.through(self._seen), keep)
        return self.method.regained * super().measure_scale(units, keep)

    def in_the_mean(self) -> Method:
        return Filtered(self.method.in_the_mean(), self.filter)

    def interference_scale(self, units: Whole[TaskVectors], measured: Measured, count: int) -> float:
        if self.filter.when == "before":
            return self.method.interference_scale(units.through(self._seen), measured, count)
        return super().interference_scale(units, measured, count)

    def strength(self, least: Interference) -> float:
        return self.method.strength(least)

    def measure(self, units: Whole[TaskVectors], count: int) -> Measured:
        return self.method.measure(units.through(self._seen), count)

    def merge(self, vectors: TaskVectors, measured: Measured) -> Merged:
        merged = self.method.merge(self._seen(vectors), measured)
        if self.filter.when == "before" or not vectors.as_matrices:
            return merged
        merged = merged.complete()
        factor = filter_keeping_norm(vectors, merged.tensors, self.response)
        notes = merged.notes or [{} for _ in merged.tensors]
        return Merged(merged.tensors, [{**note, "energy_factor": factor} for note in notes])

    def _seen(self, vectors: TaskVectors) -> TaskVectors:
        """What the method is given instead of task vectors."""
        if self.filter.when == "after" or not vectors.as_matrices:
            return vectors

        def each() -> Iterator[list[Tensor]]:
            for deltas in vectors.each():
                filter_keeping_norm(vectors, deltas, self.response)
                yield deltas

        members = tuple(
            _FilteredDeltas(**vars(tensor), filtered=each, member=i) for i, tensor in enumerate(vectors.tensors)
        )
        return _FilteredVectors(members, vectors.as_matrices, vectors.parts, vectors.backend, filtered=each)


@dataclass(frozen=True)
class _FilteredVectors(TaskVectors):
    """Task vectors that are filtered while they are read."""

    filtered: Callable[[], Iterator[list[Tensor]]] = dataclasses.field(kw_only=True)

    def each(self) -> Iterator[list[Tensor]]:
        return self.filtered()

    def sum(self, weights: Sequence[float]) -> list[Tensor]:
        return _summed(self.filtered(), weights)


@dataclass(frozen=True)
class _FilteredDeltas(Deltas):
    """Those of one member. Each call reads the whole unit, whose matrices its members may only make up together."""

    filtered: Callable[[], Iterator[list[Tensor]]] = dataclasses.field(kw_only=True)
    member: int = dataclasses.field(kw_only=True)

    def each(self) -> Iterator[Tensor]:
        return (deltas[self.member] for deltas in self.filtered())

    def pieces(self, at_once: int = 1) -> Iterator[Deltas]:
        yield self

    def pairs(self) -> Iterator[tuple[Tensor, None]]:
        return ((delta, None) for delta in self.each())

    def sum(self, weights: Sequence[float]) -> Tensor:
        return _summed(self.filtered(), weights)[self.member]

    def filtered_sum(self, weights: Sequence[float], response: Response, backend: str) -> tuple[Tensor, None]:
        return self.sum(weights), None

    def means(self) -> list[float]:
        from ..accumulate import abs_means

        return [abs_means(delta.new_zeros(()).expand_as(delta), [delta])[0] for delta in self.each()]


def _summed(each: Iterator[list[Tensor]], weights: Sequence[float]) -> list[Tensor]:
    """sum_i weights[i] v_i of each member."""
    return added([delta.mul_(weight) for delta in deltas] for deltas, weight in zip(each, weights, strict=True))
