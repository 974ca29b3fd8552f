"""The native CPU kernels against torch's rfft2 -> mask -> irfft2, the memory floor and the released code; writes a JSON
and prints how it stands against the project's targets.

    python -m benchmarks.filter_cpu benchmarks/results/filter_cpu.json

Every shape runs in a process of its own. Each filter first shows its peak memory and its error against float64; then
all filters of the shape, the baseline and the floor are timed in turns (harness.in_turns). Two threads must give the
same bytes as one. The baseline runs once more in a process whose allocator keeps its memory ("tuned": without it, up to
a quarter of torch's time on large matrices is page faults). Shorter instruction sets are forced on three shapes. At the
end the merge of eight models and the selection of an expert's entries. About eight minutes on an idle machine.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import freemerge as fm
from benchmarks import harness
from benchmarks.harness import MAIN, VOCABULARY, Case, Row, Work
from benchmarks.kernels import one_tensor, selection

Shape = tuple[int, int]

OFFICIAL: tuple[Shape, ...] = ((768, 3072), (2304, 768), (3072, 768), (4096, 4096), (5120, 13824))
NARROW, WIDE = "HighPass(0.05)", "HighPass(0.4)"
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)}


def cases(shape: Shape) -> list[Case]:
    """The filters timed on a shape, in float32 and on one thread."""
    if shape in VOCABULARY:
        return [Case(shape, "HighPass(0.02)")]
    wanted = ["HighPass(0.01)", NARROW, "HighPass(0.2)", WIDE, "Butterworth(0.2)"] if shape in MAIN else []
    return [Case(shape, text) for text in [*wanted, *(["Official(0.7)"] if shape in OFFICIAL else [])]]


def variants(shape: Shape) -> list[Case]:
    """Two of them in bfloat16, and on two threads."""
    chosen = [case for case in cases(shape) if case.response in (NARROW, WIDE)]
    return [new for case in chosen for new in (replace(case, dtype="bfloat16"), replace(case, threads=2))]


def run_shape(shape: Shape) -> list[Row]:
    """All filters of one shape in this process."""
    fm.filter_(torch.zeros(64, 64), fm.HighPass(0.05))  # what is loaded once is no filter's memory
    rows: list[Row] = []
    works: dict[object, Work] = {}
    for case in [*cases(shape), *variants(shape)]:
        row, work = run_filter(case)
        works[len(rows)] = work
        rows.append(row)
    x = Case(shape, NARROW).input()
    baseline = harness.torch_fft(x, fm.HighPass(0.05), in_place=True)
    for threads in sorted({row["threads"] for row in rows}):
        for name, run in {"torch": lambda: baseline(x), "sum": x.sum, "scale": lambda: x.mul_(1.0)}.items():
            works[name, threads] = on(threads, run)
    times = harness.least(works, budget=10.0)
    torch.set_num_threads(1)
    released_ms = harness.least({"": lambda: harness.released(x, 0.7)}, turns=1)[""] if shape in OFFICIAL else math.nan
    for index, row in enumerate(rows):
        threads = row["threads"]
        row["ms"], row["torch_ms"] = times[index], times["torch", threads]
        row["floor_ms"] = times["sum", threads] + times["scale", threads]
        row["ratio"] = row["torch_ms"] / row["ms"]
        row["floor_ratio"] = row["ms"] / row["floor_ms"]
        row["gb_per_s"] = 3 * x.numel() * (2 if row["dtype"] == "bfloat16" else 4) / row["ms"] / 1e6
        if row["response"].startswith("Official"):
            row["released_ms"], row["released_ratio"] = released_ms, released_ms / row["ms"]
    return rows


def on(threads: int, run: Callable[[], object]) -> Work:
    return Work(run, before=lambda: torch.set_num_threads(threads))


def run_filter(case: Case) -> tuple[Row, Work]:
    """Memory and error of one filter, and the work to be timed."""
    original, response = case.input(), case.mask
    x = original.clone()
    with harness.threads(case.threads):
        extra = harness.peak_growth(lambda: fm.filter_(x, response))
    plan = fm.explain(x, response)
    row: Row = {
        "shape": list(x.shape), "response": case.response, "dtype": case.dtype, "threads": case.threads,
        "form": plan.form, "plan": str(plan), "extra_mb": extra / 1e6, "extra_percent": 100 * extra / x.nbytes,
    }  # fmt: skip
    if case.threads == 1:
        row |= harness.check(x, original, response)
    elif not torch.equal(x, fm.filtered(original, response)):
        raise AssertionError(f"{case} depends on the number of threads")
    return row, on(case.threads, harness.filter_call(x, response))


def run_times(shape: Shape) -> list[Row]:
    """Times alone and beside the baseline, on the instruction set that the environment names."""
    x = torch.randn(shape)
    baseline = harness.torch_fft(x, fm.HighPass(0.05), in_place=True)
    works = {case.response: harness.filter_call(x, case.mask) for case in cases(shape)}
    times = harness.least({"torch": lambda: baseline(x), **works})
    common = {"shape": list(shape), "isa": fm.backends()["cpu"].details["isa"], "torch_ms": times.pop("torch")}
    return [{**common, "response": text, "ms": ms} for text, ms in times.items()]


def run_tuned(shape: Shape) -> float:
    """Milliseconds of the baseline in this process, whose allocator the environment has tuned."""
    x = torch.randn(shape)
    baseline = harness.torch_fft(x, fm.HighPass(0.05), in_place=True)
    return harness.least({"": lambda: baseline(x)})[""]


def run_select(shape: Shape) -> Row:
    """The top 1 % of a task vector, against torch.topk of magnitudes that need not be subtracted first."""
    row = selection(shape, torch.float32)
    ours, theirs = row["select"], row["topk_without_base"]
    return {"shape": list(shape), "count": row["count"], "ms": ours, "torch_ms": theirs, "ratio": theirs / ours}


MODES: dict[str, Callable[[Shape], Any]] = {
    "--shape": run_shape, "--tuned": run_tuned, "--times": run_times, "--merge": one_tensor, "--select": run_select,
}  # fmt: skip


def spawn(mode: str, shape: Shape, environment: dict[str, str] | None = None) -> Any:
    command = [sys.executable, "-m", "benchmarks.filter_cpu", mode, json.dumps(shape)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **(environment or {})}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def targets(rows: list[Row], shorter: list[Row], merge: Row, select: Row) -> list[Row]:
    """What the project asks of an AVX-512 machine, and whether it is met."""
    results: list[Row] = []

    def target(name: str, measured: float, *, least: float = 0.0, most: float = 0.0) -> None:
        limit, met = (f": >= {least:g}", measured >= least) if least else (f": <= {most:g}", measured <= most)
        verdict = ("met" if met else "missed") if least or most else "for information"
        results.append({"target": name + limit if least or most else name, "measured": measured, "verdict": verdict})

    single = [row for row in rows if row["threads"] == 1 and row["dtype"] == "float32"]

    def every(*names: str, key: str = "ratio") -> list[float]:
        return [row[key] for row in single if row["response"].startswith(names) and key in row]

    def at(shape: Shape, text: str, dtype: str = "float32", threads: int = 1) -> Row:
        wanted = (list(shape), text, dtype, threads)
        return next(row for row in rows if (row["shape"], row["response"], row["dtype"], row["threads"]) == wanted)

    def excess(row: Row) -> float:
        """Extra memory as a part of what a tensor may take, 16 MB or 5 % of its own."""
        return row["extra_mb"] / max(16.0, 0.05e-6 * math.prod(row["shape"]) * (2 if row["dtype"] == "bfloat16" else 4))

    exact, large = (WIDE, "Butterworth", "Official"), MAIN[2:]
    bf16 = [at(shape, NARROW)["ms"] / at(shape, NARROW, "bfloat16")["ms"] for shape in large]
    two = [at(s, text)["ms"] / at(s, text, threads=2)["ms"] for s in large for text in (NARROW, WIDE)]
    tight = [row for row in rows if row["response"] in ("HighPass(0.01)", "HighPass(0.02)", NARROW)]
    full = [row for row in single if row["form"] == "full"]

    target("cutoff .05: geometric mean over torch", harness.geometric_mean(every(NARROW)), least=25)
    target("cutoff .05: geometric mean over tuned torch", harness.geometric_mean(every(NARROW, key="ratio_tuned")))
    target("cutoff .05: least", min(every(NARROW)), least=10)
    target("cutoff .01: least", min(every("HighPass(0.01)")), least=15)
    target("cutoff .2: least", min(every("HighPass(0.2)")), least=6)
    target("cutoff .05: most of the floor, larger four", max(at(s, NARROW)["floor_ratio"] for s in MAIN[1:]), most=2.5)
    target("exact forms: geometric mean", harness.geometric_mean(every(*exact)), least=5.5)
    target("exact forms: least", min(every(*exact)), least=3.5)
    target("official mask: least over the released code", min(every("Official", key="released_ratio")), least=40)
    for shape, limit in zip(((50257, 768), (151936, 896), (32000, 4096)), (25, 25, 20), strict=True):
        target(f"{shape[0]}x{shape[1]} at .02", at(shape, "HighPass(0.02)")["ratio"], least=limit)
    target("bf16 over fp32, least", min(bf16), least=1.2)
    target("2 threads over 1, least", min(two), least=1.7)
    target("largest error, fp32", max(row["error"] for row in single), most=5e-7)
    target("memory of its limit, cutoffs to .05", max(map(excess, tight)), most=1)
    target("memory of its limit, full fp32", max(map(excess, full)), most=1)
    half = [excess(at(shape, WIDE, "bfloat16")) for shape in MAIN]
    target("memory of its limit, cutoff .4 in bf16", max(half), most=1)
    target("merge of 8 bf16 models over torch ops", merge["ratio"], least=10)
    target("top 1 % over torch.topk", select["ratio"], least=5)
    for isa, limits in {"avx2": (15.0, 3.3), "baseline": (0.0, 0.0)}.items():
        for text, least in zip((NARROW, WIDE), limits, strict=True):
            chosen = [row for row in shorter if row["isa"] == isa and row["response"] == text]
            mean = harness.geometric_mean([row["torch_ms"] / row["ms"] for row in chosen])
            name = {"avx2": "AVX2", "baseline": "baseline"}[isa]
            target(f"{name}, cutoff {text[10:-1]}, three smaller shapes: geometric mean", mean, least=least)
    return results


def main(out: Path) -> None:
    start, rows = time.perf_counter(), []
    for shape in dict.fromkeys((*MAIN, *OFFICIAL, *VOCABULARY)):
        tuned = spawn("--tuned", shape, TUNED)
        for row in spawn("--shape", shape):
            if row["threads"] == 1:
                row |= {"torch_tuned_ms": tuned, "ratio_tuned": tuned / row["ms"]}
            rows.append(row)
            print(
                f"{shape[0]:6}x{shape[1]:<6}{row['response']:17}{row['dtype']:9} {row['threads']} {row['form']:10}"
                f"{row['ms']:9.2f} ms  torch x{row['ratio']:<6.1f}floor x{row['floor_ratio']:<6.2f}"
                f"error {row.get('error', math.nan):.1e}  extra {row['extra_mb']:.1f} MB, {row['extra_percent']:.1f} %",
                flush=True,
            )
    shorter = [
        row for isa in ("avx2", "baseline") for s in MAIN[:3] for row in spawn("--times", s, {"FREEMERGE_ISA": isa})
    ]
    merge, select = spawn("--merge", (4096, 11008)), spawn("--select", (4096, 11008))
    summary = targets(rows, shorter, merge, select)
    report = {
        "machine": harness.machine(threads=1),
        "seconds": round(time.perf_counter() - start),
        "targets": summary,
        "rows": rows,
        "shorter_instruction_sets": shorter,
        "merge": merge,
        "select": select,
    }
    harness.write(out, report)
    for line in summary:
        print(f"{line['verdict']:16}{line['target']}: {line['measured']:.3g}")


if __name__ == "__main__":
    if sys.argv[1] in MODES:
        torch.set_num_threads(1)
        height, width = json.loads(sys.argv[2])
        print(json.dumps(MODES[sys.argv[1]]((height, width))))
    else:
        main(Path(sys.argv[1]))
