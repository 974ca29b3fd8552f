"""Every instruction set gives the same bytes, each forced in a process of its own, and filters as accurately."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

import freemerge as fm
from freemerge import _core
from freemerge.backends.cpu import CpuBackend
from freemerge.planner.forms import candidates
from oracle import oracle_filter

ALL = ["baseline", "avx2", "avx512"]
AVAILABLE = ALL[: ALL.index(_core.detected_isa()) + 1]

SCRIPT = """
import hashlib, itertools, torch
import freemerge as fm
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
    add(total, torch.tensor([*means, accumulate.norm([model])], dtype=torch.float64))
    add(*[accumulate.add_round(base, total, 0.37, dtype) for dtype in dtypes])
    *_, norms = accumulate.filtered_sum(base, [model, base, model], [0.3, 1.0, -0.7], fm.HighPass(0.0))
    add(torch.tensor(norms or (), dtype=torch.float64))
    selector = ModelSelector()
    selector.count(model, base)
    selector.collect(model, base, 1500)
    for selection in (
        select_largest(model, base, 1501), select_largest(model, base, 10, by_row=True), *selector.finish(1500)
    ):
        add(selection.indices, selection.values)
torch.set_flush_denormal(True)  # in this thread, which does small things itself
base, model = torch.zeros(1001, dtype=torch.float16), torch.arange(-500, 501).short().abs().view(torch.float16)
chosen = select_largest(model, base, 900)
assert len(chosen.values) == 900 and chosen.values.min() >= 50 * 2.0**-24
assert accumulate.task_vector_sum(base, [model], [1.0])[0].max() == 500 * 2.0**-24
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


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("shape", [(101, 64), (333, 48), (1009, 47)], ids=str)
def test_every_instruction_set_filters_around_nyquist_of_an_odd_height(
    isa: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core, "Filter", partial(_core.Filter, isa=isa))
    backend, response = CpuBackend(), fm.Official(0.1)
    traits = backend.traits(torch.device("cpu"))
    assert traits is not None
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(oracle_filter(x.double().numpy(), response.mask(shape)))
    plans = candidates(response, shape, x.dtype, "cpu", "cpu", traits)
    (plan,) = (plan for plan in plans if plan.rows is not None and plan.rows.nyquist)
    y = x.clone()
    backend.prepare(plan).run([y[None]], 1.0)
    assert float((y - expected).norm()) <= min(plan.error_bound, 5e-7) * float(x.double().norm())
