"""Operations below the public API: accumulate, select, code, merge one tensor. Each answer is checked, then timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import freemerge as fm
from benchmarks import harness
from benchmarks.harness import Row
from freemerge.accumulate import abs_means, add_round, filtered_sum, finished, task_vector_sum
from freemerge.experts.payload import Reader
from freemerge.experts.select import select_largest
from freemerge.experts.values import CODINGS

Works = dict[str, Callable[[], object]]


def timed(works: Works) -> dict[str, float]:
    """Least milliseconds of each work: CPU time on one thread, else wall time."""
    clock = harness.cpu_seconds if torch.get_num_threads() == 1 else harness.wall_seconds
    return harness.least(works, clock, turns=3)


def accumulate(shape: tuple[int, int], dtype: torch.dtype, count: int) -> Row:
    base = torch.randn(shape).to(dtype)
    models = [(base.float() + 0.01 * torch.randn(shape)).to(dtype) for _ in range(count)]
    weights = [1 / count] * count
    out, means = task_vector_sum(base, models, weights)
    reference, reference_means = task_vector_sum(base, models, weights, backend="torch")
    assert torch.equal(out, reference)
    for found in (means, abs_means(base, models)):
        assert all(abs(a - b) <= 1e-12 * b for a, b in zip(found, reference_means, strict=True))
    merged = add_round(base, out, 0.3, dtype)
    assert torch.equal(merged, add_round(base, out, 0.3, dtype, backend="torch"))

    def works(backend: str, suffix: str) -> Works:
        return {
            f"sum{suffix}": lambda: task_vector_sum(base, models, weights, out=out, backend=backend),
            f"means{suffix}": lambda: abs_means(base, models, backend=backend),
            f"add_round{suffix}": lambda: add_round(base, out, 0.3, dtype, out=merged, backend=backend),
        }

    times = timed(works("auto", "") | works("torch", "_torch"))
    read = base.numel() * (dtype.itemsize * (count + 1) + out.element_size())
    ratio = times["sum_torch"] / times["sum"]
    return {
        "what": "accumulate",
        "models": count,
        **times,
        "sum_gb_per_s": read / times["sum"] / 1e6,
        "sum_ratio": ratio,
    }


def selection(shape: tuple[int, int], dtype: torch.dtype, density: float = 0.01) -> Row:
    model, base = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    k, per_row = int(density * model.numel()), int(density * shape[1])
    delta = (model.float() - base.float()).abs()
    ours = select_largest(model, base, k).values.abs()
    assert torch.equal(ours.sort().values, delta.flatten().topk(k).values.sort().values)
    ours = select_largest(model, base, per_row, by_row=True).values.abs().view(shape[0], per_row)
    assert torch.equal(ours.sort(dim=1).values, delta.topk(per_row, dim=1).values.sort(dim=1).values)
    del delta, ours
    times = timed(
        {
            "select": lambda: select_largest(model, base, k),
            "topk": lambda: (model.float() - base.float()).flatten().abs().topk(k),
            "topk_without_base": lambda: model.flatten().abs().topk(k),
            "select_by_row": lambda: select_largest(model, base, per_row, by_row=True),
            "topk_by_row": lambda: (model.float() - base.float()).abs().topk(per_row, dim=1),
        }
    )
    ratios = {
        f"{name}_ratio": times[name.replace("select", "topk")] / times[name] for name in times if "select" in name
    }
    return {"what": "select", "density": density, "count": k, **times, **ratios}


def codec(values: str, density: float = 0.01, shape: tuple[int, int] = (4096, 11008)) -> Row:
    base, model = torch.zeros(shape), torch.randn(shape)
    expert = fm.extract_experts({"w": base}, {"t": {"w": model}}, density=density, values=values)["t"]
    tensor = expert.tensors["w"]
    count, raw = tensor.entries, tensor.to_bytes()
    assert torch.equal(CODINGS[values].from_bytes(shape, Reader(raw)).dense(), tensor.dense())
    nbytes = raw.size
    with TemporaryDirectory() as folder:
        path = Path(folder) / "expert.safetensors"
        works: Works = {
            "encode": tensor.to_bytes,
            "decode": lambda: CODINGS[values].from_bytes(shape, Reader(raw)),
            "save": lambda: expert.save(path, force=True),
            "load": lambda: fm.Expert.load(path),
        }
        times = timed(works)
    return {
        "what": "codec",
        "values": values,
        "bits_per_entry": 8 * nbytes / count,
        "percent_of_bf16": 100 * nbytes / (2 * tensor.numel),
        **{f"{name}_mb_per_s": nbytes / ms / 1e3 for name, ms in times.items()},
    }


def one_tensor(
    shape: tuple[int, int],
    response: fm.Response = fm.HighPass(0.05),  # noqa: B008
    device: str = "cpu",
    timed: Callable[[Works], dict[str, float]] = harness.least,
) -> Row:
    """The merge of one tensor of eight models, all in bfloat16, beside the same in torch ops."""
    generator = torch.Generator(device).manual_seed(0)
    base, *models = (torch.randn(shape, generator=generator, device=device) for _ in range(9))
    base = base.mul_(0.02).bfloat16()
    models = [model.mul_(0.002).add_(base).bfloat16() for model in models]
    weights, scale = [1 / len(models)] * len(models), 0.4 * len(models)

    def ours() -> torch.Tensor:
        delta, _, norms = filtered_sum(base, models, weights, response)
        if norms is None:
            fm.filter_(finished(delta), response)
        return add_round(base, delta, scale, torch.bfloat16)

    def summed(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        wide, delta = base.to(dtype), torch.zeros(shape, dtype=dtype, device=device)
        for model, weight in zip(models, weights, strict=True):
            delta.add_(model.to(dtype) - wide, alpha=weight)
        return wide, delta

    wide, delta = summed(torch.float64)
    exact = wide + scale * harness.torch_fft(delta, response)(delta)
    found = ours()
    wrong = float((found != exact.bfloat16()).double().mean())  # where float32 falls on the other side of a tie
    if wrong > 1e-3 or float((found.double() - exact).abs().max() / exact.abs().max()) > 2**-8:
        raise AssertionError(f"merge: {wrong:.1e} of the entries are not the rounded float64 result")
    del wide, delta, exact, found
    filtered = harness.torch_fft(base.float(), response, in_place=True)

    def in_torch() -> torch.Tensor:
        wide, delta = summed(torch.float32)
        return (wide + scale * filtered(delta)).bfloat16()

    def read() -> list[torch.Tensor]:
        return [model.view(torch.float32).sum() for model in models]  # torch sums integers several times slower

    times = timed({"ms": ours, "torch_ms": in_torch, "read_ms": read})
    return {
        "models": len(models), "shape": list(shape), "dtype": "bfloat16", "response": repr(response), **times,
        "ratio": times["torch_ms"] / times["ms"], "entries_rounded_otherwise_than_float64": wrong,
    }  # fmt: skip
