"""Every backend, by every plan it has for a request, against the oracle: one file, one case list."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pytest
import torch

import emulated
import freemerge as fm
from cases import DTYPES, RESPONSES, SHAPES
from fallback import Elsewhere
from freemerge.backends.base import Backend
from freemerge.backends.registry import BACKENDS
from freemerge.planner.forms import candidates
from freemerge.planner.plan import Plan
from freemerge.responses import transposed
from oracle import oracle_filter
from reference import reference_filter

BACKEND_NAMES = [
    *(pytest.param(known.name, marks=pytest.mark.gpu) if known.name == "cuda" else known.name for known in BACKENDS),
    "torch-elsewhere",
    "cuda-emulated",
]
DEVICES = {"cuda": torch.device("cuda")}
ORACLE_ERROR = 2e-13  # of its sums in float64


def backend_by_name(name: str) -> Backend:
    """The backend, if it can run on this machine. The emulated one runs the CUDA backend's sources on CPU tensors."""
    if name == "cuda-emulated":
        return emulated.backend()
    if name == "torch-elsewhere":
        return Elsewhere()
    backend = next(known for known in BACKENDS if known.name == name)
    info = backend.info()
    if not info.available:
        pytest.skip(f"backend {name}: {info.reason}")
    return backend


@lru_cache(maxsize=64)
def sample(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Noise with a mean and a slope, so that low frequencies carry more than their share."""
    generator = torch.Generator().manual_seed(sum(shape))
    ramp = torch.linspace(-1, 1, shape[-1])
    return (torch.randn(shape, generator=generator) + ramp + 0.3).to(dtype)


@lru_cache(maxsize=64)
def expected(response: fm.Response, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    matrices = sample(shape, dtype).double().numpy().reshape(-1, *(shape[-2:] if len(shape) > 1 else (1, shape[0])))
    mask = response.mask(shape[-2:])
    return torch.from_numpy(np.stack([oracle_filter(matrix, mask) for matrix in matrices])).reshape(shape)


def assert_filtered(result: torch.Tensor, plan: Plan, shape: tuple[int, ...], scale: float = 1.0) -> None:
    """Within the plan's error bound, and the storage's rounding on top of it."""
    response = plan.response
    dtype = result.dtype
    reference = scale * expected(response, shape, dtype)
    loudest = abs(scale) * max(1e-30, float(np.abs(response.mask(shape[-2:])).max()))
    allowed = max(plan.error_bound, ORACLE_ERROR) * loudest * float(sample(shape, dtype).double().norm())
    if dtype in (torch.bfloat16, torch.float16):
        # A correctly rounded result is off by half a unit at most; the arithmetic may move it over a tie.
        spacing = torch.nextafter(reference.to(dtype).abs(), torch.tensor(math.inf, dtype=dtype)).double()
        half = (spacing - reference.to(dtype).abs().double()) / 2
        assert ((result.double() - reference).abs() <= half * 1.001 + allowed).all()
    else:
        assert float((result.double() - reference).norm()) <= allowed


def requests() -> Iterator[tuple[fm.Response, tuple[int, ...], torch.dtype]]:
    for shape in SHAPES:
        for response in RESPONSES:
            for dtype in DTYPES if len(shape) == 2 else (torch.float32,):
                if dtype == torch.float32 or (shape[0] * 7 + shape[1]) % 3 == 0:  # a third of the shapes in every dtype
                    yield response, shape, dtype


def plans(name: str, response: fm.Response, shape: tuple[int, ...], dtype: torch.dtype) -> list[Plan]:
    """Every plan that a backend has for a request, not only the best."""
    backend, device = backend_by_name(name), DEVICES.get(name, torch.device("cpu"))
    traits = backend.traits(device)
    assert traits is not None
    if dtype not in traits.dtypes:
        return []
    found = candidates(response, shape[-2:], dtype, str(device), backend.name, traits)
    return [plan for plan in found if backend.supports(plan) is None]


@pytest.mark.parametrize("name", BACKEND_NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_plan_agrees_with_the_oracle(name: str, shape: tuple[int, ...]) -> None:
    backend, ran = backend_by_name(name), 0
    for response, requested, dtype in requests():
        if requested != shape:
            continue
        for plan in plans(name, response, shape, dtype):
            x = sample(shape, dtype).clone().to(plan.device)
            backend.executable(plan).run([x.reshape(-1, *plan.matrix)], -0.75)
            try:
                assert_filtered(x.cpu(), plan, shape, scale=-0.75)
            except AssertionError as error:
                raise AssertionError(f"{dtype}\n{plan}") from error
            ran += 1
    assert ran >= len(RESPONSES), "every response has at least one plan"


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_every_form_is_exercised(name: str) -> None:
    backend = backend_by_name(name)
    traits = backend.traits(DEVICES.get(name, torch.device("cpu")))
    assert traits is not None
    found = [plan for request in requests() for plan in plans(name, *request)]
    assert {plan.form for plan in found} >= traits.forms - {"identity", "scale"}
    if traits.whole_columns:
        assert any(plan.columns is not None and not plan.columns.taps for plan in found)
    assert {plan.fused for plan in found if plan.form == "full"} == ({False, True} if traits.fused_length else {False})


@pytest.mark.parametrize("name", BACKEND_NAMES)
@pytest.mark.parametrize("response", [fm.HighPass(0.05), fm.HighPass(0.3), fm.Official(0.7)], ids=repr)
def test_strided_matrices_are_filtered_in_place(name: str, response: fm.Response) -> None:
    found = plans(name, response, (48, 78), torch.float32)
    assert found
    for plan in found:
        storage = sample((60, 101), torch.float32).clone().to(plan.device)
        outside = torch.ones_like(storage, dtype=torch.bool)
        outside[3:51, 7:85] = False
        x, before = storage[3:51, 7:85], storage.clone()
        want = reference_filter(x.cpu(), response)
        backend_by_name(name).executable(plan).run([x[None]], 1.0)
        assert float((x.cpu() - want).norm()) <= 1e-6 * float(before[3:51, 7:85].norm()), f"{plan}"
        assert torch.equal(storage[outside], before[outside])


@pytest.mark.parametrize("name", BACKEND_NAMES)
@pytest.mark.parametrize("shape", [(67, 1009), (1009, 67), (1, 65537)], ids=str)
def test_lengths_with_large_prime_factors(name: str, shape: tuple[int, int]) -> None:
    response, x = fm.HighPass(0.05), sample(shape, torch.float32)
    want = reference_filter(x, response)
    found = plans(name, response, shape, torch.float32)
    assert found
    for plan in found:
        y = x.clone().to(plan.device)
        backend_by_name(name).executable(plan).run([y[None]], 1.0)
        assert float((y.cpu() - want).norm()) <= 1e-6 * float(x.norm()), f"{plan}"


@pytest.mark.parametrize("name", BACKEND_NAMES)
@pytest.mark.parametrize(
    ("shape", "response"),
    [
        ((101, 64), fm.Official(0.1)),
        ((433, 48), fm.Official(0.7)),
        ((333, 48), transposed(fm.Official(0.2))),
        ((3, 501, 40), fm.Official(0.4)),  # a batch
        ((403, 47), fm.Official(0.5)),  # an odd width, which stays whole
        ((402, 47), fm.Official(0.5)),
    ],
    ids=str,
)
def test_discs_around_nyquist(name: str, shape: tuple[int, ...], response: fm.Response) -> None:
    """Where the height is odd, they are centred between two of its bins."""
    backend = backend_by_name(name)
    traits = backend.traits(DEVICES.get(name, torch.device("cpu")))
    assert traits is not None
    for dtype in traits.dtypes:
        found = [plan for plan in plans(name, response, shape, dtype) if plan.rows is not None and plan.rows.nyquist]
        windows = "decimated" in traits.forms and (traits.half_bins or shape[-2] % 2 == 0)
        assert bool(found) == (windows and (name, dtype) != ("cpu", torch.float64))
        for plan in found:
            storage = torch.zeros(*shape[:-1], shape[-1] + 5, dtype=dtype, device=plan.device)
            x = storage[..., 2:-3].copy_(sample(shape, dtype))
            backend.executable(plan).run([x.view(-1, *plan.matrix)], 1.0)
            assert_filtered(x.cpu(), plan, shape)
            if dtype == torch.float32:
                error = (x.cpu().double() - expected(response, shape, dtype)).norm()
                assert float(error) <= 5e-7 * float(sample(shape, dtype).double().norm()), f"{plan}"
            assert not storage[..., :2].any()
            assert not storage[..., -3:].any()
