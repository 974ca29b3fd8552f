"""The rows of benchmarks.compare, and the process that runs them on one source tree, by the public API alone.

python -m benchmarks.suites TREE    reads requests from stdin and answers on stdout, one JSON object a line
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

import freemerge as fm
from benchmarks import harness
from benchmarks.harness import LARGEST, MAIN, PRIMES, VOCABULARY, Case
from benchmarks.models import bank_of_experts, shapes_of, write_models

BLOCKS = 8
Steps = dict[str, Callable[[], object]]


@dataclass
class Job:
    """One row, warm: its steps, what came out the first time, and the comparison of that with float64."""

    steps: Steps
    result: str
    plan: str = ""
    check: Callable[[], object] = lambda: None
    together: bool = False  # a step must not run twice in a row
    parts: dict[str, tuple[str, str]] = field(default_factory=dict)  # differences of two steps


def filter_job(case: Case, folder: Path) -> Job:
    x, response = case.input(), case.mask
    fm.filter_(x, response)
    plan = fm.explain(x, response)
    job = Job({"": harness.filter_call(x, response)}, digest([x]), f"{plan.form} on {plan.backend}")
    job.check = lambda: harness.check(x, case.input(), response)
    return job


def call_job(case: Case, folder: Path) -> Job:
    """A small filter, and its native part alone."""
    job = filter_job(case, folder)
    run = job.steps[""]
    native = native_call(run)
    if native is not None:
        job.steps, job.parts = {"": run, "native": native}, {"python": ("", "native")}
    return job


def native_call(run: Callable[[], object]) -> Callable[[], object] | None:
    """The one call of the native CPU module within a filter, to be repeated by itself; None where there is none."""
    core: Any = sys.modules["freemerge._core"]
    for owner, name in ((getattr(core, "Filter", None), "run"), (core, "filter")):
        original = getattr(owner, name, None)
        if original is None:
            continue
        calls: list[tuple[object, ...]] = []

        def record(*args: object) -> object:
            calls.append(args)  # noqa: B023
            return original(*args)  # noqa: B023

        setattr(owner, name, record)
        try:
            run()
        finally:
            setattr(owner, name, original)
        if len(calls) == 1:
            return partial(original, *calls[0])
    return None


def merge_job(recipe: fm.Recipe, folder: Path) -> Job:
    base, *models = sorted(folder.glob("model-*.safetensors")) or write_models(folder, 5, shapes_of(50))
    out = folder / f"merged-{os.getpid()}.safetensors"

    def run() -> object:
        return fm.merge_checkpoints(base, models, out, recipe, force=True, progress=False)

    run()
    return Job({"": run}, digest([out]))


def extract_job(dtype: str, scope: str, folder: Path) -> Job:
    torch.manual_seed(0)
    base = {f"w{i}": torch.randn(2304, 2304).to(getattr(torch, dtype)) for i in range(4)}
    model = {name: x + torch.randn_like(x) for name, x in base.items()}

    def run() -> dict[str, fm.Expert]:
        return fm.extract_experts(base, {"t": model}, density=0.01, scope=scope, rescale="released")

    path = folder / f"expert-{os.getpid()}.safetensors"
    run()["t"].save(path, force=True)
    return Job({"": run}, digest([path]))


def switch_job(dtype: str, folder: Path) -> Job:
    torch.manual_seed(0)
    bank, model = bank_of_experts(getattr(torch, dtype), layers=8, count=4)
    names, blocks = cycle(bank), []

    def on() -> None:
        blocks.append(bank.active(next(names)))
        blocks[-1].__enter__()

    def off() -> None:
        blocks.pop().__exit__(None, None, None)

    on()
    inside = digest(model.state_dict().values())
    off()
    return Job({"on": on, "off": off}, inside + digest(model.state_dict().values()), together=True)


def digest(results: Iterable[torch.Tensor | Path]) -> str:
    found = hashlib.sha256()
    for result in results:
        if isinstance(result, Path):
            found.update(result.read_bytes())
        else:
            found.update(result.detach().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


NARROW, WIDE = "HighPass(0.05)", "HighPass(0.4)"
FILTERS = [
    *(Case((12, 64, 64), text) for text in (NARROW, WIDE)),
    *(Case(shape, text) for shape in MAIN[:2] for text in (NARROW, WIDE, "Official(0.7)", "Butterworth(0.2)")),
    *(Case(PRIMES[0], text) for text in (NARROW, WIDE)),
    *(Case((3072, 768), text, dtype) for dtype in ("bfloat16", "float64") for text in (NARROW, WIDE)),
    *(Case((48, 768, 768), text) for text in (NARROW, WIDE)),
    *(Case(MAIN[2], text) for text in ("HighPass(0.2)", "Official(0.7)", "Butterworth(0.2)")),
    *(Case(MAIN[2], text, dtype) for dtype in ("float32", "bfloat16") for text in (NARROW, WIDE)),
    *(Case(shape, text) for shape in (VOCABULARY[0], MAIN[3]) for text in (NARROW, WIDE)),
    Case(VOCABULARY[0], "Butterworth(0.1)"),
    Case(MAIN[3], NARROW, "bfloat16"),
    Case(LARGEST, NARROW),
]
CALLS = [*(Case((64, 64), text) for text in (NARROW, WIDE)), *(Case(shape, NARROW) for shape in ((768,), (12, 64, 64)))]
MERGES = {
    "freemerge, no filter": fm.Recipe(weights="uniform", select=(fm.Rule("*", "merge"),), renormalize=None),
    "FR-Merging, uniform, cutoff 0.05": fm.Recipe(fm.HighPass(0.05), weights="uniform"),
    "FR-Merging, uniform, cutoff 0.4": fm.Recipe(fm.HighPass(0.4), weights="uniform"),
    "FR-Merging, default (two passes)": fm.Recipe(),
}
DTYPES = ("float32", "bfloat16")

#: How a worker prepares each row of each suite, given a folder for files.
SUITES: dict[str, dict[str, Callable[[Path], Job]]] = {
    "filter": {str(case): partial(filter_job, case) for case in FILTERS},
    "merge": {name: partial(merge_job, recipe) for name, recipe in MERGES.items()},
    "experts": {
        **{f"extract 1 % by {s}, {d}": partial(extract_job, d, s) for d in DTYPES for s in ("tensor", "row")},
        **{f"switch 1 % of 42M parameters, {dtype}": partial(switch_job, dtype) for dtype in DTYPES},
    },
    "calls": {str(case): partial(call_job, case) for case in CALLS},
}  # fmt: skip


def turn(job: Job, calls: int) -> dict[str, tuple[float, float]]:
    """(CPU, wall) milliseconds of one call of each step: the least of a few blocks of calls, which take turns."""
    blocks = calls if job.together else min(calls, BLOCKS)
    repeats = math.ceil(calls / blocks)
    least = dict.fromkeys(job.steps, (math.inf, math.inf))
    for _ in range(blocks):
        for name, run in job.steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            least[name] = min(least[name], (1e3 * cpu / repeats, 1e3 * wall / repeats))
    for name, (whole, part) in job.parts.items():
        least[name] = (least[whole][0] - least[part][0], least[whole][1] - least[part][1])
    return least


def serve(tree: Path) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    if not Path(os.path.abspath(fm.__file__)).is_relative_to(os.path.abspath(tree)):
        sys.exit(
            f"freemerge is imported from {Path(fm.__file__).parent}, not from {tree}: is it installed as editable?"
        )
    torch.set_num_threads(1)
    job: Job | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "describe":
                answer = {"machine": harness.machine(), "rows": {name: list(rows) for name, rows in SUITES.items()}}
            elif request["do"] == "prepare":
                job = None  # its memory goes before the next one's comes
                job = SUITES[request["suite"]][request["row"]](Path(request["folder"]))
                answer = {"result": job.result, "plan": job.plan}
            elif request["do"] == "check":
                answer = job.check()
            else:
                answer = turn(job, request["calls"])
        except Exception:
            answer = {"failed": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
