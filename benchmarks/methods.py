"""What each merging method costs on one large matrix, beside what it says that it holds in memory.

    python -m benchmarks.methods [--shape 4096 11008] [--models 4] [--method iso_c ...] [--report FILE]

Task vectors are of full rank, then of rank 16 as LoRA adapters have; each answer is checked against the paper's formula
in float64 (tests/formulas.py) on a smaller matrix first. One merge each at scale 1; where "auto" finds the scale from
the weights, ``fm.merge`` takes twice that. Printed are wall and CPU seconds, and how far the resident set grew over the
inputs. With --filter, every method has a high-pass filter before or after it; the formulas know none, so nothing is
checked.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

import freemerge as fm
from benchmarks import harness
from benchmarks.harness import Row
from freemerge.methods import METHODS
from tests import formulas

RANK = 16
SMALL = (264, 690)  # large enough for a range finder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 11008), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--method", nargs="+", choices=sorted(METHODS), default=sorted(METHODS))
    parser.add_argument("--filter", choices=("before", "after"))
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    rows = []
    for kind in ("full", f"rank {RANK}"):
        base, models = inputs(tuple(options.shape), options.models, kind)
        for method in options.method:
            recipe = fm.Recipe(method=method, scale=1.0, filter=None if method == "fr" else options.filter)
            if recipe.filter is None:
                check(method, options.models, kind)
            rows.append({"method": method, "task_vectors": kind, **cost(base, models, recipe)})
            print(
                "{method:<16}{task_vectors:<8}{wall_s:8.1f} s{cpu_s:8.1f} s CPU{peak_gb:7.2f} GB,"
                "{declared_gb:6.2f} GB declared".format(**rows[-1]),
                flush=True,
            )
    if options.report is not None:
        about = {"shape": list(options.shape), "models": options.models, "filter": options.filter}
        harness.write(options.report, {"machine": harness.machine(**about), "rows": rows})


def inputs(shape: tuple[int, ...], count: int, kind: str) -> tuple[Tensor, list[Tensor]]:
    """A base and models: bfloat16 if their task vectors have full rank, else float32, which keeps the rank."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(shape, generator=generator)
    if kind == "full":
        models = [(base + 2e-3 * torch.randn(shape, generator=generator)).bfloat16() for _ in range(count)]
        return base.bfloat16(), models
    updates = (
        torch.randn(shape[0], RANK, generator=generator) @ torch.randn(RANK, shape[1], generator=generator)
        for _ in range(count)
    )
    return base, [base + 5e-4 * update for update in updates]


def cost(base: Tensor, models: list[Tensor], recipe: fm.Recipe) -> Row:
    """Seconds and gigabytes of one merge."""
    seconds: list[float] = []

    def work() -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        fm.merge_tensors(base, models, recipe=recipe)
        seconds.extend((time.perf_counter() - wall, time.process_time() - cpu))

    peak = harness.peak_growth(work)
    matrix = (base.shape[0], base.shape[1]) if recipe.merging.sees_matrices else None
    return {
        "wall_s": seconds[0],
        "cpu_s": seconds[1],
        "peak_gb": peak / 1e9,
        "declared_gb": recipe.merging.holds(len(models), matrix) * base.numel() * 4 / 1e9,
    }


def check(method: str, count: int, kind: str) -> None:
    """Raise unless a smaller merge agrees with the formula; DARE's entries with its expectation."""
    base, models = inputs(SMALL, count, kind)
    options = {"renormalize": None, "weights": "sum"} if method == "fr" else {}
    recipe = fm.Recipe(method=method, scale=1.0, out_dtype="float64", **options)
    merged = fm.merge_tensors(base, models, recipe=recipe).double() - base.double()
    vectors = [(model.float() - base.float()).double() for model in models]
    if method == "dare":
        expected = formulas.total(vectors)
        assert abs(float((merged * expected).sum() / expected.square().sum()) - 1) < 0.05, "dare: the mean is off"
        return
    if method == "fr":
        mask = torch.from_numpy(recipe.response.mask(SMALL))
        expected = torch.fft.ifft2(mask * torch.fft.fft2(formulas.total(vectors))).real
    else:
        expected = formulas.merged(method, {"w": vectors})["w"]
    wrong = (merged - expected).abs() > 1e-4 * expected.abs().max() + 1e-7 * base.abs().max()
    at_thresholds = 2 * (method in ("ties", "pcb", "breadcrumbs"))
    assert int(wrong.sum()) <= at_thresholds, f"{method}: not the formula"


if __name__ == "__main__":
    main()
