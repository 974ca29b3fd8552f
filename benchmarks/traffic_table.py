"""The bytes that each path of the CUDA backend moves, from its plans: the table in docs/cuda.md.

Run ``python -m benchmarks.traffic_table`` to print it; no GPU is needed.
"""

from __future__ import annotations

from dataclasses import replace

import torch

import freemerge as fm
from benchmarks.traffic import Traffic, traffic
from freemerge.backends.cuda import CudaBackend
from freemerge.planner.forms import candidates
from freemerge.responses import Response

_FUSED_LENGTH, _FUSED_PRIME = 6836, 7  # four columns fit the shared memory of a block, in passes of radix 7 at most
SHAPES = [(768, 768), (3072, 768), (4096, 4096), (5120, 13824), (50257, 768)]
RESPONSES = [fm.HighPass(0.05), fm.HighPass(0.2), fm.HighPass(0.4), fm.Official(), fm.Butterworth(0.1)]


def best(shape: tuple[int, int], response: Response, dtype: torch.dtype) -> Traffic:
    """The traffic of the plan that the planner prefers on an H100."""
    traits = CudaBackend().traits(torch.device("cuda"))
    assert traits is not None
    h100 = replace(traits, fused_length=_FUSED_LENGTH, fused_prime=_FUSED_PRIME)
    return traffic(candidates(response, shape, dtype, "cuda", "cuda", h100)[0])


def table() -> str:
    """Markdown: bytes per entry in device memory, and in panels that stay in L2, for fp32 and bf16 storage."""
    lines = [
        "| shape | response | form | fp32: memory | L2 | bf16: memory | L2 |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for shape in SHAPES:
        for response in RESPONSES:
            wide, narrow = (best(shape, response, dtype) for dtype in (torch.float32, torch.bfloat16))
            numbers = [t.per_element(*where) for t in (wide, narrow) for where in (("matrix", "spectrum"), ("panel",))]
            name = f"{type(response).__name__}({getattr(response, 'cutoff', getattr(response, 'ratio', ''))})"
            form = wide.plan.form + (", transposed" if wide.plan.transposed else "")
            cells = [f"{shape[0]} x {shape[1]}", name, form, *(f"{number:.1f}" for number in numbers)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
