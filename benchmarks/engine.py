"""What merging checkpoints costs beyond moving their bytes: wall and CPU seconds, and peak memory.

    python -m benchmarks.engine [--models 4] [--megabytes 1000] [--rounds 3] [--report FILE]
    python -m benchmarks.engine --small 100000     # tensors of 32 bytes, for the cost of a tensor
    python -m benchmarks.engine --again [--mergekit PYTHON]
    python -m benchmarks.engine --methods [--mergekit PYTHON] [--cold]

Makes a base and K bf16 models of Llama shapes, then takes turns, a process for each: copy the same bytes (read all
models, write one) by plain buffered reads and writes, average, merge by FR-Merging with given weights (one pass) and by
default (two passes); with --again also where an earlier merge has hashed the inputs, as when settings are tried, and
with --methods by every other method, too. With --mergekit, the interpreter of an environment that has mergekit 0.1.5,
transformers and this torch, mergekit merges the same files by the methods that it has, and by task arithmetic with our
default filter in torch.fft.

Wall and CPU count from after the imports to the published output, hashes and all (mergekit has none, and does not
flush), from a warm page cache, or with --cold from one that has let go of the inputs. Memory is anonymous memory at its
peak, mapped files not counted. The median over the rounds counts. The best copy is the unit of the ratios.

What is merged linearly is checked against float64 in a matrix and a vector; other methods tensor by tensor against
:func:`freemerge.merge_tensors`, which benchmarks.methods holds to the formulas, or, where they measure the whole model
or are mergekit's, by how well the merged task vector agrees with the sum of the task vectors.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

import freemerge as fm
from benchmarks import harness, mergekit_jobs
from benchmarks.models import write_models
from freemerge.checkpoint import Checkpoint, known_hashes
from freemerge.methods import METHODS

COPY_BYTES = 16 << 20
RECIPES = {
    "average": fm.Recipe(method="average"),
    "FR-Merging, uniform weights": fm.Recipe(weights="uniform"),
    "FR-Merging, default": fm.Recipe(),
}
JOBS = ("copy", *RECIPES)
RECIPES |= {name: fm.Recipe(method=name) for name in METHODS if name not in ("average", "fr")}
AGAIN = ", inputs hashed before"
KNOWN = tuple(name + AGAIN for name in ("average", "FR-Merging, default"))
OWN = (*JOBS, *(name for name in RECIPES if name not in JOBS))
ALL_JOBS = (*OWN, *KNOWN, *mergekit_jobs.METHODS)
RECIPES |= {name: RECIPES[name.removesuffix(AGAIN)] for name in KNOWN}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=4, metavar="K")
    parser.add_argument("--megabytes", type=int, default=1000, help="size of one model")
    parser.add_argument("--small", type=int, default=0, metavar="N", help="N tensors of 32 bytes instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", action="store_true", help="every method, not only those of the engine's own page")
    parser.add_argument("--again", action="store_true", help="also with inputs whose hashes are known (waits a minute)")
    parser.add_argument("--mergekit", metavar="PYTHON", help="an interpreter that has mergekit 0.1.5: its methods, too")
    parser.add_argument("--cold", action="store_true", help="let the system forget the inputs before every job")
    parser.add_argument("--jobs", nargs="+", choices=ALL_JOBS, help="these only")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--run", choices=ALL_JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        print(json.dumps(measured(options.run, options.folder)))
        return
    own = OWN if options.methods else JOBS
    own += KNOWN if options.again else ()
    jobs = options.jobs or [*own, *(mergekit_jobs.METHODS if options.mergekit else ())]
    if options.mergekit is None and any(job in mergekit_jobs.METHODS for job in jobs):
        parser.error("jobs of mergekit need --mergekit PYTHON")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, options.models + 1, shapes_of(options.megabytes, options.small))
        if options.mergekit:
            mergekit_jobs.prepare(folder, inputs(folder))
        if set(jobs) & set(KNOWN):
            know_hashes(folder)
        times: dict[str, list[dict[str, float]]] = {job: [] for job in jobs}
        for _ in range(options.rounds):
            for job in jobs:
                if options.cold:
                    forget(inputs(folder))
                times[job].append(in_own_process(job, folder, options.mergekit))
                print(job, times[job][-1], file=sys.stderr, flush=True)
        size = sum(path.stat().st_size for path in inputs(folder))
    rows = [{"what": job, **summary(runs)} for job, runs in times.items()]
    unit = min((run["wall"] for run in times.get("copy", [])), default=0.0)
    about = harness.machine(load=os.getloadavg(), cold=options.cold)
    print(
        f"{options.models + 1} files, {size / 1e9:.2f} GB in all, {'cold' if options.cold else 'warm'}, "
        f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}\n\n"
        "| | wall s | CPU s | memory MB | x copy |\n|---|---|---|---|---|"
    )
    for row in rows:
        ratio = f"{row['wall'] / unit:.2f}" if unit else ""
        print(f"| {row['what']} | {row['wall']:.2f} | {row['cpu']:.2f} | {row['memory']:.0f} | {ratio} |")
    if options.report is not None:
        harness.write(options.report, {"machine": about, "bytes": size, "models": options.models, "rows": rows})


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    return {field: round(statistics.median(run[field] for run in runs), 3) for field in runs[0]}


def forget(paths: list[Path]) -> None:
    """Let the system drop the pages of files that it has written to the disk."""
    for path in paths:
        with open(path, "rb", buffering=0) as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def know_hashes(folder: Path) -> None:
    """Merge once when the files are old enough for their hashes to be kept."""
    while None in map(known_hashes.key, inputs(folder)):
        time.sleep(1)
    in_own_process(KNOWN[0], folder)
    if len(list((folder / "hashes").glob("freemerge/sha256/*"))) != len(inputs(folder)):
        raise AssertionError("the hashes of the inputs are not known")


def in_own_process(job: str, folder: Path, mergekit: str | None = None) -> dict[str, float]:
    python = mergekit if mergekit and job in mergekit_jobs.METHODS else sys.executable
    command = [python, "-m", "benchmarks.engine", "--run", job, "--folder", str(folder)]
    packages = Path(fm.__file__).parents[1]  # mergekit's environment need not have freemerge
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(packages)])
    environment = {
        **os.environ,
        "OMP_WAIT_POLICY": "passive",  # as the command sets it
        "PYTHONPATH": paths,
        "FREEMERGE_CACHE": str(folder / "hashes") if job in KNOWN else "",
    }
    told = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if told.returncode:
        raise RuntimeError(f"{job}:\n{told.stderr}")
    result: dict[str, float] = json.loads(told.stdout.splitlines()[-1])
    return result


def measured(job: str, folder: Path) -> dict[str, float]:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    with peak_memory() as memory:
        run, verify = prepared(job, folder, out)
        cpu, wall = cpu_seconds(), time.perf_counter()
        run()
        wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    verify()
    return {"wall": wall, "cpu": cpu, "memory": memory[0] / 1e6}


def prepared(job: str, folder: Path, out: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """What does a job, everything imported, and what checks its result."""
    if job == "copy":
        return partial(copy, folder, out), lambda: None
    if job in mergekit_jobs.METHODS:
        mergekit_jobs.load(folder, job)
        return partial(mergekit_jobs.merge, folder, out, job), partial(check_mergekit, folder, out, job)
    import freemerge.merging.run  # noqa: F401  imports are not what is measured

    return partial(merge, folder, out, RECIPES[job]), partial(check, folder, out, RECIPES[job])


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
    """Compare a matrix and a vector with what they should be by the weights and the scale in the manifest."""
    manifest = json.loads((out / "freemerge.json").read_text())
    weights, scale = (manifest["recipe"]["measured"][key] for key in ("weights", "scale"))
    paths = inputs(folder)[: None if count is None else 1 + count]
    method = recipe.merging
    for name, filtered in checked_names(out):
        base, *models = (read(path, name) for path in paths)
        found = read(holder(out, name), name)
        if recipe.method.name in ("average", "task_arithmetic", "fr"):
            response = recipe.response if filtered and recipe.method.name == "fr" else None
            compare(name, found, exactly(base, models, weights or [1.0] * len(models), scale, response))
        elif method.passes:
            agrees(name, found, base, models)
        else:
            expected = fm.merge_tensors(base, models, recipe=dataclasses.replace(recipe, scale=scale), name=name)
            if not torch.equal(found, expected):
                raise AssertionError(f"{name} is not what merge_tensors gives")


def check_mergekit(folder: Path, out: Path, job: str) -> None:
    """The same for what mergekit wrote."""
    method, parameters = mergekit_jobs.METHODS[job]
    for name, filtered in checked_names(out):
        base, *models = (read(path, name) for path in inputs(folder))
        found = read(holder(out, name), name)
        if "density" in parameters:
            agrees(name, found, base, models)
        else:
            weights = [parameters["weight"]] * len(models)
            response = fm.Recipe().response if filtered and method == mergekit_jobs.FILTERED else None
            compare(name, found, exactly(base, models, weights, 1.0, response))


def checked_names(out: Path) -> Iterator[tuple[str, bool]]:
    """A matrix and a vector of a merged model, and whether it is the matrix."""
    shapes = Checkpoint.open(out).specs
    for sides in (2, 1):
        names = [name for name, spec in shapes.items() if len(spec.shape) == sides]
        if names:
            yield min(names, key=lambda name: (shapes[name].numel, name)), sides == 2


def exactly(
    base: Tensor, models: list[Tensor], weights: list[float], scale: float, response: fm.Response | None
) -> Tensor:
    """``base + scale * sum_i weights[i] * (models[i] - base)`` in float64, the sum filtered, and its norm restored."""
    total = torch.zeros(base.shape, dtype=torch.float64)
    for weight, model in zip(weights, models, strict=True):
        total += weight * (model.double() - base.double())
    if response is not None:
        filtered = harness.torch_fft(total, response)(total)
        total = filtered * (total.norm() / filtered.norm())
    return base.double() + scale * total


def compare(name: str, found: Tensor, exact: Tensor) -> None:
    error = float((found.double() - exact).norm() / exact.norm())
    if not error < 3e-3:  # bf16 keeps 8 bits
        raise AssertionError(f"relative error {error:.1e} of {name}")


def agrees(name: str, found: Tensor, base: Tensor, models: list[Tensor]) -> None:
    merged = found.double() - base.double()
    total = sum(model.double() - base.double() for model in models)
    cosine = float((merged * total).sum() / (merged.norm() * total.norm()))
    if not cosine > 0.2:  # of entries that were dropped at random, or for their signs, much is left
        raise AssertionError(f"cosine {cosine:.2f} of {name} with the sum of the task vectors")


# Models ---------------------------------------------------------------------------------------------------------------


def inputs(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
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


if __name__ == "__main__":
    main()
