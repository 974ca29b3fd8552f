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
from oracle import oracle_filter

BACKEND_NAMES = [*(known.name for known in BACKENDS), "torch-elsewhere", "cuda-emulated"]
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


@pytest.mark.parametrize("name", BACKEND_NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_plan_agrees_with_the_oracle(name: str, shape: tuple[int, ...]) -> None:
    backend = backend_by_name(name)
    device = DEVICES.get(name, torch.device("cpu"))
    traits = backend.traits(device)
    assert traits is not None
    ran = 0
    for response, requested, dtype in requests():
        if requested != shape or dtype not in traits.dtypes:
            continue
        for plan in candidates(response, shape[-2:], dtype, str(device), backend.name, traits):
            if backend.supports(plan) is not None:
                continue
            x = sample(shape, dtype).clone().to(device)
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
    device = DEVICES.get(name, torch.device("cpu"))
    traits = backend.traits(device)
    assert traits is not None
    forms = {
        plan.form
        for response, shape, dtype in requests()
        if dtype in traits.dtypes
        for plan in candidates(response, shape[-2:], dtype, str(device), backend.name, traits)
        if backend.supports(plan) is None
    }
    assert forms >= traits.forms - {"identity", "scale"}
