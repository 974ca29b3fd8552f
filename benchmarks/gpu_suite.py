"""The CUDA backend against torch.fft and the released code's way, on a GPU: checked first, then timed.

Times are medians of CUDA events over inputs that rotate through more memory than the L2 holds. Run by gpu_suite.sh.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import freemerge as fm
from freemerge.accumulate import add_round, task_vector_sum
from freemerge.responses import Response

from .experts import switching

SHAPES = [
    (768, 768), (2304, 768), (3072, 768), (768, 3072), (4096, 4096), (1024, 4096), (14336, 4096), (5120, 13824),
    (4096, 11008), (50257, 768), (151936, 896), (32000, 4096), (1009, 1013), (50265, 768),
]  # fmt: skip
RESPONSES: list[Response] = [
    fm.HighPass(0.01),
    fm.HighPass(0.05),
    fm.HighPass(0.2),
    fm.HighPass(0.4),
    fm.Official(),
    fm.Butterworth(0.1),
]
BATCH = 48  # equal small matrices in one call
REPEATS = 15
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def half_mask(response: Response, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(response.half_mask(shape[-2:]).astype("float32"))


def reference(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(x.double()) * mask, s=x.shape[-2:])


def torch_filter(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The baseline: rfft2, mask, irfft2 in fp32, back in the storage dtype."""
    return torch.fft.irfft2(torch.fft.rfft2(x.float()) * mask, s=x.shape[-2:]).to(x.dtype)


def released_filter(x: torch.Tensor, ratio: float) -> torch.Tensor:
    """The released code's way: complex transforms, and a mask made for every matrix."""
    height, width = x.shape
    spectrum = torch.fft.fft2(x.float())
    y = torch.arange(height, device=x.device)[:, None] - height // 2
    z = torch.arange(width, device=x.device)[None, :] - width // 2
    distance = torch.sqrt((y * y + z * z).float())
    side = min(height, width)
    mask = (distance <= ratio * side).float() + (distance == side // 10).float()
    return torch.fft.ifft2(spectrum * mask).real.to(x.dtype)


def median_ms(run: Callable[[torch.Tensor], object], inputs: list[torch.Tensor]) -> float:
    for x in inputs[:2]:
        run(x)
    times = []
    for i in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(inputs[i % len(inputs)])
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def extra_memory(run: Callable[[torch.Tensor], object], x: torch.Tensor) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def rotation(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Copies of one input that together are four times the L2, at least two, at most sixty-four."""
    x = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return [x, *(x.clone() for _ in range(min(63, max(1, 4 * l2 // x.nbytes))))]


def measure(shape: tuple[int, ...], response: Response, mask: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    inputs = rotation(shape, dtype)
    x = inputs[0]
    want = reference(x, mask)
    error = float((fm.filtered(x, response, backend="cuda").double() - want).norm() / want.norm().clamp(min=1e-30))
    del want
    if error > TOLERANCE[dtype]:
        sys.exit(f"wrong result: {shape} {response!r} {dtype}: relative error {error:.1e}")
    plan = fm.explain(x, response, backend="cuda")
    ours = median_ms(lambda t: fm.filter_(t, response, backend="cuda"), inputs)
    row: dict[str, Any] = {
        "shape": list(shape), "dtype": str(dtype)[6:], "response": repr(response), "form": plan.form, "error": error,
        "ms": ours, "extra_bytes": extra_memory(lambda t: fm.filter_(t, response, backend="cuda"), x),
        "promised_bytes": plan.workspace_bytes, "floor_ms": median_ms(lambda t: t.mul_(1.0009765625), inputs),
        "torch_ms": median_ms(lambda t: torch_filter(t, mask), inputs),
        "torch_extra_bytes": extra_memory(lambda t: torch_filter(t, mask), x),
        "gb_per_s_of_floor": 3 * x.nbytes / ours / 1e6,
    }  # fmt: skip
    if len(shape) == 2 and isinstance(response, fm.Official):
        row["released_ms"] = median_ms(lambda t: released_filter(t, response.ratio), inputs)
    return row


def merging(response: Response, count: int = 8, shape: tuple[int, int] = (4096, 11008)) -> dict[str, Any]:
    """The merge of one bf16 tensor of eight models, beside the same in torch ops."""
    base = torch.randn(shape, device="cuda").bfloat16()
    models = [(base.float() + 0.01 * torch.randn(shape, device="cuda")).bfloat16() for _ in range(count)]
    mask = half_mask(response, shape).cuda()

    def in_torch(base: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(shape, device="cuda")
        for model in models:
            total += (model.float() - base.float()) / count
        return (base.float() + torch_filter(total, mask)).bfloat16()

    def ours(base: torch.Tensor) -> torch.Tensor:
        total, _ = task_vector_sum(base, models, [1 / count] * count, backend="cuda")
        fm.filter_(total, response, backend="cuda")
        return add_round(base, total, 1.0, torch.bfloat16, backend="cuda")

    want = in_torch(base)
    different = float((ours(base) != want).double().mean())
    if different > 2e-4:
        sys.exit(f"wrong result: merge with {response!r}: {different:.1e} of the entries differ from torch's")
    return {
        "models": count, "shape": list(shape), "dtype": "bfloat16", "response": repr(response),
        "different": different, "ms": median_ms(ours, [base, base]), "torch_ms": median_ms(in_torch, [base, base]),
        "read_ms": median_ms(lambda _: [model.view(torch.int32).sum() for model in models], [base, base]),
    }  # fmt: skip


def sanitize() -> None:
    """Every kernel once, on shapes small enough for compute-sanitizer."""
    for dtype in (torch.float32, torch.bfloat16):
        for response in (fm.HighPass(0.05), fm.HighPass(0.3), fm.Butterworth(0.1), fm.Center(-2)):
            for shape in ((128, 200), (97, 101), (3, 40, 48)):
                fm.filter_(torch.randn(shape, device="cuda").to(dtype), response, backend="cuda")
    base, model = (torch.randn(300, 200, device="cuda") for _ in range(2))
    total, _ = task_vector_sum(base, [model], [0.5], backend="cuda")
    add_round(base, total, 1.0, torch.bfloat16, backend="cuda")
    torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": properties.name, "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count, "torch": torch.__version__, "cuda": torch.version.cuda,
        "commit": commit, "backend": fm.backends()["cuda"].details,
    }  # fmt: skip


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| shape | dtype | response | form | ms | x torch | x in-place scale | extra MB (torch) | error |")
    print("|---|---|---|---|---:|---:|---:|---:|---:|")
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        print(
            f"| {shape} | {row['dtype']} | {row['response']} | {row['form']} | {row['ms']:.3f} "
            f"| {row['torch_ms'] / row['ms']:.1f} | {row['ms'] / row['floor_ms']:.1f} "
            f"| {row['extra_bytes'] / 1e6:.1f} ({row['torch_extra_bytes'] / 1e6:.0f}) | {row['error']:.0e} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--sanitize", action="store_true", help="run every kernel once and stop")
    options = parser.parse_args()
    if not fm.backends()["cuda"].available:
        sys.exit(f"no CUDA backend: {fm.backends()['cuda'].reason}")
    if options.sanitize:
        sanitize()
        return
    rows = []
    for shape in [*SHAPES, (BATCH, 768, 768)]:
        with ThreadPoolExecutor() as pool:  # masks of large matrices take seconds
            masks = list(pool.map(lambda response: half_mask(response, shape), RESPONSES))  # noqa: B023
        for response, mask in zip(RESPONSES, masks, strict=True):
            rows += [measure(shape, response, mask.cuda(), dtype) for dtype in TOLERANCE]
            torch.cuda.empty_cache()
    merges = [merging(response) for response in (fm.HighPass(0.05), fm.HighPass(0.4))]
    switches = [{"dtype": str(dtype)[6:], **switching(dtype, "cuda")} for dtype in TOLERANCE]
    results = {"machine": machine(), "results": rows, "merge": merges, "switch": switches}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_table(rows)
    print("", *(json.dumps(row) for row in merges + switches), sep="\n")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
