"""What a merge takes as models grow, with more of them and with more workers, and on paper for large ones.

    python -m benchmarks.capacity [--megabytes 500 1000 2000] [--models 2 4 8] [--workers 1 2 4] [--report FILE]

Makes bf16 models of Llama shapes and merges them by the default recipe, under torchrun where there are several workers:
every size with 4 models, every number of models and of workers with the middle size. Each result is checked against
float64 before it counts, and has the same bytes for every number of workers. Wall time is from when all workers are
there to the published output, from a warm page cache; memory is a worker's anonymous memory at its peak. Then models of
the largest size are merged in a memory cgroup of a quarter of one model, page cache and all, where the machine lets one
make it. Prints the tables of docs/capacity.md; what is on paper follows from a line through the sizes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import freemerge as fm
from benchmarks import engine, harness
from freemerge.workers import joined

RECIPE = fm.Recipe()
FILES = 8  # of an output, to be shared out
COUNT = 4  # models, where their number is not what is measured
WIDTH = 1024
LARGE = {  # bytes in bf16, and entries of the largest tensor, the embeddings
    "8B": (16.06e9, 128256 * 4096),
    "70B": (141.1e9, 128256 * 8192),
    "405B": (811.7e9, 128256 * 16384),
}
CGROUPS = (  # of version 1 and 2: folder, limit, peak
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    ("/sys/fs/cgroup", "memory.max", "memory.peak"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[500, 1000, 2000], help="sizes of one model")
    parser.add_argument("--models", type=int, nargs="+", default=[2, 4, 8], metavar="K")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--job", nargs=2, metavar=("FOLDER", "K"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        work(Path(options.job[0]), int(options.job[1]))
        return
    sizes, middle = sorted(options.megabytes), sorted(options.megabytes)[len(options.megabytes) // 2]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in sizes:
            count = max(options.models) if size == middle else COUNT
            engine.write_models(folder, 1 + count, engine.shapes_of(size, width=WIDTH))
            cases = [(COUNT, 1)]
            if size == middle:
                cases += [(models, 1) for models in options.models if models != COUNT]
                cases += [(COUNT, workers) for workers in options.workers if workers != 1]
            rows += [measured(folder, size, *case) for case in cases]
        limited = in_a_quarter(folder, sizes[-1])
    tell(rows, limited)
    if options.report is not None:
        about = harness.machine(load=os.getloadavg())
        harness.write(options.report, {"machine": about, "rows": rows, "limited": limited})


def measured(folder: Path, megabytes: int, models: int, workers: int) -> dict[str, float]:
    """The better of two runs."""
    runs = []
    for _ in range(2):
        command = [sys.executable, "-m"]
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", "-m"] if workers > 1 else []
        runs.append(launch([*command, "benchmarks.capacity", "--job", str(folder), str(models)], workers))
        check(folder, models)
    best: dict[str, float] = min(runs, key=lambda run: run["wall"])
    return {"megabytes": megabytes, "models": models, "workers": workers, **best}


def launch(command: list[str], workers: int = 1) -> dict[str, float]:
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "FREEMERGE_CACHE": "", "OMP_NUM_THREADS": threads}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {run.returncode}: {run.stderr[-2000:]}")
    result: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return result


def work(folder: Path, models: int) -> None:
    """One merge by this worker and the others; the first one prints what it took."""
    import freemerge.merging.run  # noqa: F401  imports are not what is measured

    out = folder / "out"
    base, *others = engine.inputs(folder)[: 1 + models]
    with joined() as workers:
        if workers.rank == 0:
            shutil.rmtree(out, ignore_errors=True)
        workers.gather(None)
        begin, cpu = time.perf_counter(), engine.cpu_seconds()
        with engine.peak_memory() as peak:
            fm.merge_checkpoints(
                base, others, out, RECIPE, progress=False, workers=workers,
                max_shard_bytes=base.stat().st_size // FILES,
            )  # fmt: skip
        took = workers.gather((time.perf_counter() - begin, engine.cpu_seconds() - cpu, peak[0]))
    if workers.rank == 0:
        walls, cpus, peaks = zip(*took, strict=True)
        print(json.dumps({"wall": max(walls), "cpu": sum(cpus), "memory": max(peaks) / 1e6}))


def check(folder: Path, models: int) -> None:
    """The values are right, and the bytes those of earlier runs with the same inputs; the manifest has their hashes."""
    engine.check(folder, folder / "out", RECIPE, models)
    digest = hashlib.sha256((folder / "out" / "freemerge.json").read_bytes()).hexdigest()
    expected = folder / f"digest-{engine.inputs(folder)[0].stat().st_size}-{models}"
    if expected.exists() and expected.read_text() != digest:
        raise AssertionError("another number of workers gave other bytes")
    expected.write_text(digest)


def in_a_quarter(folder: Path, megabytes: int) -> dict[str, float] | None:
    """Two models in a memory cgroup of a quarter of the base's bytes; None where none can be made, or that is less than
    is promised to do."""
    limit = engine.inputs(folder)[0].stat().st_size // 4
    if limit < promised(16 * WIDTH * WIDTH):
        return None
    with cgroup(limit) as group:
        if group is None:
            return None
        procs, peak = group
        command = ["sh", "-c", f'echo $$ > {procs}; exec "$0" "$@"', sys.executable, "-m", "benchmarks.capacity"]
        took = launch([*command, "--job", str(folder), "2"])
        check(folder, 2)
        return {"megabytes": megabytes, "limit": limit / 1e6, **took, "cgroup": int(peak.read_text()) / 1e6}


@contextmanager
def cgroup(limit: int) -> Iterator[tuple[Path, Path] | None]:
    """A group with a limit of memory: the file that takes processes, and the one that tells the peak."""
    for folder, limiting, telling in CGROUPS:
        group = Path(folder) / f"freemerge-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limiting).write_text(str(limit))
            made = (group / "cgroup.procs", group / telling)
        except OSError:
            made = None
        try:
            if made is not None:
                yield made
                return
        finally:
            group.rmdir()
    yield None


def tell(rows: list[dict[str, float]], limited: dict[str, float] | None) -> None:
    """The tables, in markdown."""
    print("| model | K | workers | wall | CPU | memory of a worker | GB/s |\n|---|---|---|---|---|---|---|")
    for row in rows:
        rate = moved(row["megabytes"] / 1000, row["models"]) / row["wall"]
        print(
            f"| {row['megabytes'] / 1000:g} GB | {row['models']} | {row['workers']} | {row['wall']:.1f} s "
            f"| {row['cpu']:.1f} s | {row['memory']:.0f} MB | {rate:.2f} |"
        )
    if limited is not None:
        print(
            f"\nIn a memory cgroup of {limited['limit']:.0f} MB, page cache included, two models of "
            f"{limited['megabytes'] / 1000:g} GB merged in {limited['wall']:.1f} s; "
            f"{limited['memory']:.0f} MB of it were the process's own."
        )
    line = [row for row in rows if row["models"] == COUNT and row["workers"] == 1]
    xs = [moved(row["megabytes"] / 1000, COUNT) for row in line]
    slope, start = np.polyfit(xs, [row["wall"] for row in line], 1) if len(line) > 1 else (line[0]["wall"] / xs[0], 0.0)
    print(f"\nOn paper: {max(0.0, start):.1f} s and {slope:.2f} s for each GB of inputs and output.\n")
    print("| model | K | bytes moved | 1 worker | 8 workers | 64 workers | memory of a worker |")
    print("|---|---|---|---|---|---|---|")
    for name, (nbytes, largest) in LARGE.items():
        gigabytes = moved(nbytes / 1e9, COUNT)
        times = " | ".join(duration(max(0.0, start) + slope * gigabytes / workers) for workers in (1, 8, 64))
        print(f"| {name} | {COUNT} | {gigabytes / 1000:.2f} TB | {times} | {promised(largest) / 1e9:.1f} GB |")


def promised(largest: int) -> float:
    """Bytes that a worker takes at most, beside the system's cache, with a largest tensor of so many entries."""
    return 3 * 4 * largest + 300e6


def moved(gigabytes: float, models: float) -> float:
    """Inputs and output, in GB."""
    return gigabytes * (models + 2)


def duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


if __name__ == "__main__":
    main()
