"""Speed of everything an expert goes through: accumulate, select, code, switch. Each answer is checked, then timed.

    python benchmarks/experts.py benchmarks/results/experts.json [THREADS...]

Times are the least process CPU time of several runs, in milliseconds, on one thread, or on each of the numbers of
threads given; with more than one they are wall time, for a machine that has nothing else to do.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import freemerge.experts as fx
from freemerge import _core
from freemerge.accumulate import abs_means, add_round, task_vector_sum
from freemerge.backends.memory import DTYPE_CODES
from freemerge.experts import coding
from freemerge.experts.select import select_largest

Row = dict[str, Any]
CACHE_LINE = 64  # bytes


def now() -> float:
    """Seconds, when the GPU has done what it was told: of this process for one thread, else of the wall."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    return time.process_time() if torch.get_num_threads() == 1 and not on_gpu else time.perf_counter()


def best(work: Callable[[], object], repeats: int = 7) -> float:
    """Least time of several runs, in milliseconds."""
    times = []
    for _ in range(repeats):
        start = now()
        work()
        times.append(now() - start)
    return 1e3 * min(times)


def best_halves(blocks: Iterable[AbstractContextManager[None]]) -> tuple[float, float]:
    """Least time of entering blocks, and of leaving them, in milliseconds."""
    times = []
    for block in blocks:
        start = now()
        with block:
            middle = now()
        times.append((middle - start, now() - middle))
    entering, leaving = zip(*times, strict=True)
    return 1e3 * min(entering), 1e3 * min(leaving)


def accumulate(shape: tuple[int, int], dtype: torch.dtype, count: int) -> Row:
    base = torch.randn(shape).to(dtype)
    models = [(base.float() + 0.01 * torch.randn(shape)).to(dtype) for _ in range(count)]
    weights = [1 / count] * count
    out, means = task_vector_sum(base, models, weights)
    reference, reference_means = task_vector_sum(base, models, weights, backend="torch")
    assert torch.equal(out, reference)
    assert all(abs(a - b) <= 1e-12 * b for a, b in zip(means, reference_means, strict=True))
    merged = add_round(base, out, 0.3, dtype)
    assert torch.equal(merged, add_round(base, out, 0.3, dtype, backend="torch"))
    row = {
        "what": "accumulate",
        "models": count,
        "sum": best(lambda: task_vector_sum(base, models, weights, out=out)),
        "sum_torch": best(lambda: task_vector_sum(base, models, weights, out=out, backend="torch"), 3),
        "means": best(lambda: abs_means(base, models)),
        "means_torch": best(lambda: abs_means(base, models, backend="torch"), 3),
        "add_round": best(lambda: add_round(base, out, 0.3, dtype, out=merged)),
        "add_round_torch": best(lambda: add_round(base, out, 0.3, dtype, out=merged, backend="torch"), 3),
    }
    read = base.numel() * (dtype.itemsize * (count + 1) + out.element_size())
    return {**row, "sum_gb_per_s": read / row["sum"] / 1e6, "sum_ratio": row["sum_torch"] / row["sum"]}


def selection(shape: tuple[int, int], dtype: torch.dtype, density: float = 0.01) -> Row:
    model, base = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    zero = torch.zeros(shape, dtype=dtype)
    k, per_row = int(density * model.numel()), int(density * shape[1])
    ours = select_largest(model, zero, k)
    theirs = model.flatten().abs().topk(k)
    assert torch.equal(ours.values.abs().sort().values, theirs.values.float().sort().values)
    assert select_largest(model, zero, per_row, by_row=True).indices.numel() == per_row * shape[0]
    plain = model.data_ptr(), DTYPE_CODES[dtype], 0, 0  # the kernel on the tensor itself, as torch.topk has it
    threads = torch.get_num_threads()
    row = {
        "what": "select",
        "density": density,
        "select": best(lambda: _core.select_largest(*plain, 1, model.numel(), k, threads)),
        "topk": best(lambda: model.flatten().abs().topk(k), 3),
        "select_by_row": best(lambda: _core.select_largest(*plain, *shape, per_row, threads)),
        "topk_by_row": best(lambda: model.abs().topk(per_row, dim=1), 3),
        "select_delta": best(lambda: select_largest(model, base, k)),
        "topk_delta": best(lambda: (model.float() - base.float()).flatten().abs().topk(k), 3),
    }
    ratios = {
        f"{name}_ratio": row[name.replace("select", "topk")] / row[name] for name in list(row)[2:] if "sel" in name
    }
    return {**row, **ratios}


def codec(values: coding.ValueCoding, density: float = 0.01) -> Row:
    shape = (4096, 11008)
    base, model = torch.zeros(shape), torch.randn(shape)
    expert = fx.extract_experts({"w": base}, {"t": {"w": model}}, density=density, values=values)["t"]
    tensor = expert.tensors["w"]
    count = tensor.indices.numel()
    positions, raw = coding.encode_positions(tensor.indices), coding.values_to_bytes(tensor.coded)
    assert torch.equal(coding.decode_positions(positions, count, tensor.numel), tensor.indices)
    nbytes = positions.data.size + raw.size

    def encode() -> None:
        coding.encode_positions(tensor.indices)
        coding.values_to_bytes(tensor.coded)

    def decode() -> None:
        indices = coding.decode_positions(positions, count, tensor.numel)
        coding.values_from_bytes(values, raw, indices, shape[1])

    encoding, decoding = best(encode, 20), best(decode, 20)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "expert.safetensors"
        saving, loading = best(lambda: expert.save(path, force=True), 20), best(lambda: fx.Expert.load(path), 20)
    return {
        "what": "codec",
        "values": values,
        "bits_per_entry": 8 * nbytes / count,
        "percent_of_bf16": 100 * nbytes / (2 * tensor.numel),
        "encode_mb_per_s": nbytes / encoding / 1e3,
        "decode_mb_per_s": nbytes / decoding / 1e3,
        "save_mb_per_s": nbytes / saving / 1e3,
        "load_mb_per_s": nbytes / loading / 1e3,
    }


def switching(dtype: torch.dtype, device: str = "cpu") -> Row:
    """A 100M-parameter model and eight one-percent experts, against loading a state dict."""
    model = nn.ModuleList(nn.Linear(2304, 2304) for _ in range(19)).to(device, dtype)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = {f"t{i}": {name: value + torch.randn_like(value) for name, value in state.items()} for i in range(8)}
    experts = fx.extract_experts(state, tuned)
    del tuned
    bank = fx.ExpertBank(model, experts)
    names = list(bank)
    for step in range(1000):
        with bank.active(names[step % 8]):
            pass
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    turn = iter(range(10**9))

    def switch() -> None:
        """From one expert to another: the last one's undo and the next one's start, as a loop over blocks does."""
        with bank.active(names[next(turn) % 8]):
            pass

    reload = model.load_state_dict

    def reload_cold(path: Path) -> float:
        """Wall time, in milliseconds, of a reload that the page cache cannot serve."""
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        reload(load_file(path, device))
        return 1e3 * (time.perf_counter() - start)

    with TemporaryDirectory() as folder:
        mapped, pickled = Path(folder) / "state.safetensors", Path(folder) / "state.pt"
        save_file(state, mapped)
        torch.save(state, pickled)
        times = {
            "switch": best(switch, 50),
            "load_state_dict_of_tensors_in_memory": best(lambda: reload(state), 10),
            "load_state_dict_of_torch_load": best(lambda: reload(torch.load(pickled, map_location=device)), 7),
            "load_state_dict_of_safetensors": best(lambda: reload(load_file(mapped, device)), 7),
            "load_state_dict_of_safetensors_on_disk_wall": min(reload_cold(mapped) for _ in range(3)),
        }
    ratios = {name.replace("load_state_dict", "ratio_to_load"): times[name] / times["switch"] for name in times}
    del ratios["switch"]
    on, off = best_halves(bank.active(names[step % 8]) for step in range(50))
    parameters = sum(value.numel() for value in state.values())
    # The least an entry costs is a cache line read and written back, twice; a reload reads and writes every line.
    lines = switched_lines(experts["t0"], dtype)
    return {
        "what": "switch",
        "parameters": parameters,
        "entries": experts["t0"].entries,
        "lines_touched_percent": 100 * lines / (parameters * dtype.itemsize / CACHE_LINE),
        "switch_on": on,
        "switch_off": off,
        **times,
        **ratios,
    }


def switched_lines(expert: fx.Expert, dtype: torch.dtype) -> int:
    """Cache lines that hold an entry of an expert."""
    per_line = CACHE_LINE // dtype.itemsize
    return sum(torch.unique_consecutive(tensor.indices // per_line).numel() for tensor in expert.tensors.values())


def main(out: str, *threads: str) -> None:
    rows: list[Row] = []

    def record(row: Row, **about: object) -> None:
        described = {**about, "threads": torch.get_num_threads(), **row}
        rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in described.items()})
        print(json.dumps(rows[-1]), flush=True)

    torch.manual_seed(0)
    torch.set_num_threads(1)
    for values in coding.VALUE_CODINGS:
        record(codec(values), shape=(4096, 11008))
    for number in threads or ("1",):
        torch.set_num_threads(int(number))
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            for shape in ((768, 768), (4096, 11008)):
                record(selection(shape, dtype), shape=shape, dtype=name)
            for count in (1, 8):
                record(accumulate((4096, 4096), dtype, count), shape=(4096, 4096), dtype=name)
            record(switching(dtype), dtype=name)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    machine = {"processor": cpu_name(), "isa": _core.active_isa(), "torch": torch.__version__, "commit": commit}
    Path(out).write_text(json.dumps({"machine": machine, "results": rows}, indent=1) + "\n", encoding="utf-8")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    main(*sys.argv[1:])
