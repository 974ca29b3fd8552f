"""The compiled CPU kernels. Pointers come from torch tensors; callers keep them alive."""

from typing import Literal

import numpy as np
import numpy.typing as npt

from .planner.plan import Decimation
from .responses import MaskParams

DTYPES: dict[str, int]  #: ``enum class DType`` of csrc/common/dtype.h

def active_isa() -> str: ...
def detected_isa() -> str: ...
def prefer_huge_pages(data: int, bytes: int) -> None: ...
def has_sha256() -> bool: ...
def sha256(states: list[int], data: list[int], blocks: int) -> None: ...
def accumulate(
    out: int,
    base: int,
    base_dtype: int,
    models: list[int],
    model_dtypes: list[int],
    weights: list[float],
    squares: bool,
    n: int,
    threads: int,
) -> tuple[list[float], float]: ...
def add_round(
    out: int,
    out_dtype: int,
    base: int,
    base_dtype: int,
    delta: int,
    delta_dtype: int,
    scale: float,
    factor: float,
    n: int,
    threads: int,
) -> bool: ...
def elect(
    sums: tuple[int, int],
    shares: tuple[int, int],
    delta: int,
    dtype: int,
    weight: float,
    least: float,
    outlier: float,
    n: int,
    threads: int,
) -> None: ...
def decide(sums: tuple[int, int], shares: tuple[int, int], dtype: int, n: int, threads: int) -> None: ...
def square_sum(data: int, dtype: int, n: int, threads: int) -> float: ...

LEADING_BITS: int

def select_largest(
    model: int, model_dtype: int, base: int, base_dtype: int, rows: int, width: int, k: int, threads: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]: ...
def count_magnitudes(
    model: int,
    model_dtype: int,
    base: int,
    base_dtype: int,
    n: int,
    shift: int,
    bits: int,
    above: int,
    counts: int,
    threads: int,
) -> None: ...
def select_from_bin(
    model: int, model_dtype: int, base: int, base_dtype: int, n: int, lowest: int, threads: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]: ...

# weights, dtype, n; indices, wide, count; values, scale, origin
_SparseUpdate = tuple[int, int, int, int, bool, int, int, float, int]

class SparseSwitch:
    def __init__(self, updates: list[_SparseUpdate]) -> None: ...
    @property
    def saved_bytes(self) -> int: ...
    def apply(self, saved: int, threads: int) -> None: ...
    def restore(self, saved: int, threads: int) -> None: ...

def sparse_sum(
    terms: list[tuple[int, bool, int, int, float]],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]: ...
def encode_positions(indices: int, wide: bool, count: int) -> tuple[int, int, npt.NDArray[np.uint8]]: ...
def decode_positions(
    coding: int, parameter: int, bytes: int, size: int, count: int, n: int, out: int, wide: bool
) -> None: ...

MASK_KINDS: dict[str, int]  #: ``enum class MaskKind`` of csrc/common/mask.h
FORMS: dict[Literal["decimated", "pruned", "full"], int]  #: ``enum class Form`` of csrc/common/plan.h
TAPS: tuple[int, ...]  #: of the decimated form's windows
ROW_CELLS_MULTIPLE: int  #: of its cells along the height
MAX_LANES: int  #: floats in the widest vector

def has_transform(n: int) -> bool:
    """Whether there are transforms of n samples: up to 2**31 - 1, and so the convolution that large primes take."""

def is_read_only(capsule: object) -> bool:
    """Whether a DLPack capsule, of version 1.0 or later, says that its memory is not to be written."""

def mask_gains(mask: MaskParams) -> npt.NDArray[np.float64]:
    """Symmetrised gains on the half spectrum in stored order, H x (W//2 + 1), of any kind but "table"."""

class Filter:
    """A prepared filter of matrices of one shape and dtype; several threads may run it at the same time.

    ``table`` is the address of the H x (W//2 + 1) floats of a mask of kind "table", which are copied. ``column_gains``
    (pruned and full forms) has the gain of each column of the half spectrum whose gain does not vary, NaN for the
    others; if ``transposed``, those of the transposed mask.

    Raises ValueError for what the form cannot do.
    """

    def __init__(
        self,
        *,
        form: str,
        mask: MaskParams,
        table: int = 0,
        dtype: int,
        transposed: bool = False,
        packed: bool = False,
        background: float = 0.0,
        rows: Decimation | None = None,
        columns: Decimation | None = None,
        column_gains: npt.NDArray[np.floating] | None = None,
        isa: str | None = None,
    ) -> None: ...
    @property
    def nbytes(self) -> int:
        """Memory of the tables that it keeps."""

    def run(
        self, pointers: list[int], row_strides: list[int], scale: float, threads: int, means: list[float] = ...
    ) -> None:
        """Filter matrices in place and multiply them by ``scale``; ``row_strides`` in elements. ``means`` (decimated
        form of float32), one for each matrix if any, are taken out on the way, and their share is added to the result.

        Raises ValueError for an invalid argument, and MemoryError, before anything is written.
        """
