"""A whole model, unit by unit, as a method measures it: as often as it likes, and alone or together with others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Seen = TypeVar("Seen")
Result = TypeVar("Result")


class Whole(Iterable[T], Generic[T]):
    """The units of a model, in order. Every iteration, :meth:`map` and :meth:`total` reads each of them once.

    Where several processes merge together, each of them iterates over all units, but :meth:`map` and :meth:`total`
    share the work out, and give every process the same.
    """

    def __init__(self, iterate: Callable[[], Iterable[T]]) -> None:
        self._iterate = iterate

    def __iter__(self) -> Iterator[T]:
        return iter(self._iterate())

    def map(self, function: Callable[[T], Result]) -> list[Result]:
        """The function of each unit, in order; little data that can be pickled, as it is sent to other processes."""
        return [function(unit) for unit in self]

    def total(self, add: Callable[[T, Tensor], None], zeros: Tensor) -> Tensor:
        """``zeros`` after each unit was added to them: integers, whose sum is the same in any order."""
        for unit in self:
            add(unit, zeros)
        return zeros

    def through(self, function: Callable[[T], Seen]) -> Whole[Seen]:
        """The same model as seen through a function of its units."""
        return _Through(function, self)


class _Through(Whole[Seen], Generic[T, Seen]):
    def __init__(self, function: Callable[[T], Seen], whole: Whole[T]) -> None:
        super().__init__(lambda: map(function, whole))
        self._function, self._whole = function, whole

    def map(self, function: Callable[[Seen], Result]) -> list[Result]:
        return self._whole.map(lambda unit: function(self._function(unit)))

    def total(self, add: Callable[[Seen, Tensor], None], zeros: Tensor) -> Tensor:
        return self._whole.total(lambda unit, sums: add(self._function(unit), sums), zeros)
