"""What a backend must offer to plug into the planner. Backends execute a Plan or refuse it; they decide nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .plan import Form, Plan


@dataclass(frozen=True)
class Costs:
    """Relative cost of the building blocks of a filter, in ns per element on the machine they were measured on.

    Only their ratios matter: the planner compares forms of one backend, never two backends.
    """

    move: float  #: read or write one element of the matrix
    tap: float  #: one multiply-add of a windowed FIR pass
    dense: float  #: one multiply-add of a dense matrix product
    row_fft: float  #: one element and one factor of two of a real FFT along contiguous rows
    column_fft: float  #: one complex element and one factor of two of an FFT down columns, mask included
    coarse_fft: float  #: one element and one factor of two of the real 2-D FFT of a coarse grid
    spectrum: float = 0.0  #: keep one real number of a spectrum from the row FFTs to their inverses
    transposed: float = 1.5  #: factor of row_fft where it runs down the columns
    call: float = 0.0  #: fixed cost of a form with many small steps
    column_tap: float = 0.0  #: tap along the columns, where it differs
    start: float = 0.0  #: fixed cost of the decimated form beyond that of the others


@dataclass(frozen=True)
class Traits:
    """What the planner must know about a backend on one device."""

    forms: frozenset[Form]
    dtypes: frozenset[torch.dtype]
    costs: Costs
    taps: tuple[int, ...]  #: window widths it has kernels for
    dense: bool = False  #: an axis of the decimated form may have dense windows, or be left as it is
    whole_columns: bool = False  #: the decimated form may leave the axis of the width as it is
    longest_sum: int = 0  #: samples of a cell that the rows axis may sum where the width is whole; 0: any number
    cells_multiple: int = 1  #: coarse sizes are this times 2^a 3^b 5^c
    extra_taps: int = 0  #: taps of work beyond the window's own (a blocked product works on blocks of cells)
    transposes: bool = False  #: has the transposed variants of pruned and full
    packs: int | None = None  #: full keeps a spectrum of more bytes in the matrix's own memory (fp32, fp64)
    streams: bool = False  #: full moves the matrix twice, not six times, and transforms every column of its spectrum
    centers: bool = False  #: takes out a dominant mean by itself, without waiting for the device
    slow_rows: str = ""  #: why "auto" passes it over for a matrix of one row, if it does
    workspace: Callable[[Plan], int] | None = None  #: bytes for a plan, instead of the planner's estimate


@dataclass(frozen=True)
class BackendInfo:
    """What :func:`freemerge.backends` tells about a backend; ``reason`` says why it cannot run, or is empty."""

    name: str
    available: bool
    reason: str = ""
    details: dict[str, str] = field(default_factory=dict)


class Backend(Protocol):
    """One implementation of the forms of a Plan."""

    @property
    def name(self) -> str: ...

    def info(self) -> BackendInfo:
        """Whether it can run on this machine at all; cheap, and the answer does not change in a process."""
        ...

    def traits(self, device: torch.device) -> Traits | None:
        """Its capabilities on a device, or None if it cannot use that kind of device."""
        ...

    def supports(self, plan: Plan) -> str | None:
        """None if :meth:`run` can execute the plan, else the reason, as the rest of a sentence after its name."""
        ...

    def run(self, plan: Plan, batches: Sequence[torch.Tensor], scale: float) -> None:
        """Filter each matrix of each batch, [H, W] or [B, H, W], in place and multiply it by ``scale``.

        All matrices have shape ``plan.matrix``, dtype ``plan.dtype``, are on ``plan.device``, share no memory, and
        have unit column stride (``stride(-1) == 1``); the row stride is any number >= W, and so is the batch's.
        Arithmetic is at least fp32. Results must not depend on the number of threads.
        """
        ...


def matrices(batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Each matrix of the batches."""
    for x in batches:
        if x.ndim == 2:
            yield x
        else:
            yield from x.unbind(0)


def addresses(batches: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
    """Where each matrix of the batches starts, and its row stride in elements."""
    pointers: list[int] = []
    strides: list[int] = []
    for x in batches:
        (height, width), first = x.shape[-2:], x.data_ptr()
        stride = x.stride(-2) if height > 1 else width
        if x.ndim == 2:
            pointers.append(first)
            strides.append(stride)
        else:
            count, step = x.shape[0], x.stride(0) * x.element_size()
            pointers.extend(first + i * step for i in range(count))
            strides.extend([stride] * count)
    return pointers, strides


def multiply_(batches: Sequence[torch.Tensor], factor: float) -> None:
    """The filter whose gain is one constant; a gain of 0 clears even what is not finite."""
    if factor != 1.0:
        for x in batches:
            x.mul_(factor) if factor else x.zero_()
