"""The bytes that each path of the CUDA backend moves, from its plans: the table in docs/cuda.md.

Run ``python -m benchmarks.traffic_table`` to print it; no GPU is needed.
"""

from __future__ import annotations

from dataclasses import replace

import torch

import freemerge as fm
from benchmarks.traffic import Traffic, merge_traffic, traffic
from freemerge.backends.cuda import CudaBackend
from freemerge.planner.forms import candidates
from freemerge.planner.plan import Plan
from freemerge.responses import Response

_FUSED_LENGTH, _FUSED_PRIME = 6836, 7  # four columns fit the shared memory of a block, in passes of radix 7 at most
_BLOCK_BYTES = 227 << 10
SHAPES = [(768, 768), (3072, 768), (4096, 4096), (4096, 11008), (5120, 13824), (50257, 768)]
RESPONSES = [fm.HighPass(0.05), fm.HighPass(0.2), fm.HighPass(0.4), fm.Official(), fm.Butterworth(0.1)]


def plans(shape: tuple[int, int], response: Response, dtype: torch.dtype) -> list[Plan]:
    """The plans for an H100, the preferred one first."""
    traits = CudaBackend().traits(torch.device("cuda"))
    assert traits is not None
    h100 = replace(traits, fused_length=_FUSED_LENGTH, fused_prime=_FUSED_PRIME, block_bytes=_BLOCK_BYTES)
    return candidates(response, shape, dtype, "cuda", "cuda", h100)


def best(shape: tuple[int, int], response: Response, dtype: torch.dtype) -> Traffic:
    """The traffic of the plan that the planner prefers."""
    return traffic(plans(shape, response, dtype)[0])


def in_three_kernels(shape: tuple[int, int], response: Response, dtype: torch.dtype) -> Plan | None:
    """The plan of the full form in three kernels, which have no panels."""
    found = (plan for plan in plans(shape, response, dtype) if plan.form == "full" and plan.tiles is not None)
    return next(found, None)


def table() -> str:
    """Markdown: bytes per entry in device memory, and in panels in L2; for the full form in three kernels, all."""
    lines = [
        "| shape | response | form | fp32: memory | L2 | bf16: memory | L2 | three kernels: fp32 | bf16 |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for shape in SHAPES:
        for response in RESPONSES:
            wide, narrow = (best(shape, response, dtype) for dtype in (torch.float32, torch.bfloat16))
            numbers = [t.per_element(*where) for t in (wide, narrow) for where in (("matrix", "spectrum"), ("panel",))]
            name = f"{type(response).__name__}({getattr(response, 'cutoff', getattr(response, 'ratio', ''))})"
            form = wide.plan.form + (", transposed" if wide.plan.transposed else "")
            cells = [f"{shape[0]} x {shape[1]}", name, form, *(f"{number:.1f}" for number in numbers)]
            for dtype in (torch.float32, torch.bfloat16):
                plan = in_three_kernels(shape, response, dtype)
                cells.append(f"{traffic(plan).per_element():.1f}" if plan else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def merge_table() -> str:
    """Markdown: bytes per entry of FR-Merging bf16 models of one matrix, which are on the device."""
    lines = [
        "| shape | response | form | 2 models: memory | 8 models: memory | L2 | three kernels: 2 models | 8 models |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for shape in SHAPES[2:]:
        for response in (fm.HighPass(0.05), fm.HighPass(0.4)):
            plan, own = best(shape, response, torch.float32).plan, in_three_kernels(shape, response, torch.float32)
            in_three = [merge_traffic(own, count, torch.bfloat16).per_element() for count in (2, 8) if own]
            two, eight = (merge_traffic(plan, count, torch.bfloat16) for count in (2, 8))
            numbers = [t.per_element("matrix", "spectrum") for t in (two, eight)] + [eight.per_element("panel")]
            cells = [f"{shape[0]} x {shape[1]}", f"HighPass({response.cutoff})", plan.form]
            cells += [f"{number:.1f}" for number in (*numbers, *in_three)]
            lines.append(f"| {' | '.join([*cells, *([] if own else ['', ''])])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), merge_table(), sep="\n\n")
