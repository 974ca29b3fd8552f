"""The CUDA backend against torch.fft on a GPU: checked first, then timed. Run by gpu_suite.sh, part by part.

Times are medians over inputs that rotate through more memory than the L2 holds: of a call, with what the host does, and
of a replayed CUDA graph. Each case is measured by the plan that "auto" takes, by the full form in three kernels, both
prepared beforehand, and by the public call.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import cycle
from pathlib import Path

import torch

import freemerge as fm
from benchmarks import gpu_sweep, harness
from benchmarks.experts import switching
from benchmarks.harness import LLAMA, PRIMES, VIT, VOCABULARY, Case, Row
from benchmarks.kernels import one_tensor
from freemerge.backends.cuda import CudaBackend
from freemerge.backends.registry import named
from freemerge.planner.plan import Plan

RESULT = Path("benchmarks/results/gpu.json")
SHAPES = [*LLAMA, *VIT, (48, 768, 768), *VOCABULARY, *PRIMES]  # the most important first
RESPONSES = {
    "HighPass(0.4)": ("float32", "bfloat16"),
    "HighPass(0.05)": ("float32", "bfloat16"),
    "Butterworth(0.1)": ("float32",),
    "Official(0.7)": ("float32",),
    "HighPass(0.2)": ("float32",),
}
FORCED = {((14336, 4096), "HighPass(0.4)"): "decimated"}  # a form that "auto" passes over, to fit its costs
DTYPES = ("float32", "bfloat16")
ARITHMETIC = 1e-6  # relative error of the kernels

Run = Callable[[torch.Tensor], object]


def cases() -> list[Case]:
    """By importance: a budget that is too short leaves out the last."""
    return [
        Case(shape, response, dtype) for response, dtypes in RESPONSES.items() for dtype in dtypes for shape in SHAPES
    ]


def rotation(case: Case) -> list[torch.Tensor]:
    """Copies of one input that together are four times the L2, at least two, at most sixty-four."""
    x = case.input("cuda")
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return [x, *(x.clone() for _ in range(min(63, max(1, 4 * l2 // x.nbytes))))]


def measured_plans(backend: CudaBackend, case: Case, device: str = "cuda") -> dict[str, Plan]:
    """The plan of "auto", that in three kernels, and one that is to be forced, as far as they differ."""
    found = gpu_sweep.plans(backend, case, device)
    forced = FORCED.get((case.shape, case.response))
    wanted = [("auto", found[0])]
    wanted += [
        ("three_kernels" if plan.tiles else plan.form, plan) for plan in found[1:] if plan.tiles or plan.form == forced
    ]
    return dict(wanted)


def runs(backend: CudaBackend, case: Case, plans: Mapping[str, Plan]) -> dict[str, Run]:
    """What runs each plan, and "call", the function of the package with all that a call of it costs."""
    scale = harness.steady_scale(case.mask)

    def by_plan(plan: Plan) -> Run:
        executable = backend.executable(plan)
        return lambda t: executable.run([t if t.ndim == 3 else t[None]], scale)

    call: Run = lambda t: fm.filter_(t, case.mask, scale=scale, backend="cuda")  # noqa: E731
    return {name: by_plan(plan) for name, plan in plans.items()} | {"call": call}


def graph_ms(run: Run, inputs: list[torch.Tensor]) -> float:
    """Milliseconds of a call within a replayed graph of one for each input."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for t in inputs:
            run(t)
    return harness.gpu_median({"graph": graph.replay})["graph"] / len(inputs)


def measure(backend: CudaBackend, case: Case) -> Row:
    inputs, response = rotation(case), case.mask
    x, plans = inputs[0], measured_plans(backend, case)
    ours, in_torch = runs(backend, case, plans), harness.torch_fft(x, response)
    scale = harness.steady_scale(response)
    errors = {}
    for name, run in ours.items():
        y = x.clone()
        run(y)
        errors[name] = harness.check(y / scale, x, response, ARITHMETIC)["error"]

    def rotating(run: Run) -> Callable[[], object]:
        following = cycle(inputs)
        return lambda: run(next(following))

    floor: Run = lambda t: t.mul_(1.0009765625)  # noqa: E731
    works = {**ours, "floor": floor, "torch": in_torch}
    times = harness.gpu_median({name: rotating(run) for name, run in works.items()})
    forms = {
        name: {
            "form": plan.form, "tiles": vars(plan.tiles) if plan.tiles else None, "ms": times[name],
            "graph_ms": graph_ms(ours[name], inputs), "error": errors[name], "promised_bytes": plan.workspace_bytes,
            "extra_bytes": harness.peak_growth(lambda run=ours[name]: run(x), "cuda"),  # type: ignore[misc]
        }
        for name, plan in plans.items()
    }  # fmt: skip
    return {
        "shape": list(case.shape), "dtype": case.dtype, "response": repr(response), "plans": forms,
        "call_ms": times["call"], "torch_ms": times["torch"], "torch_graph_ms": graph_ms(in_torch, inputs),
        "floor_ms": times["floor"], "floor_graph_ms": graph_ms(floor, inputs),
        "torch_extra_bytes": harness.peak_growth(lambda: in_torch(x), "cuda"),
    }  # fmt: skip


def table(backend: CudaBackend, budget: float) -> dict[str, object]:
    """Rows of all cases, and the cases for which the budget in seconds was too short."""
    end, rows, left_out = time.monotonic() + budget, [], []
    for case in cases():
        if time.monotonic() > end:
            left_out.append(str(case))
        else:
            rows.append(measure(backend, case))
            torch.cuda.empty_cache()
    merges = [one_tensor((4096, 11008), fm.HighPass(c), "cuda", harness.gpu_median) for c in (0.05, 0.4)]
    switches = [{"dtype": dtype, **switching(getattr(torch, dtype), "cuda")} for dtype in DTYPES]
    return {"results": rows, "left_out": left_out, "merge": merges, "switch": switches}


def exercise(shapes: Iterable[tuple[int, ...]], responses: Iterable[str]) -> None:
    """Every plan of the backend once, for compute-sanitizer and profilers; a merge too."""
    backend = cuda()
    for case in (Case(shape, response, dtype) for shape in shapes for response in responses for dtype in DTYPES):
        x = case.input("cuda")
        for plan in gpu_sweep.plans(backend, case, "cuda"):
            backend.executable(plan).run([x if x.ndim == 3 else x[None]], 1.0)
    base, model = (torch.randn(300, 200, device="cuda") for _ in range(2))
    fm.merge({"w": base}, [{"w": model}], fm.Recipe(fm.HighPass(0.3), out_dtype="bfloat16"), backend="cuda")
    torch.cuda.synchronize()


def cuda() -> CudaBackend:
    backend = named("cuda")
    assert isinstance(backend, CudaBackend)
    return backend


def machine() -> Row:
    gpu = torch.cuda.get_device_properties(0)
    return harness.machine(
        gpu=gpu.name, memory_bytes=gpu.total_memory, multiprocessors=gpu.multi_processor_count, cuda=torch.version.cuda
    )


def markdown(rows: Iterable[Row]) -> str:
    lines = [
        "| shape | dtype | response | plan | public | us | graph | x torch | graph | x scale | MB (torch) | off |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        for name, plan in row["plans"].items():
            call = f"{1e3 * row['call_ms']:.0f}" if name == "auto" else ""
            lines.append(
                f"| {shape} | {row['dtype']} | {row['response']} | {name}: {plan['form']} "
                f"| {call} | {1e3 * plan['ms']:.0f} "
                f"| {1e3 * plan['graph_ms']:.0f} | {row['torch_ms'] / plan['ms']:.2f} "
                f"| {row['torch_graph_ms'] / plan['graph_ms']:.2f} | {plan['graph_ms'] / row['floor_graph_ms']:.1f} "
                f"| {plan['extra_bytes'] / 1e6:.1f} ({row['torch_extra_bytes'] / 1e6:.0f}) | {plan['error']:.0e} |"
            )
    return "\n".join(lines)


def record(out: Path, found: Mapping[str, object]) -> None:
    """Adds parts to a result of the same commit, or starts a new one."""
    here = machine()
    before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    same = before.get("machine", {}).get("commit") == here.get("commit")
    harness.write(out, {**(before if same else {}), "machine": here, **found})
    print(f"written to {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["sweep", "table", "sanitize", "profile"])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--budget", type=float, default=150.0, help="seconds after which nothing new is begun")
    options = parser.parse_args()
    info = fm.backends()["cuda"]
    if not info.available:
        sys.exit(f"no CUDA backend: {info.reason}")
    if options.part == "sanitize":
        exercise(
            [(128, 200), (97, 101), (3, 40, 48), (64, 86)], [fm.HighPass(0.05), fm.HighPass(0.3), fm.Butterworth(0.1)]
        )
    elif options.part == "profile":
        exercise([(4096, 4096), (4096, 11008)], ["HighPass(0.4)", "HighPass(0.05)"])
    elif options.part == "sweep":
        found = gpu_sweep.sweep(cuda(), options.budget)
        record(options.out, {"sweep": found})
    else:
        found = table(cuda(), options.budget)
        record(options.out, found)
        print(markdown(found["results"]))  # type: ignore[arg-type]
        print("", *(json.dumps(row) for row in (*found["merge"], *found["switch"])), sep="\n")  # type: ignore[misc]
        print(f"left out: {found['left_out']}")


if __name__ == "__main__":
    main()
