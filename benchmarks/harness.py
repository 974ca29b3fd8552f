"""What the benchmarks share: cases, the check before any timing, baselines, timing in turns, memory, the record."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

import freemerge as fm

Row = dict[str, Any]
Key = TypeVar("Key")

# Shapes by where they come from.
VECTORS = ((768,), (4096,))
HEADS = ((64, 64), (197, 64), (12, 64, 64))
VIT = ((768, 768), (2304, 768), (3072, 768), (768, 3072))
LLAMA = ((1024, 4096), (4096, 4096), (4096, 11008), (14336, 4096), (5120, 13824))
VOCABULARY = ((50257, 768), (32000, 4096), (151936, 896))
LARGEST = (128256, 4096)
MAIN = ((768, 768), (3072, 768), (4096, 4096), (4096, 11008), (5120, 13824))
PRIMES = ((1009, 1013), (50265, 768))

_HUGE = 1 << 28  # elements of a matrix that is transformed in float64 along one axis after the other, part by part
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Case:
    """A filter to measure; ``response`` is an expression such as ``HighPass(0.05)``."""

    shape: tuple[int, ...]
    response: str
    dtype: str = "float32"
    threads: int = 1

    def __str__(self) -> str:
        threads = f"-{self.threads} threads" if self.threads > 1 else ""
        return f"{'x'.join(map(str, self.shape))}-{self.dtype}-{self.response}{threads}"

    @property
    def mask(self) -> fm.Response:
        name, _, argument = self.response[:-1].partition("(")
        response: fm.Response = getattr(fm, name)(float(argument))
        return response

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def input(self, device: str = "cpu") -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(0)
        return torch.randn(self.shape, generator=generator, device=device).to(self.torch_dtype)


def steady_scale(response: fm.Response) -> float:
    """The scale at which a filter can run on its own output any number of times; Official has a ring of gain 2."""
    return 0.5 if isinstance(response, fm.Official) else 1.0


def filter_call(x: torch.Tensor, response: fm.Response, backend: str = "auto") -> Callable[[], object]:
    scale = steady_scale(response)
    return lambda: fm.filter_(x, response, scale=scale, backend=backend)


# Check ----------------------------------------------------------------------------------------------------------------


def check(result: torch.Tensor, original: torch.Tensor, response: fm.Response, arithmetic: float = 5e-7) -> Row:
    """Relative L2 error against torch.fft in float64; raises if it is more than arithmetic and storage explain."""
    if original.dtype == torch.float64:
        arithmetic = 1e-12
    with threads(os.cpu_count() or 1):
        squares, begin = torch.zeros(3, dtype=torch.float64, device=original.device), 0
        for x in _exact(original, response):
            y = result.reshape(-1)[begin : begin + x.numel()]
            squares += torch.stack([(e * e).sum() for e in (x - y, x - x.to(y.dtype), x)])
            begin += x.numel()
    assert begin == result.numel()
    error, rounding = (squares[:2] / squares[2].clamp(min=1e-60)).sqrt().tolist()
    if not error <= arithmetic + 1.001 * rounding:
        raise AssertionError(f"relative error {error:.1e} of {response!r} on {tuple(original.shape)} {original.dtype}")
    return {"error": error, "rounding": rounding}


def _exact(original: torch.Tensor, response: fm.Response) -> Iterator[torch.Tensor]:
    """The filtered tensor in float64, flat, piece by piece."""
    if original.numel() <= _HUGE:
        wide = original.to(torch.float64)
        yield from torch_fft(wide, response)(wide).reshape(-1).split(_CHUNK)
        return
    height, width = original.shape  # a matrix: nothing else is as large
    mask = _half_mask(response, (height, width)).to(original.device)
    spectrum = torch.empty_like(mask, dtype=torch.complex128)  # the one large thing beside the mask
    rows = math.ceil(_CHUNK / width)
    for part, some in zip(spectrum.split(rows), original.split(rows), strict=True):
        part.copy_(torch.fft.rfft(some.double()))
    for part, gains in zip(spectrum.split(64, dim=1), mask.split(64, dim=1), strict=True):
        part.copy_(torch.fft.ifft(torch.fft.fft(part, dim=0) * gains, dim=0))
    for part in spectrum.split(rows):
        yield torch.fft.irfft(part, n=width).reshape(-1)


# Baselines ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _half_mask(response: fm.Response, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(response.half_mask(shape).copy())


def torch_fft(
    x: torch.Tensor, response: fm.Response, *, in_place: bool = False
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What one writes with torch.fft for tensors like ``x``, the mask made beforehand; in place: the product is."""
    axes = (-2, -1)[-x.ndim :]
    shape = x.shape[-len(axes) :]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    mask = _half_mask(response, tuple(shape)).to(x.device, compute)
    mask = mask[0] if x.ndim == 1 else mask

    def run(x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfftn(x.to(compute), dim=axes)
        spectrum = spectrum.mul_(mask) if in_place else spectrum * mask
        return torch.fft.irfftn(spectrum, s=shape, dim=axes).to(x.dtype)

    return run


def released(x: torch.Tensor, ratio: float) -> torch.Tensor:
    """Official(ratio) as the released code computes it: complex transforms, and a mask made for every matrix."""
    height, width = x.shape
    spectrum = torch.fft.fft2(x.float())
    y = torch.arange(height, device=x.device)[:, None] - height // 2
    z = torch.arange(width, device=x.device)[None, :] - width // 2
    distance = torch.sqrt((y * y + z * z).float())
    side = min(height, width)
    mask = (distance <= ratio * side).float() + (distance == side // 10).float()
    return torch.fft.ifft2(spectrum * mask).real.to(x.dtype)


# Time -----------------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """Something to time, and what goes before each of its turns untimed."""

    run: Callable[[], object]
    before: Callable[[], object] = lambda: None


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of one call, on several threads that of the one that worked longest, so that a second thread helps only
    as far as it takes work off the first; threads that wait must not spin (OMP_WAIT_POLICY)."""
    if torch.get_num_threads() == 1:
        start = time.process_time()
        work()
        return time.process_time() - start
    before = _thread_seconds()
    work()
    return max(after - before.get(thread, 0.0) for thread, after in _thread_seconds().items())


def _thread_seconds() -> dict[int, float]:
    names = map(int, os.listdir("/proc/self/task"))
    return {thread: time.clock_gettime(~thread << 3 | 6) for thread in names}  # Linux's clock of one thread


def wall_seconds(work: Callable[[], object]) -> float:
    """Wall time of one call, until a GPU has done what it was told."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def event_seconds(work: Callable[[], object]) -> float:
    """Time of one call on the GPU's stream, between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def in_turns(
    works: Mapping[Key, Work | Callable[[], object]],
    clock: Callable[[Callable[[], object]], float] = cpu_seconds,
    *,
    turns: int = 2,
    budget: float = 3.0,
) -> dict[Key, list[float]]:
    """Milliseconds of every call of each work. They take turns, so that a busy moment meets them all.

    A turn is three calls and 10 ms at least, or one call of more than 0.2 s. Each work has ``turns`` of them, then as
    many as still fit into the budget in seconds.
    """
    left = {key: work if isinstance(work, Work) else Work(work) for key, work in works.items()}
    times: dict[Key, list[float]] = {key: [] for key in works}
    start, rounds = time.perf_counter(), 0
    while left:
        for key, (run, before) in left.items():
            before()
            begin, calls, elapsed = time.perf_counter(), 0, 0.0
            while elapsed < 0.2 and (calls < 3 or elapsed < 0.01):
                times[key].append(1e3 * clock(run))
                calls, elapsed = calls + 1, time.perf_counter() - begin
        rounds += 1
        if rounds >= turns:
            spare = 1e3 * (budget - (time.perf_counter() - start))
            left = {key: work for key, work in left.items() if max(3 * min(times[key]), 10.0 * len(left)) < spare}
    return times


def least(works: Mapping[Key, Work | Callable[[], object]], *args: Any, **kwargs: Any) -> dict[Key, float]:
    """The least time of each work, which other programs disturb least; arguments as of :func:`in_turns`."""
    return {key: min(times) for key, times in in_turns(works, *args, **kwargs).items()}


def gpu_median(works: Mapping[Key, Work | Callable[[], object]]) -> dict[Key, float]:
    """The median time of each work on the GPU."""
    return {key: statistics.median(times) for key, times in in_turns(works, event_seconds, turns=5, budget=0).items()}


@contextmanager
def threads(number: int) -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(former)


# Memory ---------------------------------------------------------------------------------------------------------------


def peak_growth(work: Callable[[], object], device: str = "cpu") -> int:
    """Bytes by which memory grew at most while the work ran: the resident set, or what is allocated on the GPU.

    0 where it cannot be told.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        work()
        return 0
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still resident would hide what is taken
    reset.write_text("5")  # resets the high-water mark
    before = _high_water_mark()
    work()
    return max(0, _high_water_mark() - before)


def _high_water_mark() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


# Record ---------------------------------------------------------------------------------------------------------------


def machine(**about: Any) -> Row:
    """What was measured, where."""
    return {
        "commit": commit(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "backends": {name: _without_folders(info.details) for name, info in fm.backends().items() if info.available},
        **about,
    }


def _without_folders(details: Mapping[str, str]) -> dict[str, str]:
    """Of a library the file alone: where it lies says nothing about what was measured."""
    return {what: Path(told).name if Path(told).is_absolute() else told for what, told in details.items()}


@lru_cache
def commit() -> str:
    """The commit of the package in use, or of this file where the package is installed elsewhere.

    The environment says it for a copy of the tree without its history.
    """
    for file in (fm.__file__, __file__):
        command = ["git", "-C", Path(file).parent, "rev-parse", "HEAD"]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        if told.returncode == 0:
            return told.stdout.strip()
    return os.environ.get("COMMIT", "")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def read_rows(path: Path) -> list[Row]:
    """The rows of a report that is there already, else none."""
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return rows


def replace_rows(old: Iterable[Row], new: Iterable[Row], fields: Sequence[str]) -> list[Row]:
    """Rows measured again in the place of old ones that agree in these fields."""
    return list({json.dumps([row[field] for field in fields]): row for row in (*old, *new)}.values())


def write(path: Path, report: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
