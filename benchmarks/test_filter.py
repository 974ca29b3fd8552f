"""Speed and memory of the filter beside torch.fft, on one thread. Each answer is checked before it is timed.

    pytest benchmarks/test_filter.py --benchmark-enable --report benchmarks/results/filter.json

Rows measured again (with ``-k``) replace those of an existing report. Before every timed round the baseline,
``irfft2(rfft2(x) * mask)`` with a ready-made mask, runs once, so that both see the same machine; times are the least
process CPU time. Without --benchmark-enable the answers of the smaller shapes are checked and nothing is timed.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import freemerge as fm
from freemerge.backends.registry import BACKENDS
from freemerge.responses import Response
from peak_memory import peak_growth

VIT = [(768, 768), (2304, 768), (3072, 768), (768, 3072)]
LLAMA = [(1024, 4096), (4096, 4096)]
LARGE = [(4096, 11008), (14336, 4096), (5120, 13824), (50257, 768), (50265, 768), (32000, 4096), (151936, 896)]
SMALL = [(64, 64), (197, 64), (768,), (4096,), (12, 64, 64)]
CUTOFFS = [0.01, 0.05, 0.1, 0.2, 0.4]

CASES: list[tuple[tuple[int, ...], torch.dtype, Response]] = [
    *((shape, torch.float32, fm.HighPass(c)) for shape in [*SMALL, *VIT, *LLAMA, (1009, 1013)] for c in CUTOFFS),
    *((shape, torch.float32, fm.Official(0.7)) for shape in [*VIT, *LLAMA, (50265, 768)]),
    *((shape, torch.float32, fm.HighPass(c)) for shape in LARGE for c in (0.05, 0.4)),
    ((128256, 4096), torch.float32, fm.HighPass(0.05)),
    *(((4096, 4096), dtype, fm.HighPass(c)) for dtype in (torch.bfloat16, torch.float64) for c in (0.05, 0.4)),
]
TOLERANCE = {torch.float32: 5e-7, torch.float64: 1e-12, torch.bfloat16: 2e-3}
CHECKED_ALWAYS = 1 << 20  # elements
HUGE = 1 << 28  # elements whose float64 spectrum would not fit beside the rest


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    yield rows
    path = request.config.getoption("--report")
    if rows and path:
        old = json.loads(Path(path).read_text(encoding="utf-8"))["rows"] if Path(path).exists() else []
        table = {row_key(row): row for row in (*old, *rows)}
        text = json.dumps({"machine": machine(), "rows": list(table.values())}, indent=1)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n", encoding="utf-8")


def row_key(row: dict[str, Any]) -> tuple[object, ...]:
    return (*row["shape"], row["dtype"], row["response"], row["backend"])


@cache
def commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return {
        "processor": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backends": {name: info.details for name, info in fm.backends().items() if info.available},
        "threads": 1,
    }


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.benchmark(timer=time.process_time, warmup=False)
@pytest.mark.parametrize("backend", [b.name for b in BACKENDS if b.info().available and b.name != "cuda"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{'x'.join(map(str, case[0]))}-{str(case[1])[6:]}-{case[2]}")
@pytest.mark.usefixtures("one_thread")
def test_filter(
    case: tuple[tuple[int, ...], torch.dtype, Response],
    backend: str,
    benchmark: BenchmarkFixture,
    report: list[dict[str, Any]],
) -> None:
    shape, dtype, response = case
    size = math.prod(shape)
    if benchmark.disabled and size > CHECKED_ALWAYS:
        pytest.skip("large shapes are checked where they are timed")
    original = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = original.clone()
    used = peak_growth(lambda: fm.filter_(x, response, backend=backend))
    error = relative_error(x, original, response)
    assert error <= TOLERANCE[dtype]

    baseline = torch_fft(original, response)
    baseline_times: list[float] = []

    def time_baseline() -> None:
        start = time.process_time()
        baseline()
        baseline_times.append(time.process_time() - start)

    rounds = max(3, min(40, 40_000_000 // size))
    benchmark.pedantic(fm.filter_, args=(x, response), kwargs={"backend": backend}, setup=time_baseline, rounds=rounds)
    if benchmark.stats is None:
        return
    seconds, moved = benchmark.stats.stats.min, 3 * size * dtype.itemsize
    row = {
        "commit": commit(),
        "shape": shape,
        "dtype": str(dtype)[6:],
        "response": repr(response),
        "backend": backend,
        "form": fm.explain(x, response, backend=backend).form,
        "ms": round(1e3 * seconds, 4),
        "torch_fft_ms": round(1e3 * min(baseline_times), 4),
        "times_faster": round(min(baseline_times) / seconds, 2),
        "scale_in_place_ms": round(1e3 * least(lambda: x.mul_(1.0)), 4),
        "gb_per_s": round(moved / seconds / 1e9, 2),
        "relative_error": float(f"{error:.2g}"),
        "extra_memory_mb": round(used / 1e6, 2),
        "extra_memory_share": round(used / (size * dtype.itemsize), 3),
    }
    benchmark.extra_info.update(row)
    report.append(row)


def least(work: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def torch_fft(x: torch.Tensor, response: Response) -> Callable[[], torch.Tensor]:
    """The baseline: what one writes with torch.fft, its mask made beforehand."""
    shape = x.shape[-2:] if x.ndim > 1 else (1, x.shape[0])
    mask = torch.from_numpy(np.array(response.half_mask(tuple(x.shape[-2:]))))
    mask = mask.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if x.ndim == 1:
        return lambda: torch.fft.irfft(torch.fft.rfft(x) * mask[0], n=shape[1])
    if x.dtype in (torch.float32, torch.float64):
        return lambda: torch.fft.irfft2(torch.fft.rfft2(x) * mask, s=tuple(shape))
    return lambda: torch.fft.irfft2(torch.fft.rfft2(x.float()) * mask, s=tuple(shape)).to(x.dtype)


def relative_error(y: torch.Tensor, x: torch.Tensor, response: Response) -> float:
    """Relative L2 error, against float64: by torch.fft, or by the full form where that would not fit into memory."""
    exact = fm.filter_(x.double(), response) if x.numel() > HUGE else torch_fft(x.double(), response)()
    norm = torch.linalg.vector_norm(exact)
    return float(torch.linalg.vector_norm(exact.sub_(y)) / norm)
