"""The compiled CPU kernels. Pointers come from torch tensors; callers keep them alive."""

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
