"""What merging checkpoints costs beyond moving their bytes: wall and CPU seconds, and peak memory.

    python -m benchmarks.engine [--models 4] [--megabytes 1000] [--rounds 3] [--report FILE]
    python -m benchmarks.engine --small 100000     # tensors of 32 bytes, for the cost of a tensor

Makes a base and K bf16 models of Llama shapes, then takes turns, a process for each: copy the same bytes (read all
models, write one) by plain buffered reads and writes, average, merge by FR-Merging with given weights (one pass) and by
default (two passes). Wall and CPU count from after the imports to the published output, hashes and all, from a warm
page cache; memory is anonymous memory at its peak, mapped files not counted. The median over the rounds counts. Merged
values are checked against float64, and the best copy is the unit of the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import freemerge as fm
from benchmarks import harness

COPY_BYTES = 16 << 20
RECIPES = {
    "average": fm.Recipe(method="average"),
    "FR-Merging, uniform weights": fm.Recipe(weights="uniform"),
    "FR-Merging, default": fm.Recipe(),
}
JOBS = ("copy", *RECIPES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=4, metavar="K")
    parser.add_argument("--megabytes", type=int, default=1000, help="size of one model")
    parser.add_argument("--small", type=int, default=0, metavar="N", help="N tensors of 32 bytes instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", nargs="+", default=JOBS, choices=JOBS)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--run", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        print(json.dumps(measured(options.run, options.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, options.models + 1, shapes_of(options.megabytes, options.small))
        times: dict[str, list[dict[str, float]]] = {job: [] for job in options.jobs}
        for _ in range(options.rounds):
            for job in options.jobs:
                times[job].append(in_own_process(job, folder))
        size = sum(path.stat().st_size for path in inputs(folder))
    rows = [{"what": job, **summary(runs)} for job, runs in times.items()]
    unit = min((run["wall"] for run in times.get("copy", [])), default=0.0)
    print(f"{options.models + 1} files, {size / 1e9:.2f} GB in all, {os.cpu_count()} processors")
    for row in rows:
        ratio = f"{row['wall'] / unit:6.2f} x copy" if unit else ""
        print(f"{row['what']:<28} {row['wall']:8.2f} s {row['cpu']:8.2f} s CPU {row['memory']:6.0f} MB {ratio}")
    if options.report is not None:
        about = harness.machine(load=os.getloadavg())
        harness.write(options.report, {"machine": about, "bytes": size, "models": options.models, "rows": rows})


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    return {field: round(statistics.median(run[field] for run in runs), 3) for field in runs[0]}


def in_own_process(job: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.engine", "--run", job, "--folder", str(folder)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # as the command sets it
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    result: dict[str, float] = json.loads(told.stdout)
    return result


def measured(job: str, folder: Path) -> dict[str, float]:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    work = (lambda: copy(folder, out)) if job == "copy" else (lambda: merge(folder, out, RECIPES[job]))
    if job != "copy":
        import freemerge.merging.run  # noqa: F401  imports are not what is measured
    with peak_memory() as memory:
        cpu, wall = cpu_seconds(), time.perf_counter()
        work()
        wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    if job != "copy":
        check(folder, out, RECIPES[job])
    return {"wall": wall, "cpu": cpu, "memory": memory[0] / 1e6}


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The largest anonymous memory of the process, seen every 5 ms."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            status = Path("/proc/self/status").read_text().splitlines()
            peak[0] = max(peak[0], *(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon")))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


# Jobs -----------------------------------------------------------------------------------------------------------------


def copy(folder: Path, out: Path) -> None:
    """Read every model and write as many bytes as one has, which reach the disk as those of a merge do."""
    buffer = memoryview(bytearray(COPY_BYTES))
    out.mkdir()
    with open(out / "copy", "wb", buffering=0) as target:
        for index, path in enumerate(inputs(folder)):
            with open(path, "rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    if index == 0:
                        target.write(buffer[:count])
        os.fsync(target.fileno())


def merge(folder: Path, out: Path, recipe: fm.Recipe) -> None:
    base, *models = inputs(folder)
    fm.merge_checkpoints(base, models, out, recipe, progress=False)


def check(folder: Path, out: Path, recipe: fm.Recipe, count: int | None = None) -> None:
    """Compare a matrix and a vector with float64, with the weights and the scale that the manifest names."""
    manifest = json.loads((out / "freemerge.json").read_text())
    measured = manifest["recipe"]["measured"]
    tensors = manifest["tensors"]
    names = [
        min((n for n, t in tensors.items() if t["action"] == action), default=None) for action in ("filter", "merge")
    ]
    for name in filter(None, names):
        base, *models = (read(path, name).double() for path in inputs(folder)[: None if count is None else 1 + count])
        total = sum(w * (model - base) for w, model in zip(measured["weights"], models, strict=True))
        filtered = total
        if tensors[name]["action"] == "filter":
            filtered = harness.torch_fft(total, recipe.response)(total)
            filtered = filtered * (total.norm() / filtered.norm())
        exact = base + measured["scale"] * filtered
        found = read(holder(out, name), name).double()
        error = float((found - exact).norm() / exact.norm())
        if not error < 3e-3:  # bf16 keeps 8 bits
            raise AssertionError(f"relative error {error:.1e} of {name}")


# Models ---------------------------------------------------------------------------------------------------------------


def inputs(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def holder(out: Path, name: str) -> Path:
    """The file of an output that holds a tensor."""
    index = out / "model.safetensors.index.json"
    return out / (json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors")


def shapes_of(megabytes: int, small: int = 0, width: int = 0) -> dict[str, tuple[int, ...]]:
    if small:
        return {f"layers.{i}.norm.weight": (16,) for i in range(small)}
    width = width or (1024 if megabytes < 800 else 2048)
    hidden, heads = 11 * width // 4, width // 4
    layer = {
        "self_attn.q_proj.weight": (width, width),
        "self_attn.k_proj.weight": (heads, width),
        "self_attn.v_proj.weight": (heads, width),
        "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (hidden, width),
        "mlp.up_proj.weight": (hidden, width),
        "mlp.down_proj.weight": (width, hidden),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    ends = {"model.embed_tokens.weight": (16 * width, width), "lm_head.weight": (16 * width, width)}
    left = megabytes * 1_000_000 // 2 - sum(torch.Size(shape).numel() for shape in ends.values())
    layers = max(1, left // sum(torch.Size(shape).numel() for shape in layer.values()))
    inner = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    return {**ends, **inner, "model.norm.weight": (width,)}


def write_models(folder: Path, count: int, shapes: dict[str, tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        state = {}
        for number, (name, shape) in enumerate(shapes.items()):
            base = 0.02 * torch.randn(shape, generator=generator.manual_seed(number))
            if index:
                base += 2e-3 * torch.randn(shape, generator=generator.manual_seed(index * 1_000_000 + number))
            state[name] = base.bfloat16()
        save_file(state, folder / f"model-{index}.safetensors")


if __name__ == "__main__":
    main()
