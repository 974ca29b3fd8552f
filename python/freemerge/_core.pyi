"""The compiled CPU kernels. Pointers come from torch tensors; callers keep them alive."""

import numpy as np
import numpy.typing as npt

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

class Mask:
    """``struct Mask`` of csrc/common/mask.h. ``table`` is the address of H x (W//2 + 1) floats, for kind 5 only."""

    def __init__(
        self,
        *,
        kind: int,
        height: int,
        width: int,
        unit_y: float = 1.0,
        unit_x: float = 1.0,
        edge0: float = 0.0,
        edge1: float = 0.0,
        gain0: float = 0.0,
        gain1: float = 0.0,
        gain2: float = 0.0,
        order: float = 1.0,
        axis: int = 1,
        table: int = 0,
    ) -> None: ...
    def gain(self, bin_y: int, bin_x: int) -> float:
        """Symmetrised gain at a stored bin, 0 <= bin_y < H, 0 <= bin_x <= W//2."""

class Decimation:
    """``struct Decimation`` of csrc/common/plan.h."""

    def __init__(self, *, cells: int, taps: int, band: int, nyquist: bool = False) -> None: ...

class Plan:
    """``struct Plan`` of csrc/common/plan.h; ``form`` is a value of ``enum class Form``."""

    def __init__(
        self,
        *,
        form: int,
        mask: Mask,
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
