"""The CUDA backend against torch.fft and the released code's way, on a GPU: checked first, then timed.

Times are medians of CUDA events over inputs that rotate through more memory than the L2 holds. Run by gpu_suite.sh.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch

import freemerge as fm
from benchmarks import harness
from benchmarks.experts import switching
from benchmarks.harness import LLAMA, PRIMES, VIT, VOCABULARY, Case, Row
from benchmarks.kernels import one_tensor

SHAPES = [*VIT, *LLAMA, *VOCABULARY, *PRIMES, (48, 768, 768)]
RESPONSES = [*(f"HighPass({cutoff})" for cutoff in (0.01, 0.05, 0.2, 0.4)), "Official(0.7)", "Butterworth(0.1)"]
DTYPES = ("float32", "bfloat16")
ARITHMETIC = 1e-6  # relative error of the kernels


def rotation(case: Case) -> list[torch.Tensor]:
    """Copies of one input that together are four times the L2, at least two, at most sixty-four."""
    x = case.input("cuda")
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return [x, *(x.clone() for _ in range(min(63, max(1, 4 * l2 // x.nbytes))))]


def measure(case: Case) -> Row:
    inputs, response = rotation(case), case.mask
    x = inputs[0]
    error = harness.check(fm.filtered(x, response, backend="cuda"), x, response, ARITHMETIC)["error"]
    plan = fm.explain(x, response, backend="cuda")
    in_torch = harness.torch_fft(x, response)

    def ours(t: torch.Tensor) -> torch.Tensor:
        return fm.filter_(t, response, scale=harness.steady_scale(response), backend="cuda")

    def rotating(run: Callable[[torch.Tensor], object]) -> Callable[[], object]:
        following = cycle(inputs)
        return lambda: run(next(following))

    works = {"ms": ours, "floor_ms": lambda t: t.mul_(1.0009765625), "torch_ms": in_torch}
    if len(case.shape) == 2 and isinstance(response, fm.Official):
        works["released_ms"] = lambda t: harness.released(t, response.ratio)
    times = harness.gpu_median({name: rotating(run) for name, run in works.items()})
    return {
        "shape": list(case.shape), "dtype": case.dtype, "response": repr(response), "form": plan.form, "error": error,
        "extra_bytes": harness.peak_growth(lambda: ours(x), "cuda"), "promised_bytes": plan.workspace_bytes,
        "torch_extra_bytes": harness.peak_growth(lambda: in_torch(x), "cuda"), **times,
        "gb_per_s_of_floor": 3 * x.nbytes / times["ms"] / 1e6,
    }  # fmt: skip


def sanitize() -> None:
    """Every kernel once, on shapes small enough for compute-sanitizer."""
    for dtype in (torch.float32, torch.bfloat16):
        for response in (fm.HighPass(0.05), fm.HighPass(0.3), fm.Butterworth(0.1), fm.Center(-2)):
            for shape in ((128, 200), (97, 101), (3, 40, 48)):
                fm.filter_(torch.randn(shape, device="cuda").to(dtype), response, backend="cuda")
    base, model = (torch.randn(300, 200, device="cuda") for _ in range(2))
    fm.merge({"w": base}, [{"w": model}], fm.Recipe(fm.HighPass(0.3), out_dtype="bfloat16"), backend="cuda")
    torch.cuda.synchronize()


def machine() -> Row:
    gpu = torch.cuda.get_device_properties(0)
    return harness.machine(
        gpu=gpu.name, memory_bytes=gpu.total_memory, multiprocessors=gpu.multi_processor_count, cuda=torch.version.cuda
    )


def print_table(rows: list[Row]) -> None:
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
    backend = fm.backends()["cuda"]
    if not backend.available:
        sys.exit(f"no CUDA backend: {backend.reason}")
    if options.sanitize:
        sanitize()
        return
    rows = []
    for shape in SHAPES:
        for response in RESPONSES:
            rows += [measure(Case(shape, response, dtype)) for dtype in DTYPES]
            torch.cuda.empty_cache()
    merges = [one_tensor((4096, 11008), fm.HighPass(c), "cuda", harness.gpu_median) for c in (0.05, 0.4)]
    switches = [{"dtype": dtype, **switching(getattr(torch, dtype), "cuda")} for dtype in DTYPES]
    harness.write(options.out, {"machine": machine(), "results": rows, "merge": merges, "switch": switches})
    print_table(rows)
    print("", *(json.dumps(row) for row in merges + switches), sep="\n")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
