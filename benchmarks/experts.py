"""Speed of all that is done to an expert: accumulate, select, code, switch, route. Each answer is checked, then timed.

    python -m benchmarks.experts benchmarks/results/experts.json [THREADS...]

Times are the least process CPU time of several runs, in milliseconds, on one thread, or on each of the numbers of
threads given; with more than one they are wall time, for a machine that has nothing else to do.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

import freemerge as fm
from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.kernels import accumulate, codec, selection
from benchmarks.models import Encoder, bank_of_experts
from freemerge.experts.values import CODINGS, SparseTensor

CACHE_LINE = 64  # bytes


def sparse_codings() -> list[str]:
    """The codings of an expert's largest entries; what the others hold depends on the models."""
    return [name for name, coding in CODINGS.items() if issubclass(coding, SparseTensor)]


def switching(dtype: torch.dtype, device: str = "cpu", layers: int = 19) -> Row:
    """Eight one-percent experts of a model of 100M parameters, or as many layers, against loading a state dict."""
    clock = harness.cpu_seconds if torch.get_num_threads() == 1 and device == "cpu" else harness.wall_seconds
    bank, model = bank_of_experts(dtype, device, layers)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    names = cycle(bank)

    def switch() -> None:
        """From one expert to another: the last one's undo and the next one's start, as a loop over blocks does."""
        with bank.active(next(names)):
            pass

    with bank.active(name := next(names)):  # what is timed must change the weights to the expert's
        for key, delta in bank[name].dense().items():
            weights = model.get_parameter(key)
            assert not torch.equal(weights, state[key])
            expected = (state[key].double() + delta.to(device, torch.float64)).to(dtype)
            torch.testing.assert_close(weights.data, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    for _ in range(1000):
        switch()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
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
        works = {
            "switch": switch,
            "load_state_dict_of_tensors_in_memory": lambda: reload(state),
            "load_state_dict_of_torch_load": lambda: reload(torch.load(pickled, map_location=device)),
            "load_state_dict_of_safetensors": lambda: reload(load_file(mapped, device)),
        }
        times = harness.least(works, clock, turns=7, budget=5.0)
        times["load_state_dict_of_safetensors_on_disk_wall"] = min(reload_cold(mapped) for _ in range(3))
    ratios = {name.replace("load_state_dict", "ratio_to_load"): times[name] / times["switch"] for name in times}
    del ratios["switch"]
    halves = []
    for _ in range(50):
        block = bank.active(next(names))
        halves.append((clock(block.__enter__), clock(lambda: block.__exit__(None, None, None))))  # noqa: B023
    on, off = (1e3 * min(half) for half in zip(*halves, strict=True))
    parameters = sum(value.numel() for value in state.values())
    expert = bank[next(names)]
    # The least an entry costs is a cache line read and written back, twice; a reload reads and writes every line.
    lines = switched_lines(expert, dtype)
    return {
        "what": "switch",
        "parameters": parameters,
        "entries": expert.entries,
        "lines_touched_percent": 100 * lines / (parameters * dtype.itemsize / CACHE_LINE),
        "switch_on": on,
        "switch_off": off,
        **times,
        **ratios,
    }


def switched_lines(expert: fm.Expert, dtype: torch.dtype) -> int:
    """Cache lines that hold an entry of an expert."""
    per_line = CACHE_LINE // dtype.itemsize
    return sum(torch.unique_consecutive(tensor.indices // per_line).numel() for tensor in expert.tensors.values())


@torch.no_grad()
def routing(count: int, samples: int, tokens: int) -> Row:
    """A batch for several experts: a pass for each mixture of them, switched on, and one pass with deltas."""
    model = Encoder().eval()
    state = model.state_dict()
    tuned = {
        f"t{i}": {name: value + 0.02 * torch.randn_like(value) for name, value in state.items()} for i in range(count)
    }
    bank = fm.ExpertBank(model, fm.extract_experts(state, tuned, rescale=1.0))
    ids = torch.randint(4000, (samples, tokens))
    weights = torch.randn(samples, count).softmax(1)

    def switched(mixtures: Sequence[dict[str, float]]) -> torch.Tensor:
        out = torch.empty(samples, tokens, 8)
        for mixture in {tuple(mixture.items()): mixture for mixture in mixtures}.values():
            rows = torch.tensor([j for j, other in enumerate(mixtures) if other == mixture])
            with bank.active(mixture):
                out[rows] = model(ids[rows])
        return out

    def added(mixtures: Sequence[dict[str, float]]) -> torch.Tensor:
        with bank.deltas(mixtures):
            return model(ids)

    works: dict[str, Callable[[], object]] = {"backbone": lambda: model(ids)}
    top1 = [{name: 1.0} for name, _ in zip(cycle(bank), range(samples), strict=False)]
    soft = [dict(zip(bank, row.tolist(), strict=True)) for row in weights]
    for name, mixtures in {"top1": top1, "soft": soft}.items():
        torch.testing.assert_close(added(mixtures), switched(mixtures), rtol=1e-4, atol=1e-5)
        works[f"{name}_switched"] = partial(switched, mixtures)
        works[f"{name}_deltas"] = partial(added, mixtures)
    clock = harness.cpu_seconds if torch.get_num_threads() == 1 else harness.wall_seconds
    times = harness.least(works, clock, turns=3)
    ratios = {f"{name}_ratio": times[f"{name}_switched"] / times[f"{name}_deltas"] for name in ("top1", "soft")}
    return {"what": "routing", "experts": count, "samples": samples, "tokens": tokens, **times, **ratios}


def main(out: str, *threads: str) -> None:
    rows: list[Row] = []

    def record(row: Row, **about: object) -> None:
        described = {**about, "threads": torch.get_num_threads(), **row}
        rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in described.items()})
        print(json.dumps(rows[-1]), flush=True)

    torch.manual_seed(0)
    torch.set_num_threads(1)
    for values in sparse_codings():
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
        for count, tokens in itertools.product((2, 4, 8), (8, 32, 128)):
            record(routing(count, 16, tokens))
    harness.write(Path(out), {"machine": harness.machine(), "results": rows})


if __name__ == "__main__":
    main(*sys.argv[1:])
