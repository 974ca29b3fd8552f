"""What the planner knows of a backend on one device: what it can do, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from .plan import Form, Plan


@dataclass(frozen=True)
class Costs:
    """Relative cost of the building blocks of a filter, in ns per element on the machine they were measured on.

    Only their ratios matter: the planner compares forms of one backend, never two backends.
    """

    move: float  #: read or write one element of the matrix
    tap: float  #: one multiply-add of a windowed FIR pass
    row_fft: float  #: one element and one factor of two of a real FFT along contiguous rows
    column_fft: float  #: one complex element and one factor of two of an FFT down columns, mask included
    coarse_fft: float  #: one element and one factor of two of the real 2-D FFT of a coarse grid
    spectrum: float = 0.0  #: keep one real number of a spectrum from the row FFTs to their inverses
    transposed: float = 1.5  #: factor of row_fft where it runs down the columns
    call: float = 0.0  #: fixed cost of a form with many small steps
    column_tap: float = 0.0  #: tap along the columns, where it differs
    start: float = 0.0  #: fixed cost of the decimated form beyond that of the others


@dataclass(frozen=True, eq=False)
class Traits:
    """What the planner must know about a backend on one device."""

    forms: frozenset[Form]
    dtypes: frozenset[torch.dtype]
    costs: Costs
    taps: tuple[int, ...] = ()  #: window widths it has kernels for
    oversamplings: tuple[float, ...] = (1.5, 1.75, 2.0, 2.5, 3.0, 4.0)  #: of coarse grids; small ones amplify rounding
    whole_columns: bool = False  #: the decimated form may leave the axis of the width as it is
    whole_rows: bool = False  #: or that of the height
    #: Windows down the height may be around Nyquist of an odd length, between two bins; what is transformed has this
    #: many times the rows of the coarse grid then. 0: they may not.
    half_bins: int = 0
    longest_sum: int = 0  #: samples from one cell to the next at most, as chains of sums lose digits; 0: any number
    cells_multiple: int = 1  #: coarse sizes are this times 2^a 3^b 5^c
    transposes: bool = False  #: has the transposed variants of pruned and full
    packs: bool = False  #: full keeps the spectrum in the matrix's own memory (fp32, fp64)
    streams: bool = False  #: full moves the matrix twice, not six times, and transforms every column of its spectrum
    fused_length: int = 0  #: full has one kernel that transforms and masks columns, up to this length
    fused_prime: int = 1  #: largest prime factor of such a length
    block_bytes: int = 0  #: shared memory of a block, for full in three kernels of its own; 0 if it has none
    own_transforms: bool = False  #: those kernels come first where a library could do it, too; for coarse grids as well
    chirp_stages: float = 3.0  #: roundings over log2 n of an FFT whose length n has a large prime factor (Bluestein)
    chirp_cost: float = 3.0  #: and what it costs down columns, over an FFT of a length near it that has none
    row_library: str = ""  #: what transforms single rows, if not what transforms matrices
    #: Forms, and dtypes, that take out a dominant mean first, which would drown a small result in rounding.
    centers: Mapping[Form, frozenset[torch.dtype]] = field(default_factory=dict)
    slow_rows: str = ""  #: why "auto" passes it over for a matrix of one row, if it does
    vary: bool = False  #: they depend on a setting of the process; plans are kept as long as it stays
    workspace: Callable[[Plan], int] | None = None  #: bytes for a plan, instead of the planner's estimate
