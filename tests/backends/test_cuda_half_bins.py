"""Bands around Nyquist of an odd height, between two bins, on the CUDA backend as the emulation runs it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import emulated
import freemerge as fm
from benchmarks.traffic import traffic
from freemerge.backends import registry
from freemerge.backends.cuda import CudaBackend
from freemerge.backends.torch import TorchBackend
from freemerge.planner.forms import candidates
from freemerge.planner.plan import Plan
from freemerge.planner.windows import half_bin
from freemerge.responses import Response, transposed
from in_memory import noise
from oracle import oracle_filter

TRANSFORMS = ("cufft", "own")
ORDERS = ("forward", "reverse", "random")
CASES = {
    "windows": ((301, 90), fm.Official(0.05)),
    "another parity of the middle bin": ((303, 90), fm.Official(0.05)),
    "columns whole": ((403, 48), fm.Official(0.5)),
    "an odd width, whole": ((403, 47), fm.Official(0.5)),
    "a prime": ((1009, 64), fm.Official(0.2)),
    "several chunks and blocks": ((1031, 520), fm.Official(0.02)),
    "transposed": ((333, 48), transposed(fm.Official(0.2))),
}


@pytest.fixture(params=TRANSFORMS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    """By either library."""
    return backend_by(request.param, monkeypatch)


def backend_by(transforms: str, monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    monkeypatch.setenv("FREEMERGE_CUDA_TRANSFORMS", transforms)
    return CudaBackend(emulated.runtime())


def plan_for(
    backend: CudaBackend, shape: tuple[int, int], response: Response, dtype: torch.dtype = torch.float32
) -> Plan:
    traits = backend.traits(torch.device("cpu"))
    assert traits is not None
    found = candidates(response, shape, dtype, "cpu", "cuda", traits)
    plan = next(plan for plan in found if plan.form == "decimated")
    assert plan.rows is not None
    assert half_bin(shape[0], plan.rows) == shape[0] % 2 / 2
    assert (plan.tiles is not None) == traits.own_transforms
    return plan


def exact(x: torch.Tensor, response: Response) -> torch.Tensor:
    return torch.from_numpy(oracle_filter(x.double().numpy(), response.mask(tuple(x.shape))))


@pytest.mark.parametrize("case", CASES)
def test_they_agree_with_the_oracle_in_every_order_of_threads(backend: CudaBackend, case: str) -> None:
    shape, response = CASES[case]
    plan, module = plan_for(backend, shape, response), emulated.module()
    x, results = noise(*shape), []
    for order in ORDERS:
        module.set_order(getattr(module.Order, order))
        results.append(x.clone())
        backend.executable(plan).run([results[-1][None]], 1.0)
    module.set_order(module.Order.forward)
    assert float((results[0] - exact(x, response)).norm()) < 5e-7 * float(x.double().norm()), f"{plan}"
    assert all(torch.equal(results[0], y) for y in results)


def test_windows_are_along_both_axes_or_one() -> None:
    taps = set()
    for shape, response in CASES.values():
        plan = plan_for(emulated.backend(), shape, response)
        assert plan.columns is not None
        taps.add(plan.columns.taps > 0)
    assert taps == {False, True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["windows", "columns whole"])
def test_strided_batches_are_their_matrices_in_float32(backend: CudaBackend, case: str, dtype: torch.dtype) -> None:
    shape, response = CASES[case]
    storage = noise(3, shape[0], shape[1] + 5, dtype=dtype)
    x, before = storage[:, :, 2:-3], storage.clone()
    wide = [matrix.float() for matrix in x]
    backend.executable(plan_for(backend, shape, response, dtype)).run([x], 0.75)
    for got, want in zip(x, wide, strict=True):
        backend.executable(plan_for(backend, shape, response)).run([want[None]], 0.75)
        assert torch.equal(got, want.to(dtype))
    assert torch.equal(storage[:, :, :2], before[:, :, :2])
    assert torch.equal(storage[:, :, -3:], before[:, :, -3:])


def test_a_batch_of_more_matrices_than_a_launch_takes(backend: CudaBackend) -> None:
    batch, response = noise(70, 201, 24), fm.Official(0.3)
    plan = plan_for(backend, (201, 24), response)
    together, alone = batch.clone(), batch.clone()
    backend.executable(plan).run([together], 1.0)
    for x in alone:
        backend.executable(plan).run([x[None]], 1.0)
    assert torch.equal(together, alone)


def test_a_dominant_mean_keeps_its_accuracy(backend: CudaBackend) -> None:
    shape, response = CASES["windows"]
    x = noise(*shape) + 1000.0
    want = exact(x, response)
    y = x.clone()
    backend.executable(plan_for(backend, shape, response)).run([y[None]], 1.0)
    assert float((y - want).norm() / want.norm()) < 1e-3  # of float32 itself, which holds 1000 to 3e-5


@pytest.mark.parametrize("count", [1, 3, 70])
def test_memory_stays_within_what_explain_promised(backend: CudaBackend, count: int) -> None:
    shape, response = CASES["windows"]
    plan, stream = plan_for(backend, shape, response), emulated.runtime().stream(torch.device("cpu"))
    traits = backend.traits(torch.device("cpu"))
    assert traits is not None
    assert traits.workspace is not None
    matrix = 4 * shape[0] * shape[1]
    pointers = [4096 + i * matrix for i in range(count)]
    needed = backend.executable(plan).workspace([], pointers, [shape[1]] * count, stream)  # type: ignore[attr-defined]
    assert needed <= traits.workspace(plan)


@pytest.mark.parametrize("shape", [(50257, 768), (50265, 768), (151935, 896)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_official_mask_of_a_vocabulary_reads_and_writes_it_once(
    backend: CudaBackend, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    with registry.using(backend, TorchBackend()):
        plan = fm.explain(shape, fm.Official(), dtype=dtype, backend="cuda")
    assert plan.form == "decimated"
    assert traffic(plan).per_element("matrix", "spectrum") == 2 * dtype.itemsize
    assert traffic(plan).per_element("panel") < 2.6


def test_the_traffic_model_counts_what_transforms_read_and_write(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, response = CASES["windows"]
    backend, x = backend_by("cufft", monkeypatch), noise(*shape)
    plan = plan_for(backend, shape, response)
    emulated.standin_traffic()
    backend.executable(plan).run([x[None]], 1.0)
    steps = [step for step in traffic(plan).steps if "cuFFT" in step.name]
    assert emulated.standin_traffic() == (sum(step.read for step in steps), sum(step.written for step in steps))


def test_an_odd_width_has_none() -> None:
    """Real transforms along it have whole bins only: the planner leaves it whole, and the native filter insists."""
    plan = plan_for(emulated.backend(), (300, 90), fm.Official(0.05))
    assert plan.columns is not None
    assert plan.columns.nyquist
    with pytest.raises(ValueError, match="odd width"):
        emulated.backend().prepare(replace(plan, shape=(300, 91)))


# --- bugs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bug(emulated.Bug):
    transforms: str = "cufft"
    case: str = "windows"


MASK = ("coarse_bins.h", "coarse_mask.cu")
BUGS = {
    "the sign where the grid wraps around": Bug(
        "window.cpp", "from = cell + j < d.cells ? n : n - samples", "from = n", "window.cpp", folder="common"
    ),
    "half a bin below": Bug(MASK[0], "half ? row / 2", "half ? (row + 1) / 2", MASK[1]),
    "distances of whole bins": Bug(MASK[0], "-dy - half", "-dy", MASK[1]),
    "whole bins left in": Bug(MASK[0], "half == 0 || row % 2 != 0", "true", MASK[1]),
    "the bin below the middle": Bug(MASK[0], "(height + half) / 2", "height / 2", MASK[1]),
    "the same in a table": Bug(MASK[0], "(height + half) / 2", "height / 2", "coarse_filter.cpp", transforms="own"),
    "a grid of half the rows": Bug(
        "coarse_filter.cpp", "smaller = static_cast<double>(height)",
        "smaller = static_cast<double>(plan.rows.cells)", "coarse_filter.cpp", transforms="own",
    ),
    "grids without the rows of zeros between them": Bug(
        "interpolate.cu", "blockIdx.z * a.grids.step", "blockIdx.z * a.grids.rows * a.grids.pitch", "interpolate.cu",
        case="columns whole",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = BUGS[name]
    shape, response = CASES[bug.case]
    plan, x = plan_for(backend_by(bug.transforms, monkeypatch), shape, response), noise(2, *shape)
    want = torch.stack([exact(matrix, response) for matrix in x])

    def is_right(backend: CudaBackend) -> bool:
        y = x.clone()
        backend.executable(plan).run([y], 1.0)
        return float((y - want).norm()) < 5e-7 * float(x.double().norm())

    assert is_right(emulated.backend())
    assert not is_right(emulated.backend_with(bug, tmp_path))
