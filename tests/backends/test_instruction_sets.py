"""Every instruction set gives the same bytes; each is forced in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from freemerge import _core

ALL = ["baseline", "avx2", "avx512"]
AVAILABLE = ALL[: ALL.index(_core.detected_isa()) + 1]

SCRIPT = """
import hashlib, itertools, torch
from freemerge import _core, accumulate
from freemerge.experts.select import ModelSelector, select_largest

digest = hashlib.sha256()
def add(*tensors):
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())

dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
generator = torch.Generator().manual_seed(0)
for base_dtype, model_dtype in itertools.product(dtypes, dtypes):
    base = torch.randn(150, 1001, generator=generator).to(base_dtype)
    model = torch.randn(150, 1001, generator=generator).to(model_dtype)
    total, means = accumulate.task_vector_sum(base, [model, base, model], [0.3, 1.0, -0.7])
    add(total, torch.tensor(means, dtype=torch.float64))
    add(*[accumulate.add_round(base, total, 0.37, dtype) for dtype in dtypes])
    selector = ModelSelector()
    selector.count(model, base)
    selector.collect(model, base, 1500)
    for selection in (
        select_largest(model, base, 1501), select_largest(model, base, 10, by_row=True), *selector.finish(1500)
    ):
        add(selection.indices, selection.values)
print(_core.active_isa(), digest.hexdigest())
"""


def run(isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FREEMERGE_ISA": isa}
    return subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)


def test_results_are_the_same_bytes_on_every_instruction_set() -> None:
    results = [run(isa) for isa in AVAILABLE]
    for isa, result in zip(AVAILABLE, results, strict=True):
        assert result.returncode == 0, result.stderr
        assert result.stdout.split()[0] == isa
    assert len({result.stdout.split()[1] for result in results}) == 1


@pytest.mark.parametrize("isa", ["sse9", *ALL[len(AVAILABLE) :]])
def test_a_forced_instruction_set_must_exist(isa: str) -> None:
    result = run(isa)
    assert result.returncode != 0
    assert "FREEMERGE_ISA: " in result.stderr
