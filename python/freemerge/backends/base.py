"""The protocol of a backend: one implementation of every operation, on the devices that it knows.

A backend is one module of this folder with a subclass of :class:`Backend`; the registry finds it. It executes plans or
refuses them; it makes no decision about a filter.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..cache import TABLE_BYTES, Cache, Entry
from ..errors import BackendError
from ..planner.costs import Traits
from ..planner.plan import Plan
from ..responses import holds_array
from .memory import multiply_
from .sparse import BackendSwitch, Update

_LEAST_BYTES = 1 << 16  # that an executable counts for in the cache

Entries = tuple[torch.Tensor, torch.Tensor]
"""Flat indices (int64, ascending) and values (float32) of some entries, on the CPU."""

Check = Callable[[Sequence[float]], None]
"""Raises an error if one of the mean magnitudes of task vectors is not finite."""


def unchecked(means: Sequence[float]) -> None:
    """A :data:`Check` that takes everything."""


@dataclass(frozen=True)
class BackendInfo:
    """What :func:`freemerge.backends` tells about a backend; ``reason`` says why it cannot run, or is empty."""

    name: str
    available: bool
    reason: str = ""
    details: dict[str, str] = field(default_factory=dict)


class Executable(ABC):
    """A plan with everything it needs to run: tables, native objects. It may run in several threads at once."""

    nbytes: int = 0  #: memory that it keeps

    @abstractmethod
    def run(self, batches: Sequence[torch.Tensor], scale: float) -> None:
        """Filter each matrix of each batch, [H, W] or [B, H, W], in place and multiply it by ``scale``.

        All matrices have shape ``plan.matrix``, dtype ``plan.dtype``, are on ``plan.device``, share no memory, and
        have unit column stride (``stride(-1) == 1``); the row stride is any number >= W, and so is the batch's.
        Arithmetic is at least fp32. Results must not depend on the number of threads.
        """


class LateSum(ABC):
    """A filtered sum of task vectors whose last pass is yet to run: with a base, or for whoever wants the sum itself.

    Both may be asked for, in any order; they run where the other operations on its device would.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._finished = False

    @property
    def shape(self) -> torch.Size:
        """That of the sum."""
        return self._memory.shape

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._memory.device

    @property
    def tensor(self) -> torch.Tensor:
        """The sum, whose last pass has run then."""
        self.finish()
        return self._memory

    def finish(self) -> None:
        """Run the last pass, if it hasn't."""
        if not self._finished:
            self._finish()
            self._finished = True

    def add_round(self, out: torch.Tensor, base: torch.Tensor, scale: float, factor: float) -> bool:
        """:meth:`Backend.add_round` of the sum, in its last pass; or False, and nothing is written, if that has run or
        cannot do it. ``out`` and ``base`` are contiguous, of its shape, and on its device."""
        return not self._finished and self._add_round(out, base, scale, factor)

    @abstractmethod
    def _finish(self) -> None: ...

    @abstractmethod
    def _add_round(self, out: torch.Tensor, base: torch.Tensor, scale: float, factor: float) -> bool: ...


class Multiplication(Executable):
    """A plan whose gain is one constant."""

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def run(self, batches: Sequence[torch.Tensor], scale: float) -> None:
        multiply_(batches, scale * self._factor)


class Backend(ABC):
    """Operations on the tensors of one kind of device. Arguments are checked before they get here."""

    name: ClassVar[str]
    preference: ClassVar[int]  #: "auto" asks backends in ascending order

    @abstractmethod
    def info(self) -> BackendInfo:
        """Whether it can run on this machine at all; cheap, and the answer does not change in a process."""

    def require(self) -> None:
        """Raise :class:`BackendError`, which says why, if it cannot run on this machine."""
        info = self.info()
        if not info.available:
            raise BackendError(f"backend {self.name} is not available: {info.reason}")

    def device(self, stored: torch.device) -> torch.device:
        """The device on which it works on a tensor that is stored on another."""
        return stored

    @abstractmethod
    def takes(self, tensors: Sequence[torch.Tensor]) -> str | None:
        """None if its operations on vectors can run on these tensors, else the reason, as for :meth:`supports`."""

    # Filter: prepare a plan, then run it.

    @abstractmethod
    def traits(self, device: torch.device) -> Traits | None:
        """Its capabilities on a device, or None if it cannot use that kind of device.

        The same object as long as they are the same: plans are kept by it.
        """

    def refusal(self, device: torch.device) -> str:
        """Why there are no :meth:`traits` of a device, as the rest of a sentence after the backend's name."""
        return f"does not run on device {device}"

    @abstractmethod
    def supports(self, plan: Plan) -> str | None:
        """None if it can execute the plan, else the reason, as the rest of a sentence after its name."""

    @abstractmethod
    def prepare(self, plan: Plan) -> Executable:
        """Make the tables and native objects of a plan that it supports and whose gain is not one constant."""

    def executable(self, plan: Plan) -> Executable:
        """What runs a plan; prepared once for all calls, while it is among the latest :data:`TABLE_BYTES`."""
        return self.entry(plan)[1]

    def entry(self, plan: Plan) -> tuple[Entry[Executable], Executable]:
        """The same with its entry in the cache, by which later calls reach it without a look-up."""
        return _EXECUTABLES.entry((self, plan), lambda: self._make(plan))

    def _make(self, plan: Plan) -> Executable:
        return Multiplication(plan.background) if plan.form in ("identity", "scale") else self.prepare(plan)

    # Accumulate: base, models, delta and out are contiguous, of one shape, and on one device.

    @abstractmethod
    def weighted_sum(
        self,
        base: torch.Tensor,
        models: Sequence[torch.Tensor],
        weights: Sequence[float] | None,
        out: torch.Tensor | None,
    ) -> list[float]:
        """Write ``sum_i weights[i] * (models[i] - base)`` to ``out`` and return ``[mean |models[i] - base|]``.

        Without weights nothing is written and ``out`` is None. Arithmetic is that of ``out``: float64 if any input is,
        else float32.
        """

    def part_means(self, base: torch.Tensor, models: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[list[float]]:
        """``[mean |models[i] - base|]`` of each of several vectors that lie end to end, as :meth:`weighted_sum`."""
        parts = zip(*(torch.split(tensor, list(sizes)) for tensor in (base, *models)), strict=True)
        return [self.weighted_sum(first, others, None, None) for first, *others in parts]

    @abstractmethod
    def square_sum(self, tensor: torch.Tensor) -> float:
        """The sum of squares of a contiguous tensor, in float64; the same for any number of threads."""

    def filtered_sum(
        self,
        plan: Plan,
        base: torch.Tensor,
        models: Sequence[torch.Tensor],
        weights: Sequence[float],
        out: torch.Tensor,
        check: Check = unchecked,
    ) -> tuple[list[float], float, float, torch.Tensor | LateSum] | None:
        """:meth:`weighted_sum` filtered by ``plan``, the same bytes as by one after the other, in fewer passes.

        Returns the means, the sums of squares before and after the filter, and the sum: ``out``, or what will be there
        when its last pass has run, if that may wait for a base; the squares after the filter are then known to about
        1e-6. Or None, and nothing is written, if one after the other is the best it can do. ``check`` is called with
        the means as soon as they are known. ``out`` is float32 or float64, as :meth:`weighted_sum` says.
        """
        return None

    @abstractmethod
    def add_round(
        self, out: torch.Tensor, base: torch.Tensor, delta: torch.Tensor, scale: float, factor: float
    ) -> bool | None:
        """``out = round(base + scale * (factor * delta))``, products and sum rounded one after the other.

        Arithmetic is float64 if base or delta is float64, else float32. Returns whether all of ``out`` is finite, or
        None where that would take another pass.
        """

    @abstractmethod
    def elect(
        self,
        delta: torch.Tensor,
        weight: float,
        least: float,
        outlier: float,
        sums: Sequence[torch.Tensor],
        shares: Sequence[torch.Tensor],
    ) -> None:
        """Add ``weight * delta``, where |delta| in float32 is at least ``least`` and, unless that is infinite, less
        than ``outlier``, to the first of two ``sums`` where it is positive, to the second where it is negative, and
        |weight| to that of ``shares``, which may be empty.

        All are contiguous, of one shape and float32 or float64; both sums may be one. The product is rounded before it
        is added.
        """

    @abstractmethod
    def decide(self, sums: Sequence[torch.Tensor], shares: Sequence[torch.Tensor]) -> None:
        """End an election: overwrite the first of ``sums`` with the one whose sign the sum of both has, over its share
        if there are any, and with 0 where that is 0. The other tensors may be overwritten, too."""

    # Select: entries of v = model - base, in float32; both are contiguous, of one shape, and on one device.

    @abstractmethod
    def select_largest(self, model: torch.Tensor, base: torch.Tensor, rows: int, width: int, k: int) -> Entries:
        """The k entries of largest |v| of each row; equal ones by index, lowest first; zeros never, NaN before all."""

    @abstractmethod
    def count_magnitudes(
        self, model: torch.Tensor, base: torch.Tensor | None, counts: torch.Tensor, shift: int, above: int
    ) -> None:
        """Add to ``counts`` [2 ** bits], int64 on the CPU, how many entries have each value of ``bits`` of the 31 bits
        of |v|: those before the last ``shift``. All bits before them must be ``above``. Without a base v is ``model``.
        """

    @abstractmethod
    def select_from_bin(self, model: torch.Tensor, base: torch.Tensor, lowest: int) -> Entries:
        """All entries of the bin ``lowest`` of :data:`_core.LEADING_BITS` bits and above, zeros excepted."""

    # Switch

    @abstractmethod
    def switch(self, updates: Sequence[Update]) -> BackendSwitch:
        """Prepare updates, each of at least one entry, of tensors on one device."""


def _weigh(key: tuple[Backend, Plan], executable: Executable) -> int:
    _, plan = key
    mask = 8 * math.prod(plan.matrix) if holds_array(plan.response) else 0
    return _LEAST_BYTES + executable.nbytes + mask


_EXECUTABLES: Cache[tuple[Backend, Plan], Executable] = Cache(TABLE_BYTES, _weigh)
