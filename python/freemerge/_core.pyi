"""The compiled CPU kernels. Pointers come from torch tensors; callers keep them alive."""

import numpy as np
import numpy.typing as npt

from .responses import MaskParams

def active_isa() -> str: ...
def detected_isa() -> str: ...
def accumulate(
    out: int,
    base: int,
    base_dtype: int,
    models: list[int],
    model_dtypes: list[int],
    weights: list[float],
    n: int,
    threads: int,
) -> list[float]: ...
def add_round(
    out: int,
    out_dtype: int,
    base: int,
    base_dtype: int,
    delta: int,
    delta_dtype: int,
    scale: float,
    n: int,
    threads: int,
) -> None: ...
def prefer_huge_pages(data: int, bytes: int) -> None: ...
def square_sum(data: int, dtype: int, n: int, threads: int) -> float: ...

MAGNITUDE_BINS: int

def select_largest(
    model: int, model_dtype: int, base: int, base_dtype: int, rows: int, width: int, k: int, threads: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]: ...
def count_magnitudes(
    model: int, model_dtype: int, base: int, base_dtype: int, n: int, bins: int, threads: int
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

def mask_gains(mask: MaskParams) -> npt.NDArray[np.float64]:
    """Symmetrised gains on the half spectrum in stored order, H x (W//2 + 1), of any kind but "table"."""

class Decimation:
    """``struct Decimation`` of csrc/common/plan.h."""

    def __init__(self, *, cells: int, taps: int, band: int, nyquist: bool = False) -> None: ...

class Plan:
    """``struct Plan`` of csrc/common/plan.h; ``form`` is a value of ``enum class Form``.

    ``table`` is the address of H x (W//2 + 1) floats, for masks of kind "table" only.
    """

    def __init__(
        self,
        *,
        form: int,
        mask: MaskParams,
        table: int = 0,
        transposed: bool = False,
        packed: bool = False,
        background: float = 0.0,
        rows: Decimation = ...,
        columns: Decimation = ...,
    ) -> None: ...

def filter(
    pointers: list[int],
    dtype: int,
    plan: Plan,
    row_stride: int,
    scale: float,
    threads: int,
    isa: str | None = None,
) -> None:
    """Filter matrices of the plan's shape in place; ``row_stride`` in elements.

    Raises ValueError, before anything is written, for an argument the plan's form cannot take.
    """
