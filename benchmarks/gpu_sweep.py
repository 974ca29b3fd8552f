"""Which tiles, windows and chunks are fastest on the GPU at hand: times of single kernels, for the planner's choices.

Run by gpu_suite.py. Every setting gives the same filter, so that its answer is checked once for each shape.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks import harness
from benchmarks.harness import Case, Row
from freemerge.backends.cuda import CudaBackend
from freemerge.planner.forms import candidates
from freemerge.planner.plan import Plan
from freemerge.planner.tiles import Tiles, blocks, column_bytes, convolution, is_uncommon, row_bytes

SHAPES = [(4096, 4096), (4096, 11008), (14336, 4096), (11008, 4096), (3072, 768), (768, 768)]
TAPS = (8, 10, 12)
CHUNK_ROWS = (0, 32, 64, 128, 256)  # 0: the backend's own choice
THREADS = ((128, 128), (192, 160), (256, 96), (384, 64))  # of blocks of rows, and of columns
CALLS = 6

KernelTimes = dict[str, float]
Clock = Callable[[Callable[[], object]], KernelTimes]


def kernel_times(work: Callable[[], object]) -> KernelTimes:
    """Microseconds of each kernel in a call, by name: the median, times how often a call launches it."""
    work()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(CALLS):
            work()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[kernel_name(event.name)].append(event.time_range.elapsed_us())
    return {
        name: sum(found) / CALLS if len(found) > CALLS else statistics.median(found) for name, found in times.items()
    }


def kernel_name(symbol: str) -> str:
    """``rows_to_spectra`` of ``void freemerge::cuda::(anonymous namespace)::rows_to_spectra_kernel<false>(...)``."""
    ours = re.search(r"(\w+?)_kernel\b", symbol)
    return ours[1] if ours is not None and "freemerge" in symbol else symbol[:80]


def tile_choices(shape: tuple[int, int], block_bytes: int) -> Iterator[Tiles]:
    """All tiles that fit: rows x columns x threads."""
    height, width = shape
    for parts in (1, 2, 4, 8):
        chirps = convolution(width), convolution(height // parts)
        if height % parts or blocks(row_bytes(chirps[0] or width, parts), block_bytes) < 1:
            continue
        for columns in (4, 8, 16):
            if blocks(column_bytes(chirps[1] or height // parts, columns), block_bytes) < 1:
                continue
            for rows_at_most, column_threads in THREADS:
                row_threads = min(rows_at_most, 192) if is_uncommon(width) else rows_at_most
                yield Tiles(parts, columns, row_threads, column_threads, *chirps)


def plans(backend: CudaBackend, case: Case, device: str, **changes: object) -> list[Plan]:
    """Every plan of a case, with some of the backend's traits changed."""
    traits = backend.traits(torch.device(device))
    assert traits is not None
    count = case.shape[0] if len(case.shape) == 3 else 1
    changed = replace(traits, **changes)  # type: ignore[arg-type]
    found = candidates(case.mask, case.shape[-2:], case.torch_dtype, device, "cuda", changed, count)
    return [plan for plan in found if backend.supports(plan) is None]


def checked(case: Case, x: torch.Tensor, run: Callable[[torch.Tensor], object]) -> float:
    y = x.clone()
    run(y)
    return float(harness.check(y, x, case.mask, 1e-6)["error"])


def sweep_tiles(backend: CudaBackend, shape: tuple[int, int], dtype: str, device: str, clock: Clock) -> Iterator[Row]:
    """The three kernels at the default cutoff, with every setting."""
    case = Case(shape, "HighPass(0.4)", dtype)
    x, traits = case.input(device), backend.traits(torch.device(device))
    plan = next((plan for plan in plans(backend, case, device) if plan.tiles is not None), None)
    if plan is None or traits is None:
        return
    for tiles in dict.fromkeys((plan.tiles, *tile_choices(shape, traits.block_bytes))):
        executable = backend.prepare(replace(plan, tiles=tiles))
        error = checked(case, x, lambda t, run=executable.run: run([t[None]], 1.0))  # type: ignore[misc]
        times = clock(lambda run=executable.run: run([x[None]], 1.0))  # type: ignore[misc]
        yield {"shape": list(shape), "dtype": dtype, "tiles": vars(tiles), "chosen": tiles == plan.tiles, "us": times,
               "error": error}  # fmt: skip


def sweep_windows(backend: CudaBackend, shape: tuple[int, int], dtype: str, device: str, clock: Clock) -> Iterator[Row]:
    """The decimated form at a low cutoff, with windows of each width and chunks of each height."""
    case = Case(shape, "HighPass(0.05)", dtype)
    x = case.input(device)
    for taps in TAPS:
        plan = next((p for p in plans(backend, case, device, taps=(taps,)) if p.form == "decimated"), None)
        if plan is None:
            continue
        for chunk_rows in CHUNK_ROWS:
            executable = backend.prepare(plan)
            executable.native.chunk_rows = chunk_rows  # type: ignore[attr-defined]
            error = checked(case, x, lambda t, run=executable.run: run([t[None]], 1.0))  # type: ignore[misc]
            times = clock(lambda run=executable.run: run([x[None]], 1.0))  # type: ignore[misc]
            yield {"shape": list(shape), "dtype": dtype, "rows": str(plan.rows), "columns": str(plan.columns),
                   "chunk_rows": chunk_rows, "us": times, "error": error}  # fmt: skip


def sweep(backend: CudaBackend, budget: float, device: str = "cuda", clock: Clock = kernel_times) -> dict[str, object]:
    """Rows of both sweeps, shape by shape, and the shapes for which the budget in seconds was too short."""
    end = time.monotonic() + budget
    rows: dict[str, list[Row]] = {"tiles": [], "windows": []}
    left_out: list[str] = []
    for shape in SHAPES:
        for dtype in ("float32", "bfloat16") if shape == SHAPES[0] else ("float32",):
            if time.monotonic() > end:
                left_out.append(f"{shape} {dtype}")
                continue
            rows["tiles"] += sweep_tiles(backend, shape, dtype, device, clock)
            rows["windows"] += sweep_windows(backend, shape, dtype, device, clock)
    return {**rows, "left_out": left_out}
