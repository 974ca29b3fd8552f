"""The filter against torch.fft, in one run: every result is checked in float64 before anything is timed.

    pytest benchmarks/test_filter.py --benchmark-enable --benchmark-json benchmarks/results/filter.json

Times are process CPU time on one thread, best of several rounds; ours and torch's rfft2 -> mask -> irfft2 take turns,
so that their ratio (``extra_info["ratio"]``) survives a noisy machine.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import freemerge as fm
from freemerge.spectral.plan import Plan

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from cases import AWKWARD, LLAMA, VIT, VOCABULARY

Response = fm.Response
MAIN = ((768, 768), (3072, 768), (4096, 4096), (4096, 11008), (5120, 13824))
CASES: list[tuple[tuple[int, int], Response]] = [
    *((shape, fm.HighPass(0.05)) for shape in (*VIT, *LLAMA, *AWKWARD)),
    *((shape, fm.HighPass(0.02)) for shape in VOCABULARY),
    *((shape, fm.HighPass(cutoff)) for shape in MAIN for cutoff in (0.01, 0.2, 0.4)),
    *((shape, response) for shape in MAIN for response in (fm.Butterworth(0.2), fm.Official(0.7))),
]
LARGE = 1 << 24  # entries from which one round of the baseline is enough


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def matrix(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@lru_cache(maxsize=1)
def half_mask(shape: tuple[int, int], response: Response) -> torch.Tensor:
    return torch.tensor(response.half_mask(shape), dtype=torch.float32)


@lru_cache(maxsize=1)
def reference(shape: tuple[int, int], response: Response) -> torch.Tensor:
    """The filtered matrix in float64, rounded to float32 (its error of 3e-8 counts for nothing here)."""
    spectrum = torch.fft.rfft2(matrix(shape).double())
    spectrum *= torch.tensor(response.half_mask(shape))
    return torch.fft.irfft2(spectrum, s=shape).float()


def baseline(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(x) * mask, s=x.shape)


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def peak_growth(function: Callable[[], object]) -> int:
    """Bytes by which the resident set grows beyond its present size while the function runs (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _label(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else repr(value)


@pytest.mark.parametrize("backend", [name for name, info in fm.backends().items() if info.available])
@pytest.mark.parametrize(("shape", "response"), CASES, ids=_label)
def test_filter(benchmark: object, shape: tuple[int, int], response: Response, backend: str) -> None:
    x, mask = matrix(shape), half_mask(shape, response)
    plan: Plan = fm.explain(shape, response, backend=backend)
    expected = reference(shape, response)
    result = fm.filtered(x, response, backend=backend)
    error = float((result - expected).norm() / expected.norm())
    assert error <= 5e-7, f"relative L2 error {error}"

    work = x.clone()
    growth = peak_growth(lambda: fm.filter_(work, response, backend=backend))
    rounds = 3 if x.numel() > LARGE else 7
    theirs = min(seconds(lambda: baseline(x, mask)) for _ in range(2 if x.numel() > LARGE else rounds))
    in_place_scale = min(seconds(lambda: work.mul_(1.0)) for _ in range(rounds))
    floor = min(seconds(lambda: (work.sum(), work.mul_(1.0))) for _ in range(rounds))
    work.copy_(x)
    benchmark.pedantic(fm.filter_, args=(work, response), kwargs={"backend": backend}, rounds=rounds, warmup_rounds=1)  # type: ignore[attr-defined]
    ours = min(seconds(lambda: fm.filter_(work, response, backend=backend)) for _ in range(rounds))
    theirs = min(theirs, seconds(lambda: baseline(x, mask)))
    benchmark.extra_info.update(  # type: ignore[attr-defined]
        shape=list(shape),
        response=repr(response),
        backend=backend,
        form=plan.form,
        error=error,
        ours_ms=1e3 * ours,
        torch_fft_ms=1e3 * theirs,
        ratio=theirs / ours,
        read_twice_write_once_ms=1e3 * floor,
        in_place_scale_ms=1e3 * in_place_scale,
        gigabytes_per_second=12e-9 * x.numel() / ours,
        extra_memory_share=growth / work.nbytes,
        torch_threads=torch.get_num_threads(),
        isa=fm.backends()["cpu"].details.get("isa"),
    )
