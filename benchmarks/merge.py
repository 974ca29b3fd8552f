"""How fast checkpoints merge, beside what any merge must do: read the models and write one.

    python -m benchmarks.merge [--models 4] [--megabytes 250] [--report benchmarks/results/merge.json]

Makes a base and K bf16 models of transformer shapes on disk, then takes turns, one process, all threads: read every
tensor; average the models with torch and safetensors; merge without a filter; FR-Merging at several cutoffs. The best
wall time of each counts; GB/s are of the bytes read in one pass, from a warm page cache.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import freemerge as fm
from benchmarks import harness
from benchmarks.models import write_models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--megabytes", type=int, default=250, help="size of one model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_models(Path(folder), options.models + 1, options.megabytes)
        best = harness.least(jobs(paths, Path(folder) / "merged"), harness.wall_seconds, turns=options.rounds, budget=0)
        size = sum(path.stat().st_size for path in paths)
    rows = [
        {"what": name, "seconds": round(ms / 1e3, 3), "gb_per_s": round(size / ms / 1e6, 2)}
        for name, ms in best.items()
    ]
    print(f"{len(paths)} files, {size / 1e9:.2f} GB, {torch.get_num_threads()} threads")
    for row in rows:
        print(f"{row['what']:<34}{row['seconds']:8.2f} s {row['gb_per_s']:7.2f} GB/s")
    if options.report is not None:
        report = {"machine": harness.machine(), "files": len(paths), "bytes": size, "rows": rows}
        harness.write(options.report, report)


def jobs(paths: list[Path], out: Path) -> dict[str, Callable[[], object]]:
    unfiltered = fm.Recipe(weights="uniform", select=(fm.Rule("*", "merge"),), renormalize=None)

    def merge(recipe: fm.Recipe) -> Callable[[], object]:
        target = out.with_suffix(".safetensors")
        return lambda: fm.merge_checkpoints(paths[0], paths[1:], target, recipe, force=True, progress=False)

    return {
        "read every tensor": lambda: read(paths),
        "average, torch and safetensors": lambda: average(paths[1:], out.with_suffix(".average")),
        "freemerge, no filter": merge(unfiltered),
        "FR-Merging, uniform, cutoff 0.05": merge(fm.Recipe(fm.HighPass(0.05), weights="uniform")),
        "FR-Merging, uniform, cutoff 0.4": merge(fm.Recipe(fm.HighPass(0.4), weights="uniform")),
        "FR-Merging, default (two passes)": merge(fm.Recipe()),
    }


def read(paths: list[Path]) -> float:
    total = 0.0
    for path in paths:
        with safe_open(path, framework="pt") as file:
            total += sum(float(file.get_tensor(name).view(torch.int64).sum()) for name in file.keys())  # noqa: SIM118
    return total


def average(paths: list[Path], out: Path) -> None:
    files = [safe_open(path, framework="pt") for path in paths]
    names = list(files[0].keys())
    merged = {name: torch.stack([f.get_tensor(name).float() for f in files]).mean(dim=0).bfloat16() for name in names}
    save_file(merged, out)


if __name__ == "__main__":
    main()
