"""Speed and memory of the filter beside torch.fft, on one thread. Each answer is checked before it is timed.

    pytest benchmarks/test_filter.py --benchmark-enable --report benchmarks/results/filter.json

Rows measured again (with ``-k``) replace those of an existing report. Before every timed round the baseline,
``irfft2(rfft2(x) * mask)`` with a ready-made mask, runs once, so that both see the same machine; times are the least
process CPU time. Without --benchmark-enable the answers of the smaller shapes are checked and nothing is timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import freemerge as fm
from benchmarks import harness
from benchmarks.harness import HEADS, LARGEST, LLAMA, PRIMES, VECTORS, VIT, VOCABULARY, Case, Row

MIDDLE = [*VIT, *LLAMA[:2]]
CUTOFFS = (0.01, 0.05, 0.1, 0.2, 0.4)
CASES = [
    *(Case(shape, f"HighPass({c})") for shape in [*HEADS, *VECTORS, *MIDDLE, PRIMES[0]] for c in CUTOFFS),
    *(Case(shape, "Official(0.7)") for shape in [*MIDDLE, PRIMES[1]]),
    *(Case(shape, f"HighPass({c})") for shape in [*LLAMA[2:], *VOCABULARY, PRIMES[1]] for c in (0.05, 0.4)),
    Case(LARGEST, "HighPass(0.05)"),
    *(Case((4096, 4096), f"HighPass({c})", dtype) for dtype in ("bfloat16", "float64") for c in (0.05, 0.4)),
]
CHECKED_ALWAYS = 1 << 20  # elements


def backends(case: Case) -> list[str]:
    """The backend that "auto" takes, and the native one, which leaves some shapes to torch."""
    auto = fm.explain(case.shape, case.mask, dtype=case.torch_dtype).backend
    return list(dict.fromkeys([auto, *(["cpu"] if fm.backends()["cpu"].available else [])]))


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    rows: list[Row] = []
    yield rows
    path = request.config.getoption("--report")
    if rows and path:
        fields = ("shape", "dtype", "response", "backend")
        rows = harness.replace_rows(harness.read_rows(Path(path)), rows, fields)
        harness.write(Path(path), {"machine": harness.machine(threads=1), "rows": rows})


@pytest.fixture
def one_thread() -> Iterator[None]:
    with harness.threads(1):
        yield


@pytest.mark.benchmark(timer=time.process_time, warmup=False)
@pytest.mark.parametrize(("case", "backend"), [(case, name) for case in CASES for name in backends(case)], ids=str)
@pytest.mark.usefixtures("one_thread")
def test_filter(case: Case, backend: str, benchmark: BenchmarkFixture, report: list[Row]) -> None:
    size = math.prod(case.shape)
    if benchmark.disabled and size > CHECKED_ALWAYS:
        pytest.skip("large shapes are checked where they are timed")
    original, response = case.input(), case.mask
    x = original.clone()
    used = harness.peak_growth(lambda: fm.filter_(x, response, backend=backend))
    error = harness.check(x, original, response)["error"]

    baseline = harness.torch_fft(original, response)
    baseline_times: list[float] = []
    rounds = max(3, min(40, 40_000_000 // size))
    benchmark.pedantic(
        harness.filter_call(x, response, backend),
        setup=lambda: baseline_times.append(harness.cpu_seconds(lambda: baseline(original))),
        rounds=rounds,
    )
    if benchmark.stats is None:
        return
    seconds, stored = benchmark.stats.stats.min, x.nbytes
    row = {
        "commit": harness.commit(),
        "shape": case.shape,
        "dtype": case.dtype,
        "response": repr(response),
        "backend": backend,
        "form": fm.explain(x, response, backend=backend).form,
        "ms": round(1e3 * seconds, 4),
        "torch_fft_ms": round(1e3 * min(baseline_times), 4),
        "times_faster": round(min(baseline_times) / seconds, 2),
        "scale_in_place_ms": round(harness.least({"": lambda: x.mul_(1.0)}, budget=0.0)[""], 4),
        "gb_per_s": round(3 * stored / seconds / 1e9, 2),
        "relative_error": float(f"{error:.2g}"),
        "extra_memory_mb": round(used / 1e6, 2),
        "extra_memory_share": round(used / stored, 3),
    }
    benchmark.extra_info.update(row)
    report.append(row)
