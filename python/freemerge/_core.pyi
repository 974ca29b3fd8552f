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
def sparse_apply(
    weights: int,
    dtype: int,
    n: int,
    indices: int,
    wide: bool,
    count: int,
    values: int,
    scale: float,
    origin: int,
    saved: int,
    threads: int,
) -> None: ...
def sparse_restore(
    weights: int, dtype: int, n: int, indices: int, wide: bool, count: int, saved: int, threads: int
) -> None: ...
def sparse_sum(
    terms: list[tuple[int, bool, int, int, float]],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]: ...
def encode_positions(indices: int, wide: bool, count: int) -> tuple[int, int, npt.NDArray[np.uint8]]: ...
def decode_positions(
    coding: int, parameter: int, bytes: int, size: int, count: int, n: int, out: int, wide: bool
) -> None: ...
